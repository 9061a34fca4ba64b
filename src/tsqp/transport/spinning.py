"""Waiting for a short while without going to sleep, and putting that while to use.

A core that sleeps in a virtual machine takes 0.05 ms and more to wake. While a process spins it lets whoever wants the
core have it, and may read memory that it will need next into the processor's caches.
"""

from __future__ import annotations

import os
import select
import time
from typing import Protocol

from tsqp.arith import extension

# native.h's MAX_WATCHED.
_MOST = 64


class Ahead(Protocol):
    """Memory that will be needed next."""

    def span(self) -> tuple[int, int]:
        """Return where it begins and how many bytes of it have not been read yet."""

    def fetched(self, size: int) -> None:
        """Take note that the first ``size`` bytes of the span have been read."""


def spin(descriptors: tuple[int, ...], limit_s: float, ahead: Ahead | None = None) -> list[int]:
    """Return those descriptors that are ready to be read, as soon as there are some; none after so much time.

    Args:
        descriptors: to poll.
        limit_s: in seconds.
        ahead: what to read meanwhile, where the native extension is built.
    """
    if not extension.module or len(descriptors) > _MOST:
        return _spin_in_python(descriptors, limit_s)
    end, left = time.perf_counter() + limit_s, limit_s
    while True:
        at, size = ahead.span() if ahead else (0, 0)
        fetched, ready = extension.module.watch(descriptors, int(left * 1e9), at, size)
        if ahead and fetched:
            ahead.fetched(fetched)
        left = end - time.perf_counter()
        if ready or left <= 0:
            return ready


def core() -> int:
    """Return which core this thread runs on, counted from 1; 0 if that is not known."""
    return extension.module.core() + 1 if extension.module else 0


def step_aside() -> None:
    """Move this thread to another core, if it may run on one."""
    cores = os.sched_getaffinity(0)
    if others := cores - {core() - 1}:
        os.sched_setaffinity(0, others)
        os.sched_setaffinity(0, cores)


def _spin_in_python(descriptors: tuple[int, ...], limit_s: float) -> list[int]:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    end = time.perf_counter() + limit_s
    while not (ready := poll.poll(0)) and time.perf_counter() < end:
        os.sched_yield()
    return [descriptor for descriptor, _ in ready]
