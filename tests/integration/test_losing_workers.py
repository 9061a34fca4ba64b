"""An engine whose worker is lost, hangs or lies: who waits, who leaves, and what shows while nothing runs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from attacks.test_over_sockets import HostileServer
from hostile import Exchange, HostilePeer, honest
from sites import LIE, LONG_PROMPT, Site, local_ids, secrets_of, until

from tsqp.enclave.mask_pool import MaskPool
from tsqp.engine import loop
from tsqp.engine.api import Failed, Finished
from tsqp.engine.loop import GenerationEngine
from tsqp.engine.scheduler import Scheduler
from tsqp.errors import IntegrityError, InternalError, TransportError
from tsqp.transport.keys import ephemeral
from tsqp.wire import messages


@pytest.mark.parametrize("how", ["lies", "lost"])
def test_who_waits_has_used_no_peer_and_is_answered_by_the_next_worker(site: Site, how: str) -> None:
    first, second = (site.host() if how == "lies" else None), site.start("masked")
    lost = "" if first else site.start("masked")
    run = site.run("masked", first.address if first else lost, second, max_running=1)
    runs = run.ask(tokens=400)
    until(lambda: len(runs.ids) > 2)
    waits = [run.ask(), run.ask(LONG_PROMPT)]
    assert run.engine.stats().queued == 2
    if first:
        first.tamper = LIE
    else:
        site.kill(lost)
    if first:
        assert isinstance(runs.end, Failed)
        assert runs.end.begun
        assert isinstance(runs.error, IntegrityError)
    else:
        assert isinstance(runs.end, Finished)
    assert all(isinstance(answer.end, Finished) for answer in waits)
    assert [answer.ids for answer in waits] == [local_ids(site), local_ids(site, LONG_PROMPT)]


@pytest.mark.parametrize("how", ["lies", "lost"])
def test_who_waits_is_told_where_no_worker_is_left(site: Site, how: str) -> None:
    only = site.host() if how == "lies" else None
    address = only.address if only else site.start("verified")
    run = site.run("verified", address, max_running=1)
    runs = run.ask(tokens=400)
    until(lambda: len(runs.ids) > 2)
    waits = run.ask()
    assert run.engine.stats().queued == 1
    if only:
        only.tamper = LIE
    else:
        site.kill(address)
    assert isinstance(runs.end, Failed)
    assert (runs.end.begun, "no usable worker" in str(runs.error)) == (True, False)
    assert isinstance(waits.end, Failed)
    assert not waits.end.begun
    assert type(waits.error) is (IntegrityError if only else TransportError)
    assert "no usable worker is left" in str(waits.error)
    assert not waits.events[:-1]
    stats = run.engine.stats()
    assert (stats.running, stats.queued, stats.blocks_free) == (0, 0, stats.blocks_total)


def test_a_bug_that_lets_nobody_start_ends_who_waits(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    run = site.run("local")

    def broken(_scheduler: Scheduler) -> None:
        raise ValueError("words of a prompt")

    monkeypatch.setattr(Scheduler, "plan", broken)
    asked = run.ask()
    assert isinstance(asked.error, InternalError)
    monkeypatch.undo()
    assert isinstance(run.ask().end, Finished)


@pytest.mark.parametrize("level", ["open", "verified", "masked"])
@pytest.mark.parametrize("how", ["dead", "hanging"])
def test_the_loss_of_a_worker_shows_while_nothing_runs(site: Site, level: str, how: str) -> None:
    only = site.start(level)
    run = site.run(level, only)
    before = run.ask()
    assert isinstance(before.end, Finished)
    (site.kill if how == "dead" else site.stop)(only)
    run.until_nobody_is_left("for now", only)
    if how == "dead":
        site.start(level, only)
    else:
        site.resume(only)
    run.until_ready()
    after = run.ask()
    assert isinstance(after.end, Finished)
    assert after.ids == before.ids


def test_looking_costs_no_worker_that_answers_its_link(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_LOOK_S", 0.01)
    only = site.host("only")
    run = site.run("masked", only.address)
    before = run.ask()
    assert isinstance(before.end, Finished)
    received = len(only.journal)

    def slow(exchange: Exchange) -> list[Any]:
        threading.Event().wait(0.2)
        return honest(exchange)

    only.tamper = slow
    until(lambda: len(only.journal) > received + 10)
    only.tamper = honest
    assert {type(sent.header) for sent in list(only.journal)[received:]} == {messages.Hello}
    assert run.engine.stats().ready
    assert run.notices == []  # as there are where a link is opened again
    after = run.ask()
    assert isinstance(after.end, Finished)
    assert after.ids == before.ids
    assert run.engine.stats().seconds["enclave"] > 0  # what looking waited for is no part of a step


def use_masks(engine: GenerationEngine) -> None:
    """Let the pool be filled again, while nothing runs."""
    assert engine.stepper.pool is not None
    with engine.stepper.paused():
        engine.stepper.pool.take("head", 2)


def test_what_a_dealer_sends_while_nothing_runs_shows(site: Site) -> None:
    worker, key = site.host("worker"), ephemeral()
    dealer = HostilePeer(f"ipc://{site._directory}/dealer", site.material.dispatcher("masks"))
    site._stack.callback(HostileServer(dealer, dealer.address, key).close)
    dealers: dict[str, Any] = {"dealers": (dealer.address,), "dealer_keys": (key.public.decode(),)}
    run = site.run("masked", worker.address, **dealers)
    until(lambda: run.engine.stats().pool_held == run.engine.stats().pool_wanted)
    dealer.tamper = lambda _exchange: [[b"no message"]]
    use_masks(run.engine)
    reason = run.until_nobody_is_left()
    assert "for now" not in reason
    assert dealer.address in reason
    assert run.engine.stats().integrity_failures == 1


def test_a_bug_in_filling_the_pool_shows_and_all_is_opened_anew(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    run = site.run("masked", site.host("worker").address)
    until(lambda: run.engine.stats().pool_held == run.engine.stats().pool_wanted)
    before = secrets_of(run.engine)
    fill = MaskPool.fill_step

    def broken(_pool: MaskPool) -> None:
        monkeypatch.setattr(MaskPool, "fill_step", fill)
        raise ValueError("words of a prompt")

    monkeypatch.setattr(MaskPool, "fill_step", broken)
    use_masks(run.engine)
    until(lambda: len(run.notices) == 2)
    assert run.notices[0] == "filling the mask pool failed (ValueError)."
    run.until_ready()
    assert secrets_of(run.engine)[1] != before[1]
    until(lambda: run.engine.stats().pool_held == run.engine.stats().pool_wanted)
    assert isinstance(run.ask().end, Finished)


HANGING: dict[str, Any] = {"request_timeout_s": 600000.0}


@pytest.mark.parametrize("level", ["open", "masked"])
def test_a_worker_that_hangs_is_not_waited_for_once_all_have_left(site: Site, level: str) -> None:
    """Its answer, when it goes on, confuses nobody."""
    only = site.start(level)
    run = site.run(level, only, **HANGING)
    before = run.ask()
    assert isinstance(before.end, Finished)
    left = run.ask(tokens=400)
    until(lambda: len(left.ids) > 2)
    site.stop(only)
    run.engine.cancel(left.number)
    stats = run.engine.stats()
    assert (stats.running, stats.blocks_free) == (0, stats.blocks_total)
    assert isinstance(left.end, Finished)
    assert left.end.reason == "cancelled"
    run.until_nobody_is_left("for now", only)
    site.resume(only)
    run.until_ready()
    after = run.ask()
    assert isinstance(after.end, Finished)
    assert after.ids == before.ids


def test_who_leaves_while_a_worker_hangs_frees_blocks_and_others_get_their_answers(site: Site) -> None:
    only = site.start("masked")
    run = site.run("masked", only, **HANGING)
    left, stays = run.ask(tokens=400), run.ask(LONG_PROMPT, tokens=40)
    until(lambda: len(stays.ids) > 2)
    site.stop(only)
    free = run.engine.stats().blocks_free
    run.engine.cancel(left.number)
    assert run.engine.stats().blocks_free > free
    came = run.ask()  # takes the blocks that the step may still write to
    assert run.engine.stats().queued == 1
    site.resume(only)
    assert isinstance(stays.end, Finished)
    assert isinstance(came.end, Finished)
    assert run.engine.stats().integrity_failures == 0
    local = site.run("local")
    alone = local.ask(LONG_PROMPT, tokens=40), local.ask()
    assert all(isinstance(answer.end, Finished) for answer in alone)
    assert [stays.ids, came.ids] == [answer.ids for answer in alone]


@pytest.mark.parametrize("level", ["open", "masked"])
def test_an_engine_whose_worker_hangs_can_be_closed(site: Site, level: str) -> None:
    only = site.start(level)
    run = site.run(level, only, **HANGING)
    asked = run.ask(tokens=400)
    until(lambda: len(asked.ids) > 2)
    site.stop(only)
    run.engine.close(drain_s=0.5)
    assert isinstance(asked.end, Finished)
    assert asked.end.reason == "cancelled"
    assert not run.engine._thread.is_alive()
