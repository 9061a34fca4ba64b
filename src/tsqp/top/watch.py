"""Reads a peer again and again, and tells what happened between two readings, also of one that goes away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from tsqp.errors import AbsentPeerError, TransportError, TsqpError
from tsqp.reports import TopReport
from tsqp.top.reading import Reading, Source, follows, report


def watch(
    source: Source, interval_s: float, sleep: Callable[[float], None] = time.sleep
) -> Iterator[TopReport | TsqpError]:
    """Yield a report for each interval; while the peer is away or begins anew, why there is none, and go on.

    Args:
        source: the peer.
        interval_s: between two readings, from the start of one to that of the next where they come in time.
        sleep: waits.

    Raises:
        TsqpError: it was never there, or cannot be watched.
    """
    before: Reading | None = source.read()
    due = time.monotonic() + interval_s
    while True:
        sleep(max(0.0, due - time.monotonic()))
        due = time.monotonic() + interval_s
        try:
            now = source.read()
        except (TransportError, AbsentPeerError) as error:
            before = None
            yield error
            continue
        if before is not None and follows(before, now):
            yield report(source.url, before, now)
        else:
            yield TransportError(f"{source.url} has started anew; numbers come with the next reading.")
        before = now
