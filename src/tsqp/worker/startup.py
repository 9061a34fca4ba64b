"""Brings a worker up from its settings: device, address, model, in the order in which mistakes are cheapest."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tsqp.config import WorkerConfig
from tsqp.errors import ConfigError, SetupError
from tsqp.model.architecture import module_count, read_config, weight_shapes
from tsqp.model.digest import model_digest
from tsqp.model.linears import Linears
from tsqp.model.locate import locate
from tsqp.model.ops import read_state
from tsqp.model.weights import Checkpoint
from tsqp.threads import set_threads
from tsqp.transport.server import Server
from tsqp.transport.urls import Endpoint, parse
from tsqp.wire import codec
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.server import Worker


@dataclass(frozen=True, slots=True)
class Progress:
    """How start-up tells what it does: one-line notices, and the fraction done of a named step."""

    notice: Callable[[str], None]
    step: Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class RunningWorker:
    """A worker that is bound and loaded but does not serve yet."""

    worker: Worker
    transport: Server
    endpoints: tuple[Endpoint, ...]
    device: torch.device
    dtype: str
    threads: int
    modules: int
    model: str
    digest: str

    def serve(self) -> None:
        """Answer requests until SIGINT or SIGTERM, or until the parent hangs up; then close."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self.worker.stop())
        try:
            self.worker.serve()
        finally:
            self.transport.close()


def open_worker(config: WorkerConfig, progress: Progress, hangup_fd: int | None = None) -> RunningWorker:
    """Resolve the device, bind the addresses, load the model.

    Args:
        config: the worker's settings.
        progress: where to report to.
        hangup_fd: the worker stops when this file descriptor closes, such as a pipe from its parent.

    Raises:
        SetupError: device missing, address in use, model missing or too large.
    """
    threads = set_threads(config.threads)
    device = resolve_device(config.device, progress.notice)
    endpoints = tuple(parse(url) for url in config.listen) or (parse(f"127.0.0.1:{config.port}"),)
    for endpoint in endpoints:
        if not endpoint.stays_on_this_machine:
            progress.notice(f"{endpoint} is open to the network, unencrypted: whoever reaches it can use and read it.")
    transport = Server(endpoints, config.max_message_bytes, hangup_fd)
    try:
        dispatcher = _load(config, device, progress)
    except BaseException:
        transport.close()
        raise
    return RunningWorker(
        worker=Worker(dispatcher, transport),
        transport=transport,
        endpoints=endpoints,
        device=device,
        dtype=config.dtype,
        threads=threads,
        modules=module_count(dispatcher.linears.config),
        model=config.model,
        digest=dispatcher.digest,
    )


def _load(config: WorkerConfig, device: torch.device, progress: Progress) -> Dispatcher:
    directory = locate(config.model, lambda done: progress.step("converting the model", done))
    architecture = read_config(directory)
    checkpoint = Checkpoint(directory)
    checkpoint.require(weight_shapes(architecture))
    digest = model_digest(architecture, checkpoint, lambda done: progress.step("hashing the weights", done))
    dtype = codec.TORCH_DTYPES[config.dtype]
    linears = Linears(architecture, checkpoint, dtype, device, lambda done: progress.step("loading the weights", done))
    return Dispatcher(linears, read_state(linears, checkpoint), config.model, digest)


def resolve_device(asked: str | None, notice: Callable[[str], None]) -> torch.device:
    """Return the device to compute on.

    Args:
        asked: ``cpu`` or ``cuda:N``; None for the published default, ``cuda:0`` where there is one.
        notice: told in one line when there is none and the CPU is used.

    Raises:
        ConfigError: not a device name.
        SetupError: the user asked for a GPU that is missing.
    """
    if asked is None and not torch.cuda.is_available():
        notice("no CUDA device found, using the CPU (--device or LLAMA_GPU_DEVICE chooses).")
        return torch.device("cpu")
    try:
        device = torch.device(asked or "cuda:0")
    except RuntimeError as error:
        raise ConfigError(f"unknown device {asked!r}: expected cpu or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {asked!r}: expected cpu or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise SetupError(
            f"device {asked} was asked for, but torch {torch.__version__} finds {found} CUDA devices. "
            "Check nvidia-smi and that torch is a CUDA build, or use --device cpu."
        )
    return device
