"""Says what a benchmark ran on, so that its figures mean something later."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import psutil
import torch

from tsqp.measurements import Hardware
from tsqp.threads import available_cores


def describe() -> Hardware:
    """Describe this machine."""
    return Hardware(
        cpu=f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        cores=available_cores(),
        memory_gb=round(psutil.virtual_memory().total / 2**30, 1),
        torch=str(torch.__version__),
        python=platform.python_version(),
        gpu=", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())),
    )


def commit() -> str:
    """Return the commit of the source tree, or ``unknown`` outside of one; ``+`` marks uncommitted changes."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        status = subprocess.run(
            ["git", "status", "--porcelain", ":/src"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
