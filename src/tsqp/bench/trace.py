"""A prefill as a timeline for chrome://tracing or ui.perfetto.dev: enclave and worker side by side.

The worker says when each product began by a clock of its own. Where that clock stands against the enclave's is
estimated from round trips: a product lies between the moment its request was sent and the moment its reply came, so
each round trip bounds the offset from both sides, and the tightest bounds of all of them are taken.
"""

from __future__ import annotations

import json
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from msgspec import Struct

from tsqp.errors import InputError
from tsqp.meter import Request, Span

Event = dict[str, Any]

_MAIN = 1
_FIRST_IN_FLIGHT = 10
# Shorter gaps between two spans are Python's own time, too short to see.
_SHORTEST_NS = 2000
# What the enclave does once it has the product of a group.
_AFTER = {
    "embedding": "norm",
    "qkv": "attention",
    "o": "residual sum, norm",
    "gate_up": "SwiGLU",
    "down": "residual sum, norm",
    "head": "logits",
}


class Recording(Struct, frozen=True, kw_only=True):
    """What one prefill's recorder wrote down, and when the prefill began and ended; the enclave's clock."""

    began_ns: int
    ended_ns: int
    spans: list[Span]
    requests: list[Request]


def clock_offset(requests: Sequence[Request]) -> int:
    """Return what to add to the worker's times so that they are the enclave's, in nanoseconds.

    Clocks that drift during a prefill, or a worker that errs, leave no offset that fits every round trip; then the
    middle of the crossed bounds is taken.
    """
    bounds = [
        (request.sent_ns - request.started_ns, request.arrived_ns - request.compute_ns - request.started_ns)
        for request in requests
        if request.started_ns and request.arrived_ns
    ]
    if not bounds:
        return 0
    low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
    # One clock for both, as on one machine, needs no correction.
    return 0 if low <= 0 <= high else (low + high) // 2


def micro_batch_of(operations: Sequence[str]) -> list[int]:
    """Return which micro-batch each request belongs to, counted from 0.

    Micro-batches ask for the same product in their order. Those that want no logits leave before the last layer ends,
    so where a product is asked for less often, it is by the last ones.
    """
    times = Counter(operations)
    parts = max(times.values(), default=0)
    seen: Counter[str] = Counter()
    numbers = []
    for operation in operations:
        numbers.append(parts - times[operation] + seen[operation])
        seen[operation] += 1
    return numbers


def document(recordings: Mapping[str, Recording]) -> dict[str, Any]:
    """Return the JSON object of a trace.

    Args:
        recordings: one per level; each gets an enclave and a worker of its own, and all begin at 0.
    """
    events: list[Event] = []
    for number, (level, recording) in enumerate(recordings.items()):
        enclave, worker = 2 * number + 1, 2 * number + 2
        suffix = f" ({level})" if len(recordings) > 1 else ""
        events += _enclave(recording, enclave, f"enclave{suffix}")
        events += _worker(recording, worker, f"worker{suffix}")
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write(path: Path, recordings: Mapping[str, Recording]) -> None:
    """Write a trace.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(document(recordings)), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}.") from error


def _enclave(recording: Recording, process: int, name: str) -> Iterator[Event]:
    yield _named("process_name", name, process)
    yield _named("thread_name", "enclave", process, _MAIN)
    zero = recording.began_ns
    for span in recording.spans:
        if recording.began_ns <= span.start_ns and span.end_ns <= recording.ended_ns:
            yield _event(span.name, process, _MAIN, (span.start_ns - zero, span.end_ns - zero))
    for title, start_ns, end_ns in _between(recording):
        yield _event(title, process, _MAIN, (start_ns - zero, end_ns - zero))
    requests = [request for request in recording.requests if request.arrived_ns]
    numbers = micro_batch_of([request.operation for request in requests])
    for number in sorted(set(numbers)):
        yield _named("thread_name", f"in flight, micro-batch {number + 1}", process, _FIRST_IN_FLIGHT + number)
    for request, number in zip(requests, numbers, strict=True):
        track = _FIRST_IN_FLIGHT + number
        yield _event(request.operation, process, track, (request.sent_ns - zero, request.arrived_ns - zero))


def _between(recording: Recording) -> Iterator[tuple[str, int, int]]:
    """Yield what the enclave did between two spans: norms, attention, sums, and sending."""
    outer = _outermost(recording.spans)
    sent = sorted(request.sent_ns for request in recording.requests)
    taken = sorted((request.taken_ns, request.operation) for request in recording.requests if request.taken_ns)
    edges = [(recording.began_ns, recording.began_ns), *outer, (recording.ended_ns, recording.ended_ns)]
    times, gaps = [when for when, _ in taken], list[tuple[int, int, int]]()
    for (_, start_ns), (end_ns, _) in pairwise(edges):
        within = [when for when in sent if start_ns <= when < end_ns]
        middle_ns = within[0] if within else end_ns
        gaps.append((bisect(times, end_ns), start_ns, middle_ns))
        if end_ns - middle_ns >= _SHORTEST_NS:
            yield "send", middle_ns, end_ns
    # Of the gaps between one product and the next the longest is the model's own work, the others are bookkeeping.
    for done, group in groupby(gaps, key=itemgetter(0)):
        every = list(group)
        longest = max(every, key=lambda gap: gap[2] - gap[1])
        for gap in every:
            if gap[2] - gap[1] >= _SHORTEST_NS:
                title = _after(taken[done - 1][1]) if done else "start"
                yield title if gap is longest else "other", gap[1], gap[2]


def _after(operation: str) -> str:
    group = operation.rsplit(maxsplit=1)[-1]
    layer, _, kind = group.rpartition(".")
    return f"{_AFTER.get(kind, 'other')} {layer}".strip()


def _outermost(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Return when spans that lie in no other one begin and end, in order."""
    outer: list[tuple[int, int]] = []
    for span in sorted(spans, key=lambda each: (each.start_ns, -each.end_ns)):
        if not outer or span.start_ns >= outer[-1][1]:
            outer.append((span.start_ns, span.end_ns))
    return outer


def _worker(recording: Recording, process: int, name: str) -> Iterator[Event]:
    """Yield the worker's products, on as many tracks as run at a time."""
    yield _named("process_name", name, process)
    free_ns: list[int] = []
    for request, start_ns, end_ns in _placed(recording.requests):
        track = next((number for number, free in enumerate(free_ns) if free <= start_ns), len(free_ns))
        if track == len(free_ns):
            free_ns.append(0)
            yield _named("thread_name", "products" if not track else f"products, {track + 1}", process, _MAIN + track)
        free_ns[track] = end_ns
        interval = (start_ns - recording.began_ns, end_ns - recording.began_ns)
        yield _event(request.operation, process, _MAIN + track, interval)


def _placed(requests: Sequence[Request]) -> Iterator[tuple[Request, int, int]]:
    """Yield each product, its beginning and its end by the enclave's clock, kept within its request.

    Requests that were multiplied together began at once; each has its share of the time, one after the other.
    """
    offset = clock_offset(requests)
    known = [request for request in requests if request.started_ns and request.arrived_ns]
    before: tuple[int, int] = (-1, 0)
    for request in sorted(known, key=lambda each: (each.started_ns, each.sent_ns)):
        start_ns = request.started_ns + offset
        if request.started_ns == before[0]:
            start_ns = before[1]
        before = (request.started_ns, start_ns + request.compute_ns)
        start_ns = min(max(start_ns, request.sent_ns), request.arrived_ns)
        yield request, start_ns, max(start_ns, min(before[1], request.arrived_ns))


def _event(name: str, process: int, track: int, interval_ns: tuple[int, int]) -> Event:
    start_ns, end_ns = interval_ns
    return {
        "name": name,
        "ph": "X",
        "ts": start_ns / 1e3,
        "dur": (end_ns - start_ns) / 1e3,
        "pid": process,
        "tid": track,
    }


def _named(kind: str, name: str, process: int, track: int = 0) -> Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": track, "args": {"name": name}}
