"""The allocator of a region's half."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.transport.spans import FullError, Spans, padded

SIZE = 1024


@given(st.data())
def test_spans_in_use_never_overlap_and_whatever_fits_is_found(data: st.DataObject) -> None:
    spans = Spans(SIZE)
    held: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(1, 60))):
        give_back: bool = data.draw(st.booleans())
        if held and give_back:
            spans.free(*held.pop(data.draw(st.integers(0, len(held) - 1))))
        used = {byte for start, size in held for byte in range(start, start + padded(size))}
        size = data.draw(st.integers(0, 400))
        fitting = [at for at in range(0, SIZE, 64) if not used & set(range(at, at + padded(size)))]
        fitting = [at for at in fitting if at + padded(size) <= SIZE]
        try:
            start = spans.take(size)
        except FullError:
            assert not fitting
            continue
        if size:
            assert start == fitting[0]
        held.append((start, size))
        assert spans.used == sum(padded(size) for _, size in held)


def test_all_of_it_can_be_used_again_and_again() -> None:
    spans = Spans(SIZE)
    for _ in range(3):
        assert spans.take(SIZE) == 0
        with pytest.raises(FullError):
            spans.take(1)
        assert spans.take(0) == 0
        spans.free(0, SIZE)


@given(st.permutations(range(16)))
def test_freed_neighbours_become_one(order: list[int]) -> None:
    spans = Spans(SIZE)
    starts = [spans.take(64) for _ in range(16)]
    for number in order:
        spans.free(starts[number], 64)
    assert spans.take(SIZE) == 0
