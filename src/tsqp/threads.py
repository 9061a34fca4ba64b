"""Threads of a TSQP process. Imported before torch, on both sides of the boundary.

Enclave and worker take turns: while one computes, the other waits. libgomp's threads spin for milliseconds after
each parallel region (for ever with ``OMP_WAIT_POLICY=active``) and so take the cores from the peer whose turn it
is. ``share_cores`` asks for passive waiting; a user's own setting wins. docs/performance.md has the measurement.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tsqp.errors import ConfigError

SHARED_WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}


def share_cores() -> None:
    """Ask OpenMP for passive waiting. Has an effect only before torch is imported, since libgomp reads it once."""
    for name, value in SHARED_WAITING.items():
        os.environ.setdefault(name, value)


def available_cores() -> int:
    """Count the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Give torch another number of threads during a ``with`` block."""
    import torch  # noqa: PLC0415  torch must load after share_cores()

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def set_threads(threads: int | None) -> int:
    """Set torch's intra-operator threads.

    Args:
        threads: how many, at least 1; None means every core this process may use.

    Returns:
        The number now in force.

    Raises:
        ConfigError: fewer than one thread was asked for.
    """
    import torch  # noqa: PLC0415  torch must load after share_cores()

    wanted = available_cores() if threads is None else threads
    if wanted < 1:
        raise ConfigError(f"--threads {wanted}: at least 1 thread is needed.")
    torch.set_num_threads(wanted)
    return wanted
