"""What every timeline of ``tsqp bench`` must be."""

from __future__ import annotations

import json
from typing import Any

Event = dict[str, Any]

_ROUNDING_US = 1e-6


def well_formed(trace: dict[str, Any]) -> dict[tuple[int, int], list[Event]]:
    """Check a trace's form; return its spans by process and track. Spans of a track nest or do not overlap."""
    trace = json.loads(json.dumps(trace))
    tracks: dict[tuple[int, int], list[Event]] = {}
    named = set()
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M")
        if event["ph"] == "M":
            named.add((event["name"], event["pid"], event["tid"]))
            continue
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    for (process, track), events in tracks.items():
        assert ("thread_name", process, track) in named
        assert ("process_name", process, 0) in named
        events.sort(key=lambda event: (event["ts"], -event["dur"]))
        open_until: list[float] = []
        for event in events:
            while open_until and open_until[-1] <= event["ts"] + _ROUNDING_US:
                open_until.pop()
            end = event["ts"] + event["dur"]
            assert not open_until or end <= open_until[-1] + _ROUNDING_US, event
            open_until.append(end)
    return tracks


def worker_within_requests(tracks: dict[tuple[int, int], list[Event]], enclave: int, worker: int) -> int:
    """Check that each of the worker's products lies within a request of its name; return how many there are."""
    flights = [
        event for (process, track), events in tracks.items() if process == enclave and track > 1 for event in events
    ]
    products = [event for (process, _), events in tracks.items() if process == worker for event in events]
    for product in products:
        assert any(
            flight["name"] == product["name"]
            and flight["ts"] <= product["ts"] + _ROUNDING_US
            and product["ts"] + product["dur"] <= flight["ts"] + flight["dur"] + _ROUNDING_US
            for flight in flights
        ), product
    return len(products)
