"""Workers are asked how they are, beside their work: who is given most, and who is lost while nothing runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from attacks.test_over_sockets import HostileServer
from hostile import Exchange, HostilePeer, honest
from sites import Site, local_ids, until

from tsqp.engine import health
from tsqp.engine.api import Finished
from tsqp.wire import messages


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_CHECK_S", 0.05)


def ending(site: Site, name: str) -> tuple[HostilePeer, Callable[[], None]]:
    """Serve a worker in this process, until what is returned is called."""
    peer = HostilePeer(f"ipc://{site._directory}/{name}", site.material.dispatcher())
    server = HostileServer(peer, peer.address)

    def end() -> None:
        with suppress(ValueError):
            server.close()

    return peer, end


def with_waiting(count: int) -> Callable[[Exchange], list[Any]]:
    """Answer honestly, but for how many requests wait."""

    def answer(exchange: Exchange) -> list[Any]:
        if not isinstance(exchange.request, messages.Stats):
            return honest(exchange)
        stats = messages.StatsResult(
            id=exchange.request.id,
            uptime_s=1.0,
            requests={},
            errors=0,
            bytes_received=0,
            bytes_sent=0,
            compute_s=0.0,
            waiting=count,
        )
        return [[messages.encode(stats)]]

    return answer


def test_who_has_least_to_do_computes_what_is_not_divided(site: Site) -> None:
    busy, idle = site.host("busy"), site.host("idle")
    busy.tamper, idle.tamper = with_waiting(7), with_waiting(1)
    run = site.run("masked", busy.address, idle.address)
    run.until_in_use(2)
    until(lambda: [replica.waiting for replica in run.engine._workers._replicas] == [7, 1])
    received = len(busy.journal)
    answer = run.ask()
    assert isinstance(answer.end, Finished)
    assert answer.ids == local_ids(site)
    assert {type(sent.header) for sent in list(busy.journal)[received:]} <= {messages.Hello, messages.Stats}
    idle.tamper = with_waiting(8)
    until(lambda: [replica.waiting for replica in run.engine._workers._replicas] == [7, 8])
    received = len(idle.journal)
    assert run.ask().end == answer.end
    assert {type(sent.header) for sent in list(idle.journal)[received:]} <= {messages.Hello, messages.Stats}


def test_workers_are_asked_again_and_again_and_told_of_nothing(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    first, (second, end) = site.host("first"), ending(site, "second")
    run = site.run("masked", first.address, second.address)
    run.until_in_use(2)
    assert isinstance(run.ask().end, Finished)
    asked = len(second.journal)
    until(lambda: len(second.journal) > asked + 4)
    assert {type(sent.header) for sent in list(second.journal)[asked:]} == {messages.Hello, messages.Stats}
    assert all(len(sent.frames) == 1 for sent in list(second.journal)[asked:])
    end()
    run.until_in_use(1)
    assert run.engine.stats().ready
    warnings = [record.getMessage() for record in caplog.records if record.name == health.__name__]
    assert warnings  # more than one, if another attempt fails otherwise
    assert all(each.startswith(f"worker {second.address} does not say how it is: ") for each in warnings)
    _, end = ending(site, "second")
    site._stack.callback(end)
    run.until_in_use(2)
    rows = run.engine.stats().each_worker[1][2]
    answers = run.ask(), run.ask()
    assert all(isinstance(answer.end, Finished) for answer in answers)
    assert run.engine.stats().each_worker[1][2] > rows


def test_nonsense_when_asked_is_no_lie(site: Site) -> None:
    first, second = site.host("first"), site.host("second")
    run = site.run("masked", first.address, second.address)
    run.until_in_use(2)

    def nonsense(exchange: Exchange) -> list[Any]:
        return [[b"no message"]] if isinstance(exchange.request, messages.Stats) else honest(exchange)

    second.tamper = nonsense
    run.until_in_use(1)
    assert run.engine.stats().integrity_failures == 0
    second.tamper = honest
    run.until_in_use(2)
