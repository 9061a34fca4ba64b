"""How much memory a worker's device has, and how much of it is taken."""

from __future__ import annotations

import psutil
import torch


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return what is taken of a device's memory and what it has, in bytes.

    Of a GPU by all processes; on a CPU what of this process is resident, and the machine's.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    return psutil.Process().memory_info().rss, psutil.virtual_memory().total
