"""Which products of a lane are captured, and which are given up."""

from __future__ import annotations

import pytest
import torch

from tsqp.worker import graphs
from tsqp.worker.graphs import Capturing, Graph, GraphCache


def captured(nbytes: int = 4) -> Graph:
    return Graph(torch.empty(0), torch.empty(nbytes, dtype=torch.uint8), lambda: None)


class Cache(GraphCache):
    """Counts what it captures."""

    def __init__(self, capturing: Capturing | None = None, nbytes: int = 4) -> None:
        super().__init__(capturing or Capturing())
        self.captured, self.nbytes = 0, nbytes

    def use(self, group: str, count: int = 1, times: int = 1) -> int:
        """Use a shape; return how many captures there have been by then."""
        for _ in range(times):
            self.find((group, count), self._capture)
        return self.captured

    def _capture(self) -> Graph:
        self.captured += 1
        return captured(self.nbytes)


def test_a_shape_is_captured_when_it_comes_for_the_third_time() -> None:
    cache = Cache()
    assert [cache.use("a", 2) for _ in range(5)] == [0, 0, 1, 1, 1]
    cache.use("b", 2)
    cache.use("a", 1)
    assert (cache.captured, len(cache)) == (1, 1)


def test_large_shapes_are_not_captured() -> None:
    assert Cache().use("a", graphs.MAX_GRAPH_ROWS + 1, times=9) == 0


def test_the_least_recently_used_graph_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    cache = Cache()
    used = [cache.use(group, times=times) for group, times in (("a", 3), ("b", 3), ("a", 1), ("c", 3))]
    assert used == [1, 2, 2, 3]
    assert len(cache) == 2
    assert [cache.use("a"), cache.use("b", times=2), cache.use("b")] == [3, 3, 4]


def test_graphs_are_bounded_by_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPH_BYTES", 100)
    cache = Cache(nbytes=40)
    for group in "abcd":
        cache.use(group, times=3)
    assert len(cache) == 2
    large = Cache(nbytes=101)
    assert large.use("a", times=9) == 1  # the last one stays, or it would be captured again and again
    assert len(large) == 1
