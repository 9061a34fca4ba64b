"""Resident memory of this process, as Linux counts it in /proc/self/status; 0 elsewhere.

The peak is VmHWM and not ``getrusage``'s: that one starts at what the parent held when this process was started.
"""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident() -> int:
    """Return the bytes that are resident now."""
    return _field("VmRSS")


def peak() -> int:
    """Return the most bytes that were resident at a time since the process began."""
    return _field("VmHWM")


def _field(name: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
