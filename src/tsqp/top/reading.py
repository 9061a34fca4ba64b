"""What is read of a peer at one time, and what two readings say of the time between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Literal, Protocol

from tsqp.reports import TopReport

Kind = Literal["worker", "dealer", "server"]
_IDLE = "idle"
# What goes on beside the other parts, so that it leaves them the whole time.
BESIDE = ("mask_fill",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a peer says of itself; nothing of it is checked but that it is well-formed.

    Attributes:
        requests: by kind, since its start.
        counters: since its start: ``rows``, ``tokens``, ``prompt_tokens``, ``bytes_in``, ``bytes_out``, and of a worker
            ``products`` and ``product_requests``. One that the peer does not have is missing.
        parts: seconds since its start by part.
        batch: of a server; a worker's is counted.
    """

    kind: Kind
    software: str
    model: str
    serves: str
    device: str | None = None
    dtype: str | None = None
    ready: bool = True
    reason: str = ""
    uptime_s: float
    requests: Mapping[str, int]
    counters: Mapping[str, float]
    parts: Mapping[str, float]
    clients: int | None = None
    waiting: int
    waiting_bytes: int | None = None
    running: int | None = None
    batch: float = 0.0
    memory_bytes: int | None = None
    memory_total_bytes: int | None = None
    cache_used: float | None = None
    pool_held: int | None = None
    pool_wanted: int | None = None
    workers: int | None = None
    workers_usable: int | None = None
    errors: int
    failed: int | None = None
    refused: int | None = None
    integrity_failures: int | None = None
    at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))


class Source(Protocol):
    """A peer that can be read again and again, also after it was gone."""

    @property
    def url(self) -> str:
        """Its address, as it is shown."""

    def read(self) -> Reading:
        """Ask it what it does.

        Raises:
            TransportError, AbsentPeerError: it does not answer now; it may later.
            TsqpError: it cannot be watched.
        """

    def close(self) -> None:
        """End the link to it. May be called twice."""


def follows(before: Reading, now: Reading) -> bool:
    """Tell whether the later reading is of the same process: one that has started anew counts from 0 again."""
    return now.uptime_s > before.uptime_s and all(
        later.get(name, 0) >= count
        for earlier, later in ((before.requests, now.requests), (before.counters, now.counters))
        for name, count in earlier.items()
    )


def report(url: str, before: Reading, now: Reading) -> TopReport:
    """Return what happened between two readings of one process, the earlier one first.

    The time between them is by the peer's clock, as its counts are.
    """
    interval_s = now.uptime_s - before.uptime_s
    grown = {name: count - before.counters.get(name, 0) for name, count in now.counters.items()}
    requests = {kind: (count - before.requests.get(kind, 0)) / interval_s for kind, count in now.requests.items()}

    def rate(name: str) -> float | None:
        return grown[name] / interval_s if name in grown else None

    return TopReport(
        time=now.at.isoformat(timespec="milliseconds"),
        url=url,
        kind=now.kind,
        software=now.software,
        model=now.model,
        serves=now.serves,
        device=now.device,
        dtype=now.dtype,
        ready=now.ready,
        reason=now.reason,
        uptime_s=now.uptime_s,
        interval_s=interval_s,
        clients=now.clients,
        requests_per_s=sum(requests.values()),
        requests_by_kind_per_s=requests,
        rows_per_s=rate("rows"),
        tokens_per_s=rate("tokens"),
        prompt_tokens_per_s=rate("prompt_tokens"),
        bytes_in_per_s=rate("bytes_in") or 0.0,
        bytes_out_per_s=rate("bytes_out") or 0.0,
        waiting=now.waiting,
        waiting_bytes=now.waiting_bytes,
        running=now.running,
        batch=grown["product_requests"] / grown["products"] if grown.get("products") else now.batch,
        memory_bytes=now.memory_bytes,
        memory_total_bytes=now.memory_total_bytes,
        cache_used=now.cache_used,
        pool_held=now.pool_held,
        pool_wanted=now.pool_wanted,
        workers=now.workers,
        workers_usable=now.workers_usable,
        parts=shares(before.parts, now.parts, interval_s),
        errors=now.errors,
        failed=now.failed,
        refused=now.refused,
        integrity_failures=now.integrity_failures,
    )


def shares(before: Mapping[str, float], now: Mapping[str, float], interval_s: float) -> dict[str, float]:
    """Return the share of an interval that each part took; ``idle`` is what they leave of it."""
    found = {name: max(0.0, seconds - before.get(name, 0.0)) / interval_s for name, seconds in now.items()}
    busy = sum(share for name, share in found.items() if name not in BESIDE)
    return {**found, _IDLE: max(0.0, 1.0 - busy)}
