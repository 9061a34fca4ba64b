"""What a run costs: counts, bytes and nanoseconds, added up beside the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Meter:
    """Costs so far.

    ``waited_ns`` is time spent blocked on the worker, ``compute_ns`` the worker's own account of its work;
    ``quantise_ns``, ``mask_ns``, ``unmask_ns`` and ``check_ns`` are the enclave's work of protecting its products
    (quantise covers both directions, mask making the keystream too); ``mask_wait_ns`` is time a product waited for mask
    products that were not in the pool, ``mask_fill_ns`` time spent filling the pool.
    """

    round_trips: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    waited_ns: int = 0
    compute_ns: int = 0
    verified_rows: int = 0
    mask_rows: int = 0
    quantise_ns: int = 0
    mask_ns: int = 0
    unmask_ns: int = 0
    check_ns: int = 0
    mask_wait_ns: int = 0
    mask_fill_ns: int = 0

    @property
    def protection_ns(self) -> int:
        """The enclave's whole work of protecting its products; making mask products is not part of it."""
        return self.quantise_ns + self.mask_ns + self.unmask_ns + self.check_ns

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time of a ``with`` block to the field ``<name>_ns``."""
        field = f"{name}_ns"
        started = time.perf_counter_ns()
        try:
            yield
        finally:
            setattr(self, field, getattr(self, field) + time.perf_counter_ns() - started)

    def since(self, before: Meter) -> Meter:
        """Return what has been added since a copy of this meter was made."""
        earlier = asdict(before)
        return Meter(**{name: value - earlier[name] for name, value in asdict(self).items()})
