"""Which part of a step each worker computes: all of it once, evenly, and no more workers than are worth it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.engine.scheduler import Segment, split
from tsqp.engine.shares import divide, rows_of


def step(*counts: int) -> list[Segment]:
    return [Segment(number, 0, count, (), "none", ()) for number, count in enumerate(counts)]


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 128), min_size=1, max_size=40),
    workers=st.integers(1, 5),
    groups=st.integers(1, 3),
    rows_each=st.integers(1, 40),
)
def test_each_segment_is_computed_once_and_shares_are_even(
    counts: list[int], workers: int, groups: int, rows_each: int
) -> None:
    shares = divide(step(*counts), workers, groups, rows_each)
    numbers = [segment.number for share in shares for group in share for segment in group]
    assert sorted(numbers) == list(range(len(counts)))
    assert all(group for share in shares for group in share)
    assert len(shares) <= workers
    rows = [sum(map(rows_of, share)) for share in shares]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] - rows[-1] <= max(counts)
    assert len(shares) <= max(groups, sum(counts) // rows_each)


def test_one_worker_has_the_groups_that_it_would_have_alone() -> None:
    segments = step(1, 1, 60, 1)
    assert divide(segments, 1, 2, 1) == (split(segments, 2),)
    assert divide(segments, 3, 1, 1000) == (split(segments, 1),)


@pytest.mark.parametrize(
    ("rows", "workers", "groups", "used"),
    [
        (31, 3, 1, 1),  # on this machine's cores: too few to read the weights twice
        (32, 3, 1, 2),
        (48, 3, 1, 3),
        (2, 3, 2, 2),  # elsewhere it is cut in two anyway
        (48, 3, 2, 3),
        (1, 3, 2, 1),
    ],
)
def test_another_worker_is_used_where_it_is_worth_it(rows: int, workers: int, groups: int, used: int) -> None:
    assert len(divide(step(*[1] * rows), workers, groups, 16)) == used


def test_groups_of_one_step_are_spread_over_workers_before_one_has_several() -> None:
    assert [len(share) for share in divide(step(*[1] * 8), 2, 2, 16)] == [1, 1]
    assert [len(share) for share in divide(step(*[1] * 8), 2, 4, 16)] == [2, 2]
    assert [len(share) for share in divide(step(128), 2, 4, 16)] == [1]
