"""Steps whose worker is lost are computed again: by whom, how often, and with which masks."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hostile import Exchange, HostilePeer, honest
from sites import LIE, LONG_PROMPT, Site, until

from tsqp import loaded
from tsqp.engine.active import MOST_REPEATS
from tsqp.engine.api import Failed, Finished
from tsqp.errors import IntegrityError, TransportClosedError, TransportError
from tsqp.wire import messages

TOKENS = 20


def withholding(peer: HostilePeer) -> threading.Event:
    """Let a worker not answer one product of a layer in the middle; set once it did not."""
    withheld = threading.Event()

    def withhold(exchange: Exchange) -> list[Any]:
        if exchange.group != "layers.1.qkv" or withheld.is_set():
            return honest(exchange)
        withheld.set()
        return []

    peer.tamper = withhold
    return withheld


def words(peer: HostilePeer) -> list[bytes]:
    return [sent.frames[1] for sent in list(peer.journal) if isinstance(sent.header, messages.LinearExact)]


@pytest.mark.parametrize("how", ["same", "another"])
def test_a_step_that_is_lost_half_done_is_computed_again_with_fresh_masks(site: Site, how: str) -> None:
    first, second = site.host("first"), site.host("second")
    addresses = [first.address] if how == "same" else [first.address, second.address]
    run = site.run("masked", *addresses, retries=0, request_timeout_s=4.0)
    run.until_in_use(len(addresses))
    asked = [run.ask(tokens=TOKENS), run.ask(LONG_PROMPT, tokens=TOKENS)]
    until(lambda: all(len(answer.ids) > 2 for answer in asked))
    withheld = withholding(first)
    assert all(isinstance(answer.end, Finished) for answer in asked)
    assert withheld.is_set()
    alone = site.run("local")
    undisturbed = [alone.ask(tokens=TOKENS), alone.ask(LONG_PROMPT, tokens=TOKENS)]
    assert [answer.end for answer in asked] == [answer.end for answer in undisturbed]
    assert [answer.ids for answer in asked] == [answer.ids for answer in undisturbed]
    sent = words(first) + words(second)
    assert len(set(sent)) == len(sent)
    assert bool(words(second)) == (how == "another")


def test_a_step_is_computed_again_a_bounded_number_of_times(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    run = site.run("verified", site.host("only").address)
    before = run.ask()
    assert isinstance(before.end, Finished)
    tries: list[int] = []

    def lost(work: list[Any]) -> list[Any]:
        tries.append(len(work))
        return [TransportClosedError("the link is gone.") for _ in work]

    monkeypatch.setattr(loaded, "run_together", lost)
    asked = run.ask()
    assert isinstance(asked.end, Failed)
    assert isinstance(asked.error, TransportError)
    assert asked.end.begun
    assert len(tries) == 1 + MOST_REPEATS
    monkeypatch.undo()
    run.until_ready()
    assert run.ask().end == before.end


def test_after_a_wrong_product_no_step_is_computed_again(site: Site) -> None:
    """Not even where the step before was lost, and another worker is there."""
    first, second = site.host("first"), site.host("second")
    run = site.run("masked", first.address, second.address, retries=0, request_timeout_s=4.0)
    run.until_in_use(2)
    asked = run.ask(tokens=400)
    until(lambda: len(asked.ids) > 2)
    withheld = withholding(first)
    until(withheld.is_set)
    second.tamper = LIE
    assert isinstance(asked.error, IntegrityError)
    assert second.address in str(asked.error)
    assert run.engine.stats().integrity_failures == 1
