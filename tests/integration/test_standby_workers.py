"""Workers that stand by: whether they could be used is known before, and who is taken when one is lost."""

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


def test_the_least_loaded_of_those_that_answer_is_taken_first(site: Site) -> None:
    first, end = ending(site, "first")
    busy, idle, other = site.host("busy"), site.host("idle"), site.host("other")
    busy.tamper, idle.tamper = with_waiting(7), with_waiting(1)
    other.tamper = lambda _exchange: [[b"no message"]]
    run = site.run("masked", first.address, other.address, busy.address, idle.address)
    until(lambda: run.engine.stats().workers_usable == 3)
    assert run.engine.stats().workers == 4
    end()
    until(lambda: bool(run.notices))
    run.until_ready()
    answer = run.ask()
    assert isinstance(answer.end, Finished)
    assert answer.ids == local_ids(site)
    assert run.notices[-1].startswith(f"serving with worker {idle.address} now.")
    for peer in (busy, other):
        assert {type(sent.header) for sent in list(peer.journal)} <= {messages.Hello, messages.Stats}
    assert run.engine.stats().integrity_failures == 0


def test_who_stands_by_is_asked_again_and_again_and_told_of_nothing(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    first, (second, end) = site.host("first"), ending(site, "second")
    run = site.run("masked", first.address, second.address)
    until(lambda: run.engine.stats().workers_usable == 2)
    asked = len(second.journal)
    assert isinstance(run.ask().end, Finished)
    until(lambda: len(second.journal) > asked + 4)
    assert {type(sent.header) for sent in list(second.journal)} == {messages.Hello, messages.Stats}
    assert all(len(sent.frames) == 1 for sent in list(second.journal))
    end()
    until(lambda: run.engine.stats().workers_usable == 1)
    assert run.engine.stats().ready
    warnings = [record.getMessage() for record in caplog.records if record.name == health.__name__]
    assert warnings  # more than one, if another attempt fails otherwise
    assert all(each.startswith(f"worker {second.address} stands by and cannot be used: ") for each in warnings)
    _, end = ending(site, "second")
    site._stack.callback(end)
    until(lambda: run.engine.stats().workers_usable == 2)
    assert run.notices == []
