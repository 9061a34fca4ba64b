"""Which device a worker computes on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tsqp.errors import ConfigError, DeviceError, SetupError


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


def device_failed(device: torch.device, error: Exception) -> DeviceError:
    """Return the error that says that a device has failed for good, and what to do."""
    words = str(error).partition("\n")[0]
    return DeviceError(
        f"{device} has failed, and this process cannot use it any more ({words}): "
        "start the worker again; nvidia-smi and the kernel's log may say why."
    )
