"""What a run costs: counts, bytes and nanoseconds, added up beside the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

from msgspec import Struct, structs


class Span(Struct, frozen=True, array_like=True):
    """Work of the enclave on one thing, from when to when by ``time.monotonic_ns``."""

    name: str
    start_ns: int
    end_ns: int


class Request(Struct, frozen=True, array_like=True):
    """One request: sent and answered by the enclave's clock, begun by the worker's own, which is another clock.

    ``arrived_ns`` and ``taken_ns`` are when the reply came and when it was asked for and there; 0 where it never was.
    """

    operation: str
    sent_ns: int
    arrived_ns: int = 0
    taken_ns: int = 0
    started_ns: int = 0
    compute_ns: int = 0


class Recorder:
    """Writes down what happened when, for ``tsqp bench --trace``. Nobody has one otherwise."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.requests: list[Request] = []
        self._places: dict[int, int] = {}

    def span(self, name: str, start_ns: int) -> None:
        """Note work that began then and ends now."""
        self.spans.append(Span(name, start_ns, time.monotonic_ns()))

    def sent(self, number: int, operation: str) -> None:
        """Note a request that is about to be sent."""
        self._places[number] = len(self.requests)
        self.requests.append(Request(operation, time.monotonic_ns()))

    def arrived(self, number: int) -> None:
        """Note a reply that has come."""
        self._change(number, arrived_ns=time.monotonic_ns())

    def taken(self, number: int, started_ns: int, compute_ns: int) -> None:
        """Note a reply that is handed to whoever asked, with the worker's account of it."""
        self._change(number, taken_ns=time.monotonic_ns(), started_ns=started_ns, compute_ns=compute_ns)

    def _change(self, number: int, **values: int) -> None:
        place = self._places.get(number)
        if place is not None:
            self.requests[place] = structs.replace(self.requests[place], **values)


@dataclass(slots=True)
class Meter:
    """Costs so far.

    ``waited_ns`` is time spent blocked on the worker, ``compute_ns`` the worker's own account of its work and
    ``copy_ns`` the part of that in which tensors went to its device and back; ``quantise_ns`` (both directions),
    ``mask_ns``, ``check_ns`` (taking masks off included) and ``ahead_ns`` are the enclave's work of protecting its
    products; the last is what it does while a product is away: half of its check, and the keystream for the next. Of
    that only what the process computes counts: while a worker on the same machine has the core, it is waited for.
    ``mask_wait_ns`` is time a product waited for mask products that were not in the pool, ``mask_fill_ns`` time spent
    filling the pool. ``recorder`` is set for a trace.
    """

    round_trips: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    waited_ns: int = 0
    compute_ns: int = 0
    copy_ns: int = 0
    verified_rows: int = 0
    mask_rows: int = 0
    quantise_ns: int = 0
    mask_ns: int = 0
    ahead_ns: int = 0
    check_ns: int = 0
    mask_wait_ns: int = 0
    mask_fill_ns: int = 0
    recorder: Recorder | None = field(default=None, compare=False, repr=False)

    @property
    def protection_ns(self) -> int:
        """The enclave's whole work of protecting its products; making mask products is not part of it."""
        return self.quantise_ns + self.mask_ns + self.check_ns + self.ahead_ns

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time of a ``with`` block to the field ``<name>_ns``."""
        total = f"{name}_ns"
        started = time.monotonic_ns()
        try:
            yield
        finally:
            setattr(self, total, getattr(self, total) + time.monotonic_ns() - started)
            if self.recorder is not None:
                self.recorder.span(name, started)

    @contextmanager
    def while_away(self) -> Iterator[None]:
        """Add the time that the process computes in a ``with`` block to ``ahead_ns``, and the rest to ``waited_ns``."""
        started, computed = time.monotonic_ns(), time.process_time_ns()
        try:
            yield
        finally:
            taken_ns = time.monotonic_ns() - started
            computed_ns = min(taken_ns, time.process_time_ns() - computed)
            self.ahead_ns += computed_ns
            self.waited_ns += taken_ns - computed_ns
            if self.recorder is not None:
                self.recorder.span("ahead", started)

    def since(self, before: Meter) -> Meter:
        """Return what has been added since a copy of this meter was made."""
        return Meter(**{name: getattr(self, name) - getattr(before, name) for name in _COUNTS})

    def plus(self, other: Meter) -> Meter:
        """Return the costs of both."""
        return Meter(**{name: getattr(self, name) + getattr(other, name) for name in _COUNTS})


_COUNTS = tuple(entry.name for entry in fields(Meter) if entry.name != "recorder")
