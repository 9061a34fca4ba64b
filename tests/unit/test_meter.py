"""Costs add up, and are written down one by one only where somebody asked for it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tsqp.meter import Meter, Recorder


def test_a_span_adds_to_its_total() -> None:
    meter = Meter()
    for _ in range(2):
        with meter.span("check"):
            pass
    assert meter.check_ns > 0
    assert meter.protection_ns == meter.check_ns


@pytest.mark.parametrize(("cpu_ns", "ahead_ns", "waited_ns"), [(30, 30, 70), (100, 100, 0), (150, 100, 0)])
def test_what_is_done_while_a_product_is_away_counts_while_it_computes(
    monkeypatch: pytest.MonkeyPatch, cpu_ns: int, ahead_ns: int, waited_ns: int
) -> None:
    """A thread that has no core waits for the worker that has it; two threads take no more than the time."""
    wall, cpu = iter((1000, 1100)), iter((500, 500 + cpu_ns))
    clocks = SimpleNamespace(monotonic_ns=lambda: next(wall), process_time_ns=lambda: next(cpu))
    monkeypatch.setattr("tsqp.meter.time", clocks)
    meter = Meter()
    with meter.while_away():
        pass
    assert meter == Meter(ahead_ns=ahead_ns, waited_ns=waited_ns)


def test_what_was_added_since_a_copy_leaves_the_recorder_out() -> None:
    meter = Meter(round_trips=3, recorder=Recorder())
    before = replace(meter)
    meter.round_trips += 2
    assert meter.since(before) == Meter(round_trips=2)
    assert meter.since(before).recorder is None


def test_costs_of_two_runs_add_up_without_their_recorders() -> None:
    both = Meter(round_trips=3, check_ns=1, recorder=Recorder()).plus(Meter(round_trips=2, bytes_sent=5))
    assert both == Meter(round_trips=5, check_ns=1, bytes_sent=5)
    assert both.recorder is None


def test_a_recorder_notes_spans_and_requests() -> None:
    recorder = Recorder()
    meter = Meter(recorder=recorder)
    with meter.span("mask"):
        pass
    recorder.sent(7, "linear head")
    recorder.arrived(7)
    recorder.taken(7, started_ns=5, compute_ns=6)
    recorder.arrived(8)  # of a request from before recording began
    (span,), (request,) = recorder.spans, recorder.requests
    assert (span.name, span.end_ns - span.start_ns >= meter.mask_ns) == ("mask", True)
    assert span.start_ns <= span.end_ns <= request.sent_ns <= request.arrived_ns <= request.taken_ns
    assert (request.operation, request.started_ns, request.compute_ns) == ("linear head", 5, 6)
