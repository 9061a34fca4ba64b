"""Fills the mask pool while nothing runs, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tsqp.enclave.mask_pool import MaskPool
from tsqp.errors import HostileError, InternalError, TransportError, TsqpError
from tsqp.meter import Meter

_POLL_S = 0.2


class IdleRefill:
    """Keeps a pool full in idle time.

    Args:
        pool: what to fill.
        threads: CPU threads to compute with.
        meter: where the time is counted.
    """

    def __init__(self, pool: MaskPool, threads: int, meter: Meter) -> None:
        self._pool = pool
        self._threads = threads
        self._meter = meter
        self._changed = threading.Condition()
        self._running = 0
        self._closed = False
        self._failure: TsqpError | None = None
        self._thread = threading.Thread(target=self._work, name="tsqp-mask-refill", daemon=True)
        self._thread.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not fill during a ``with`` block: a request needs the cores. Blocks may overlap.

        After a failed link filling is tried again once the block is over.

        Raises:
            HostileError: a dealer sent what it must not while the pool was filled.
        """
        with self._changed:
            if isinstance(self._failure, HostileError):
                raise self._failure
            if isinstance(self._failure, TransportError):
                self._failure = None
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def check(self) -> None:
        """Raise what has stopped the filling, if anything has.

        Raises:
            TsqpError: a dealer failed or lied, or the thread has a bug.
        """
        if self._failure is not None:
            raise self._failure

    def wait_until_full(self, on_progress: Callable[[float], None] = lambda _done: None) -> None:
        """Wait for a full pool.

        Raises:
            TsqpError: a dealer failed. After a failed link filling is tried again.
        """
        while True:
            with self._changed:
                if failure := self._failure:
                    # A link may come back; a dealer that lied does not.
                    self._failure = None if isinstance(failure, TransportError) else failure
                    raise failure
                if self._pool.is_full:
                    break
                self._changed.notify_all()
                self._changed.wait(_POLL_S)
            on_progress(min(0.99, self._pool.held / max(1, self._pool.wanted)))
        on_progress(1.0)

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            with self._changed:
                while not self._closed and (self._running or self._failure or self._pool.is_full):
                    self._changed.wait()
                if self._closed:
                    return
            try:
                with self._meter.span("mask_fill"):
                    self._pool.fill_step()
            except TsqpError as error:
                self._failure = error
            except Exception as error:  # noqa: BLE001  whoever waits for the pool must hear of a bug in this thread
                self._failure = InternalError(f"filling the mask pool failed ({type(error).__name__}).")
                self._failure.__cause__ = error
            with self._changed:
                self._changed.notify_all()

    def close(self) -> None:
        """End the thread after the step it is in."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
