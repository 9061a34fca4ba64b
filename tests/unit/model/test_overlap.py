"""Micro-batches: how a batch is cut, whose turn it is, and what happens when one fails."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import load_llama, random_ids
from torch import Tensor

from tsqp.errors import TransportError
from tsqp.model.llama import Llama
from tsqp.model.overlap import MicroBatch, Part, Pending, Team, in_turns, micro_batches, teams_in_turns


@given(batch=st.integers(1, 9), tokens=st.integers(1, 40), count=st.integers(1, 50))
def test_parts_cover_every_token_once_and_come_in_order(batch: int, tokens: int, count: int) -> None:
    seen = torch.zeros(batch, tokens, dtype=torch.int64)
    for part in micro_batches(batch, tokens, count):
        rows = seen[part.sequences]
        assert rows[:, : part.first].all(), "the tokens before come first"
        rows[:, part.first : part.end] += 1
    assert (seen == 1).all()


@given(batch=st.integers(1, 9), tokens=st.integers(1, 40), count=st.integers(1, 50))
def test_there_are_at_most_as_many_parts_as_asked_for_and_none_is_empty(batch: int, tokens: int, count: int) -> None:
    parts = micro_batches(batch, tokens, count)
    assert len(parts) <= count
    assert len(parts) > count // 2 or len(parts) > batch * tokens // 2 or len(parts) >= min(batch, count)
    assert all(part.first < part.end and part.sequences.start < part.sequences.stop for part in parts)


def test_sequences_are_cut_first() -> None:
    assert micro_batches(4, 10, 2) == [MicroBatch(slice(0, 2), 0, 10), MicroBatch(slice(2, 4), 0, 10)]
    assert micro_batches(1, 10, 2) == [MicroBatch(slice(0, 1), 0, 5), MicroBatch(slice(0, 1), 5, 10)]
    first = [MicroBatch(slice(0, 1), 0, 5), MicroBatch(slice(1, 2), 0, 5)]
    assert micro_batches(2, 10, 4)[:2] == first


@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (5, 0), (0, 0)])
def test_of_nothing_there_are_no_parts(batch: int, tokens: int) -> None:
    """Who runs them says what is wrong."""
    assert micro_batches(batch, tokens, 3) == []


class Log:
    """Parts that note what is asked for and collected."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.abandoned = 0

    def ask(self, name: str) -> Pending:
        self.events.append(f"ask {name}")
        return partial(self._collect, name)

    def _collect(self, name: str) -> Tensor:
        self.events.append(f"collect {name}")
        if name.endswith("!"):
            raise ValueError(name)
        if name.endswith("?"):
            raise TransportError(name)
        return torch.tensor(float(len(self.events)))

    def part(self, *names: str) -> Part[str]:
        for name in names:
            assert isinstance((yield self.ask(name)), Tensor)
        return names[0]

    def abandon(self) -> None:
        self.abandoned += 1


def test_every_part_asks_before_anything_is_collected_and_the_first_stays_ahead() -> None:
    log = Log()
    assert in_turns([log.part("a1", "a2"), log.part("b1", "b2", "b3")], log.abandon) == ["a1", "b1"]
    assert log.events == [
        "ask a1", "ask b1", "collect a1", "ask a2", "collect b1", "ask b2", "collect a2", "collect b2", "ask b3",
        "collect b3",
    ]  # fmt: skip
    assert not log.abandoned


def test_what_fails_abandons_the_others_once() -> None:
    log = Log()
    with pytest.raises(ValueError, match="b1!"):
        in_turns([log.part("a1", "a2"), log.part("b1!", "b2"), log.part("c1")], log.abandon)
    assert log.abandoned == 1
    assert log.events[-1] == "collect b1!"


def test_every_team_asks_before_anything_is_collected() -> None:
    log, other = Log(), Log()
    other.events = log.events
    teams = [Team([log.part("a1", "a2"), log.part("b1")], log.abandon), Team([other.part("c1", "c2")], other.abandon)]
    assert teams_in_turns(teams) == [["a1", "b1"], ["c1"]]
    assert log.events == [
        "ask a1", "ask c1", "ask b1", "collect a1", "ask a2", "collect c1", "ask c2", "collect b1", "collect a2",
        "collect c2",
    ]  # fmt: skip
    assert (log.abandoned, other.abandoned) == (0, 0)


def test_a_team_that_fails_is_over_and_the_others_go_on() -> None:
    log, other = Log(), Log()
    teams = [
        Team([log.part("a1?", "a2"), log.part("b1", "b2")], log.abandon),
        Team([other.part("c1", "c2"), other.part("d1")], other.abandon),
    ]
    failed, done = teams_in_turns(teams)
    assert isinstance(failed, TransportError)
    assert done == ["c1", "d1"]
    assert (log.abandoned, other.abandoned) == (1, 0)
    assert log.events == ["ask a1?", "ask b1", "collect a1?"]


def test_a_bug_ends_every_team() -> None:
    log, other = Log(), Log()
    with pytest.raises(ValueError, match="a1!"):
        teams_in_turns([Team([log.part("a1!")], log.abandon), Team([other.part("b1", "b2")], other.abandon)])
    assert (log.abandoned, other.abandoned) == (1, 1)


def test_a_part_that_asks_for_nothing_has_a_result() -> None:
    def nothing() -> Part[str]:
        yield from ()
        return "done"

    assert in_turns([nothing()], lambda: None) == ["done"]


@pytest.fixture
def model(tiny_llama: Path) -> Llama:
    return load_llama(tiny_llama)


@pytest.mark.parametrize("parts", [2, 3, 4, 6, 64])
def test_a_chunk_needs_no_product_that_comes_later(model: Llama, parts: int) -> None:
    """Each part's products are asked for in the order of the layers, a chunk's after those of the chunk before it."""
    asked: list[str] = []
    ask = model._ops.linear

    def linear(group: str, x_MK: Tensor) -> Pending:
        asked.append(group)
        return ask(group, x_MK)

    model._ops.linear = linear  # type: ignore[method-assign]
    model.prefill(random_ids(2, 16), parts=parts)
    chunks = max(1, min(16, parts // 2))
    assert asked.count("layers.0.qkv") == 2 * chunks
    assert asked.count("layers.2.o") == 2, "only the last chunk goes on after the last layer's keys and values"
    assert asked.count("head") == 2
