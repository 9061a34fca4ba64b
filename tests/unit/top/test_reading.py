"""Rates are differences of two readings; parts are shares of the time between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tsqp.errors import AbsentPeerError, IntegrityError, TransportClosedError, TransportError, TsqpError
from tsqp.reports import TopReport
from tsqp.top.reading import Reading, follows, report, shares
from tsqp.top.watch import watch

EARLIER = Reading(
    kind="worker",
    software="tsqp 3",
    model="tiny",
    serves="open",
    device="cuda:0",
    dtype="float32",
    uptime_s=10.0,
    requests={"linear": 100, "embedding": 10},
    counters={"rows": 1000, "bytes_in": 5000, "bytes_out": 7000, "products": 50, "product_requests": 100},
    parts={"computing": 2.0, "copying": 1.0},
    waiting=1,
    errors=3,
)
LATER = replace(
    EARLIER,
    uptime_s=14.0,
    requests={"linear": 180, "embedding": 10, "linearchain": 8},
    counters={"rows": 3000, "bytes_in": 45000, "bytes_out": 7000, "products": 60, "product_requests": 130},
    parts={"computing": 4.0, "copying": 1.5},
    waiting=7,
    waiting_bytes=99,
    errors=5,
)


def test_rates_are_by_the_peers_own_clock() -> None:
    found = report("here", EARLIER, LATER)
    assert found.interval_s == 4.0
    assert found.requests_per_s == 22.0
    assert found.requests_by_kind_per_s == {"linear": 20.0, "embedding": 0.0, "linearchain": 2.0}
    assert (found.rows_per_s, found.bytes_in_per_s, found.bytes_out_per_s) == (500.0, 10000.0, 0.0)
    assert (found.tokens_per_s, found.prompt_tokens_per_s) == (None, None)
    assert found.batch == 3.0
    assert found.parts == {"computing": 0.5, "copying": 0.125, "idle": 0.375}
    assert (found.url, found.waiting, found.waiting_bytes, found.errors, found.device) == ("here", 7, 99, 5, "cuda:0")


def test_without_a_product_there_is_no_batch() -> None:
    assert report("here", EARLIER, replace(EARLIER, uptime_s=11.0)).batch == 0.0


def test_parts_of_several_products_at_once_leave_nothing_idle() -> None:
    assert shares({"computing": 1.0}, {"computing": 7.0}, 2.0) == {"computing": 3.0, "idle": 0.0}


def test_what_goes_on_beside_leaves_the_whole_time() -> None:
    found = shares({}, {"worker": 1.0, "mask_fill": 2.0}, 2.0)
    assert found == {"worker": 0.5, "mask_fill": 1.0, "idle": 0.5}


def test_a_part_that_is_new_counts_from_nothing_and_none_shrinks() -> None:
    assert shares({"wire": 2.0}, {"check": 1.0, "wire": 1.0}, 4.0) == {"check": 0.25, "wire": 0.0, "idle": 0.75}


@pytest.mark.parametrize(
    "change",
    [
        {"uptime_s": 9.0},
        {"uptime_s": 10.0},
        {"requests": {"linear": 99, "embedding": 10}},
        {"requests": {"embedding": 10}},
        {"counters": {**LATER.counters, "rows": 999}},
    ],
    ids=str,
)
def test_another_process_is_told_by_its_counts(change: dict[str, Any]) -> None:
    assert follows(EARLIER, LATER)
    assert not follows(EARLIER, replace(LATER, **change))


class Peer:
    """A source of given readings and errors, and a clock that only sleep moves."""

    def __init__(self, *events: Reading | TsqpError) -> None:
        self.events = list(events)
        self.slept: list[float] = []
        self.url = "there"

    def read(self) -> Reading:
        event = self.events.pop(0)
        if isinstance(event, TsqpError):
            raise event
        return event

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def close(self) -> None: ...

    def watched(self, count: int) -> list[TopReport | TsqpError]:
        found = watch(self, 2.0, self.sleep)
        return [next(found) for _ in range(count)]


def later(seconds: float) -> Reading:
    return replace(LATER, uptime_s=LATER.uptime_s + seconds)


def test_each_interval_is_reported() -> None:
    peer = Peer(EARLIER, LATER, later(2), later(5))
    reports = peer.watched(3)
    assert [each.interval_s for each in reports if isinstance(each, TopReport)] == [4.0, 2.0, 3.0]
    assert len(peer.slept) == 3
    assert all(0 < each <= 2.0 for each in peer.slept)


@pytest.mark.parametrize("error", [TransportClosedError("gone."), AbsentPeerError("nobody.")])
def test_a_peer_that_was_never_there_is_an_error(error: TsqpError) -> None:
    with pytest.raises(type(error)):
        Peer(error).watched(1)


@pytest.mark.parametrize("error", [TransportClosedError("gone."), AbsentPeerError("nobody.")])
def test_a_peer_that_goes_is_asked_until_it_is_back(error: TsqpError) -> None:
    """The first reading after that counts from nowhere: rates need two."""
    reports = Peer(EARLIER, LATER, error, error, later(9), later(11)).watched(5)
    assert [type(each) for each in reports] == [TopReport, type(error), type(error), TransportError, TopReport]
    assert isinstance(reports[-1], TopReport)
    assert reports[-1].interval_s == 2.0


def test_a_peer_that_starts_anew_between_two_readings_is_noticed() -> None:
    young = replace(EARLIER, uptime_s=1.0, requests={}, counters={})
    reports = Peer(EARLIER, LATER, young, replace(LATER, uptime_s=2.0)).watched(3)
    assert "there has started anew" in str(reports[1])
    assert isinstance(reports[2], TopReport)
    assert reports[2].requests_per_s == 198.0


def test_a_peer_that_lies_ends_the_watch() -> None:
    peer = Peer(EARLIER, LATER, IntegrityError("no."))
    watching: Callable[[], object] = lambda: peer.watched(2)  # noqa: E731
    with pytest.raises(IntegrityError):
        watching()
