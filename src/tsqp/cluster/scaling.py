"""How many workers a pool wants, by how much waits there. No clock and no I/O: times are arguments."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tsqp.errors import ConfigError

# Queues are short-lived: a single look says little.
WINDOW_S = 10.0
# Loading a worker costs minutes for a large model, so it is given up only after it was of no use for long.
IDLE_S = 120.0
# Requests that wait at each worker, on average: above the first one more is started, below the second one ends.
BUSY = 2.0
IDLE = 0.25


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many workers a pool has at least and at most.

    Raises:
        ConfigError: fewer than none, or the least above the most.
    """

    least: int
    most: int

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ConfigError(
                f"between {self.least} and {self.most} workers: expected 0 or more, and the least (--min) at most the "
                "most (--max)."
            )

    def clamped(self, count: int) -> int:
        """Return the nearest number within the bounds."""
        return min(max(count, self.least), self.most)


@dataclass(slots=True)
class Scaler:
    """Decides how many workers are wanted, one step at a time.

    Upwards when more than ``BUSY`` requests waited at each worker over ``WINDOW_S``, downwards when fewer than ``IDLE``
    did over ``IDLE_S``. After a step all that was seen before is forgotten, so that it shows its effect first.
    """

    _seen: deque[tuple[float, float]] = field(default_factory=deque)

    def wanted(self, now_s: float, current: int, waiting: int, ready: int, bounds: Bounds) -> int:
        """Return how many workers are wanted now.

        Args:
            now_s: a clock that never goes back.
            current: how many were wanted until now.
            waiting: requests that wait at all of them together.
            ready: how many of them answer; while fewer than ``current`` do, nothing is concluded.
            bounds: what the result is within.
        """
        if current != bounds.clamped(current):
            self._seen.clear()
            return bounds.clamped(current)
        if ready < current or not current:
            self._seen.clear()
            return current
        self._seen.append((now_s, waiting / ready))
        while len(self._seen) > 1 and self._seen[1][0] <= now_s - IDLE_S:
            self._seen.popleft()
        step = self._step(now_s)
        target = bounds.clamped(current + step)
        if target != current:
            self._seen.clear()
        return target

    def _step(self, now_s: float) -> int:
        since = now_s - self._seen[0][0]
        recent = [load for at, load in self._seen if at >= now_s - WINDOW_S]
        if since >= WINDOW_S and sum(recent) > BUSY * len(recent):
            return 1
        if since >= IDLE_S and sum(load for _, load in self._seen) < IDLE * len(self._seen):
            return -1
        return 0
