"""Several workers compute a step together: the same bits as one, each with secrets of its own, and they may change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from engine_answers import Answer
from hostile import HostilePeer
from sites import LONG_PROMPT, PROMPT, Running, Site, until

from tsqp import loaded
from tsqp.engine.api import Event, Finished, Generation, Sampling
from tsqp.wire import messages

PROMPTS = [PROMPT, PROMPT[3:], LONG_PROMPT, PROMPT[7:20], LONG_PROMPT[5:], PROMPT[:4]]


def answered(run: Running, prompts: Sequence[tuple[int, ...]] = PROMPTS) -> list[list[Event]]:
    """Ask all at once for tokens and their log-probabilities, and return every event."""
    answers = [Answer() for _ in prompts]
    for answer, prompt in zip(answers, prompts, strict=True):
        sampling = Sampling(temperature=0, logprobs=3)
        run.engine.submit(Generation(prompt_ids=prompt, max_tokens=8, sampling=sampling, ignore_end=True), answer.take)
    assert all(isinstance(answer.end, Finished) for answer in answers)
    return [answer.events for answer in answers]


def products(peer: HostilePeer) -> list[bytes]:
    """The words of every product that a peer was sent."""
    return [sent.frames[1] for sent in list(peer.journal) if isinstance(sent.header, messages.LinearExact)]


@pytest.mark.parametrize("level", ["verified", "masked"])
def test_workers_share_each_step_and_change_no_bit(site: Site, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = [site.host(name) for name in "abc"]
    alone = site.run(level, site.host("alone").address)
    expected = answered(alone)
    assert len({str(events) for events in expected}) == len(PROMPTS)  # else a swap could not be seen
    run = site.run(level, *(peer.address for peer in peers))
    run.until_in_use(3)
    compute, together = loaded.run_together, list[int]()

    def noted(work: Any) -> list[Any]:
        together.append(len(work))
        return compute(work)

    monkeypatch.setattr(loaded, "run_together", noted)
    assert answered(run) == expected
    assert together.count(3) >= 7  # of the steps in which every request had a token
    rows = [rows for _, _, rows in run.engine.stats().each_worker]
    assert sum(rows) == sum(map(len, PROMPTS)) + len(PROMPTS) * 7
    assert min(rows) > 0
    if level == "masked":
        sent = [words for peer in peers for words in products(peer)]
        assert len(set(sent)) == len(sent)
        sources = [replica.stepper.pool._source._key.seed() for replica in run.engine._workers._replicas]  # type: ignore[union-attr]
        assert len(set(sources)) == 3


def test_workers_come_and_go_while_requests_run(site: Site) -> None:
    peers = [site.host(name) for name in "abc"]
    run = site.run("masked", peers[0].address)
    undisturbed = [run.ask(tokens=400), run.ask(LONG_PROMPT, tokens=300)]
    assert all(isinstance(answer.end, Finished) for answer in undisturbed)
    workers = run.engine._workers
    settings = [replace(workers._replicas[0].config, worker=peer.address) for peer in peers]
    asked = [run.ask(tokens=400), run.ask(LONG_PROMPT, tokens=300)]
    workers.change(settings)
    run.until_in_use(3)
    until(lambda: all(products(peer) for peer in peers))
    workers.change(settings[1:])
    until(lambda: not workers._leaving)
    before = len(peers[0].journal)
    assert run.engine.stats().workers == 2
    again = run.ask(), run.ask(LONG_PROMPT)
    assert all(isinstance(answer.end, Finished) for answer in again)
    assert all(isinstance(answer.end, Finished) for answer in asked)
    assert [answer.ids for answer in asked] == [answer.ids for answer in undisturbed]
    assert len(peers[0].journal) == before
    assert len(run.engine.stats().each_worker) == 2
