"""How many workers a pool wants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.cluster.scaling import IDLE_S, WINDOW_S, Bounds, Scaler
from tsqp.errors import ConfigError

BOUNDS = Bounds(1, 3)


def after(waiting: int, seconds: float, current: int = 1, scaler: Scaler | None = None, start: float = 0.0) -> int:
    """Return what is wanted once as much has waited, each second, for so long."""
    scaler = scaler or Scaler()
    at = start
    while at < start + seconds:
        current = scaler.wanted(at, current, waiting * current, current, BOUNDS)
        at += 1.0
    return current


def test_more_are_wanted_once_requests_have_waited_for_a_while() -> None:
    assert after(5, WINDOW_S) == 1
    assert after(5, WINDOW_S + 1) == 2


def test_after_a_step_its_effect_is_waited_for() -> None:
    assert after(5, 2 * WINDOW_S) == 2
    assert after(5, 2 * WINDOW_S + 2) == 3


def test_never_more_than_the_most_nor_fewer_than_the_least() -> None:
    assert after(50, 20 * WINDOW_S) == 3
    assert after(0, 10 * IDLE_S, current=3) == 1


def test_one_goes_only_after_long_idleness() -> None:
    assert after(0, IDLE_S, current=2) == 2
    assert after(0, IDLE_S + 1, current=2) == 1


def test_a_short_burst_changes_nothing() -> None:
    scaler = Scaler()
    assert after(0, 60, scaler=scaler) == 1
    assert after(4, WINDOW_S / 3, scaler=scaler, start=60) == 1


def test_between_the_thresholds_nothing_changes() -> None:
    assert after(1, 10 * IDLE_S, current=2) == 2


def test_while_one_is_missing_nothing_is_concluded() -> None:
    scaler = Scaler()
    for at in range(100):
        assert scaler.wanted(float(at), 2, 50, 1, BOUNDS) == 2


def test_new_bounds_hold_at_once() -> None:
    assert Scaler().wanted(0.0, 5, 0, 5, BOUNDS) == 3
    assert Scaler().wanted(0.0, 0, 0, 0, BOUNDS) == 1


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 1000), st.integers(0, 9)), max_size=50))
def test_the_result_is_within_bounds_and_one_step_away(looks: list[tuple[float, int, int]]) -> None:
    scaler, current, now = Scaler(), 2, 0.0
    for pause, waiting, ready in looks:
        now += pause
        wanted = scaler.wanted(now, current, waiting, ready, BOUNDS)
        assert abs(wanted - current) <= 1
        assert BOUNDS.least <= wanted <= BOUNDS.most
        current = wanted


@pytest.mark.parametrize("bounds", [(-1, 2), (3, 2)])
def test_bounds_that_exclude_everything_are_refused(bounds: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="--min"):
        Bounds(*bounds)
