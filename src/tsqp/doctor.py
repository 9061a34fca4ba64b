"""Looks at this machine: each check says what it found and what to do.

``fail`` stops TSQP here; ``note`` limits it (no GPU, no SGX) and is normal on a development machine.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from tsqp.arith import native, panels
from tsqp.config import WorkerConfig
from tsqp.errors import TsqpError
from tsqp.model.architecture import LlamaConfig, read_config, weight_shapes
from tsqp.model.linears import onednn_computes
from tsqp.model.locate import BUNDLED, bundled_file, converted_directory, locate
from tsqp.model.weights import Checkpoint
from tsqp.reports import Check, DoctorReport
from tsqp.wire.codec import TORCH_DTYPES

_PYTHONS = ((3, 10), (3, 13))
_SGX_DEVICES = ("/dev/sgx_enclave", "/dev/sgx/enclave")
_DEV_SHM = Path("/dev/shm")  # noqa: S108  it is the device that is looked at
_SHM_BYTES = 64 << 20
_LOADING_FACTOR = 1.3


def examine(config: WorkerConfig) -> DoctorReport:
    """Run every check for the worker these settings describe."""
    checks = [
        _python(),
        _torch(config),
        _native(),
        _cuda(config),
        *_model(config),
        _port(config),
        _shared_memory(_DEV_SHM),
        *_left_regions(_DEV_SHM),
        _sgx(),
        _gramine(),
    ]
    return DoctorReport(ok=all(check.status != "fail" for check in checks), checks=checks)


def _python() -> Check:
    found = platform.python_version()
    if _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]:
        return Check(name="python", status="ok", found=found)
    return Check(
        name="python", status="fail", found=found, advice="install Python 3.10 to 3.13 and make a new environment"
    )


def _torch(config: WorkerConfig) -> Check:
    products = f"CPU products in {config.dtype} by {_multiplier(TORCH_DTYPES[config.dtype])}"
    found = f"{torch.__version__}, {torch.get_num_threads()} threads, {products}"
    return Check(name="torch", status="ok", found=found)


def _multiplier(dtype: torch.dtype) -> str:
    with contextlib.suppress(TsqpError):  # which _native reports
        if panels.kernels_for(dtype, torch.device("cpu")):
            return "the native kernel"
    return "oneDNN" if onednn_computes(dtype) else "torch's own linear"


def _native() -> Check:
    try:
        kernels = native.kernels()
    except TsqpError as error:
        return Check(name="native kernels", status="fail", found="not usable", advice=str(error))
    if kernels:
        return Check(name="native kernels", status="ok", found=f"built, {kernels.instructions}")
    found = f"built, {native.available()[-1]}, not used" if native.available() else "not built"
    return Check(name="native kernels", status="note", found=found, advice=native.notice() or "")


def _cuda(config: WorkerConfig) -> Check:
    count = torch.cuda.device_count()
    if count:
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
        return Check(name="cuda", status="ok", found=names)
    if config.device and config.device.startswith("cuda"):
        advice = f"{config.device} is asked for: install a CUDA build of torch and the driver, or set the device to cpu"
        return Check(name="cuda", status="fail", found="no device", advice=advice)
    return Check(name="cuda", status="note", found="no device", advice="the worker will use the CPU")


def _model(config: WorkerConfig) -> list[Check]:
    """Check that the model is there and complete, and that it fits in memory. Converts nothing."""
    try:
        directory = _unconverted(config.model)
        if directory is None:
            found = f"{config.model}: not converted yet"
            return [
                Check(
                    name="model", status="note", found=found, advice="the first start converts it, which takes a while"
                )
            ]
        architecture = read_config(directory)
        checkpoint = Checkpoint(directory)
        checkpoint.require(weight_shapes(architecture))
    except (TsqpError, OSError) as error:
        return [Check(name="model", status="fail", found=config.model, advice=str(error))]
    shape = f"{architecture.layers} layers, D {architecture.hidden_size}, vocabulary {architecture.vocab_size}"
    complete = Check(name="model", status="ok", found=f"{config.model}: {shape}, complete")
    return [complete, _memory(config, architecture)]


def _unconverted(model: str) -> Path | None:
    """Return the model's directory, or None for a GGUF file that has not been converted."""
    source = bundled_file() if model == BUNDLED else Path(model).expanduser()
    if source.suffix == ".gguf" and source.is_file() and not converted_directory(source).exists():
        return None
    return locate(model)


def _memory(config: WorkerConfig, architecture: LlamaConfig) -> Check:
    elements = sum(torch.Size(shape).numel() for shape in weight_shapes(architecture).values())
    needed = _LOADING_FACTOR * elements * TORCH_DTYPES[config.dtype].itemsize
    available = psutil.virtual_memory().available
    found = f"{needed / 1e9:.1f} GB needed in {config.dtype}, {available / 1e9:.1f} GB available"
    if needed < available:
        return Check(name="memory", status="ok", found=found)
    advice = "free memory, use --dtype bfloat16 or a smaller model"
    return Check(name="memory", status="fail", found=found, advice=advice)


def _port(config: WorkerConfig) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", config.port))
        except OSError as error:
            found = f"{config.port}: {error.strerror}"
            advice = "a worker may be running already; else choose another port (LLAMA_GPU_PORT, --listen)"
            return Check(name="port", status="note", found=found, advice=advice)
    return Check(name="port", status="ok", found=f"{config.port} is free")


def _shared_memory(path: Path) -> Check:
    try:
        status = os.statvfs(path)
    except OSError as error:
        return Check(
            name="shared memory", status="note", found=f"{path}: {error.strerror}", advice="mount a tmpfs there"
        )
    free = status.f_bavail * status.f_frsize
    found = f"{path}: {free / 2**20:.0f} MB free"
    if not os.access(path, os.W_OK):
        advice = "shm:// over a socket does not need it; named regions, shm:///dev/shm/NAME, do"
        return Check(name="shared memory", status="note", found=f"{path} is not writable", advice=advice)
    if free < _SHM_BYTES:
        return Check(name="shared memory", status="note", found=found, advice="in a container, raise --shm-size")
    return Check(name="shared memory", status="ok", found=found)


def _left_regions(directory: Path) -> list[Check]:
    """Say which named regions dead processes left; nothing where there are none."""
    if sys.platform != "linux":
        return []
    from tsqp.transport.named import left_regions  # noqa: PLC0415  Linux only

    left = [f"{path} ({size / 2**20:.0f} MB)" for path, size in left_regions(directory)]
    if not left:
        return []
    advice = "the next worker with a named region removes them; or remove them yourself"
    return [Check(name="left regions", status="note", found=", ".join(left), advice=advice)]


def _sgx() -> Check:
    device = next((name for name in _SGX_DEVICES if Path(name).exists()), None)
    if device:
        return Check(name="sgx", status="ok", found=device)
    advice = "without SGX the enclave is a plain process: for development only"
    return Check(name="sgx", status="note", found="no SGX device", advice=advice)


def _gramine(which: Callable[[str], str | None] = shutil.which) -> Check:
    found = which("gramine-sgx") or which("gramine-direct")
    if found:
        return Check(name="gramine", status="ok", found=found)
    advice = "needed only to run inside SGX: install Gramine 1.9 from its own package repository"
    return Check(name="gramine", status="note", found="not installed", advice=advice)
