"""Timelines: a worker's clock is found, spans nest or do not overlap, products lie within their requests."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import well_formed, worker_within_requests

from tsqp.bench.trace import Recording, clock_offset, document, micro_batch_of, write
from tsqp.errors import InputError
from tsqp.meter import Request, Span

US = 1000


def request(operation: str, sent: int, arrived: int, started: int, compute: int) -> Request:
    """A request in microseconds."""
    return Request(operation, sent * US, arrived * US, arrived * US + 500, started * US, compute * US)


def recording(requests: list[Request], spans: list[Span], end: int = 1000) -> Recording:
    return Recording(began_ns=0, ended_ns=end * US, spans=spans, requests=requests)


@given(
    offset=st.integers(-(10**12), 10**12),
    trips=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(1, 500)), min_size=1),
)
def test_the_offset_puts_every_product_within_its_request(offset: int, trips: list[tuple[int, int, int]]) -> None:
    requests, now = [], 10**13
    for before, after, compute in trips:
        start = now + before
        requests.append(Request("linear x", now, start + compute + after, 0, start - offset, compute))
        now = start + compute + after + 1
    found = clock_offset(requests)
    for each in requests:
        assert each.sent_ns <= each.started_ns + found
        assert each.started_ns + found + each.compute_ns <= each.arrived_ns


def test_one_clock_needs_no_offset() -> None:
    assert clock_offset([request("a", 10, 50, 20, 10)]) == 0
    assert clock_offset([]) == 0


def test_micro_batches_are_told_apart_by_order() -> None:
    """The last one alone goes on to the head."""
    assert micro_batch_of(["a", "b", "a", "b", "head"]) == [0, 0, 1, 1, 1]


def test_a_serial_prefill() -> None:
    requests = [request("linear layers.0.qkv", 100, 200, 120, 60), request("linear layers.0.o", 300, 400, 310, 80)]
    spans = [Span("waiting", 110 * US, 200 * US), Span("waiting", 310 * US, 400 * US)]
    tracks = well_formed(document({"open": recording(requests, spans)}))
    names = [event["name"] for event in tracks[1, 1]]
    assert names == ["start", "send", "waiting", "attention layers.0", "send", "waiting", "residual sum, norm layers.0"]
    assert [(event["ts"], event["dur"]) for event in tracks[2, 1]] == [(120.0, 60.0), (310.0, 80.0)]


def test_products_computed_together_follow_each_other_and_stay_within_their_requests() -> None:
    requests = [request("linear x", 100, 300, 150, 40), request("linear x", 120, 310, 150, 40)]
    tracks = well_formed(document({"masked": recording(requests, [])}))
    products = tracks[2, 1]
    assert [(event["ts"], event["dur"]) for event in products] == [(150.0, 40.0), (190.0, 40.0)]
    assert {track for process, track in tracks if process == 1} == {1, 10, 11}


@given(
    st.lists(
        st.tuples(*[st.integers(0, 10**6)] * 4, st.sampled_from(["linear layers.1.qkv", "linear head", "embedding"])),
        max_size=30,
    )
)
def test_nothing_a_worker_says_makes_a_bad_trace(told: list[tuple[int, int, int, int, str]]) -> None:
    """Its times are for display; whatever they are, its products stay within their requests."""
    requests, spans, now = [], [], 0
    for gap, took, started, compute, operation in told:
        sent = now + gap
        now = sent + took
        requests.append(Request(operation, sent, now, now, started, compute))
        spans.append(Span("waiting", sent, now))
    trace = document({"open": Recording(began_ns=0, ended_ns=now, spans=spans, requests=requests)})
    tracks = well_formed(trace)
    worker_within_requests(tracks, 1, 2)
    for first, second in pairwise(requests):
        assert first.arrived_ns <= second.sent_ns


def test_several_levels_get_processes_of_their_own(tmp_path: Path) -> None:
    one = recording([request("embedding", 1, 5, 2, 1)], [])
    file = tmp_path / "trace.json"
    write(file, {"open": one, "masked": one})
    events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["enclave (open)", "worker (open)", "enclave (masked)", "worker (masked)"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        write(tmp_path, {})
