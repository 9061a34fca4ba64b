"""Waiting awake: what is ready is told, and memory is read meanwhile, but never beyond its end."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tsqp.arith import extension
from tsqp.transport import spinning

needs_extension = pytest.mark.skipif(extension.module is None, reason="the native extension is not built")


class Memory:
    """Spans to read, one after the other."""

    def __init__(self, *sizes: int) -> None:
        self.tensors = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        self.read = 0

    def span(self) -> tuple[int, int]:
        if not self.tensors:
            return 0, 0
        return self.tensors[0].data_ptr() + self.read, len(self.tensors[0]) - self.read

    def fetched(self, size: int) -> None:
        self.read += size
        assert self.read <= len(self.tensors[0])
        if self.read == len(self.tensors[0]):
            del self.tensors[0]
            self.read = 0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture(params=["native", "python"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(extension, "module", None)
    elif extension.module is None:
        pytest.skip("the native extension is not built")


@pytest.mark.usefixtures("_way")
def test_what_is_ready_is_told(pipe: tuple[int, int]) -> None:
    assert spinning.spin((pipe[0],), 0.001) == []
    os.write(pipe[1], b"x")
    assert spinning.spin((pipe[0],), 60.0) == [pipe[0]]


@pytest.mark.usefixtures("_way")
def test_the_end_of_a_peer_is_told(pipe: tuple[int, int]) -> None:
    other = os.pipe()
    os.close(other[1])
    assert spinning.spin((pipe[0], other[0]), 60.0) == [other[0]]
    os.close(other[0])


@needs_extension
def test_memory_is_read_meanwhile_span_by_span(pipe: tuple[int, int]) -> None:
    memory = Memory(100, 1 << 20, 1)
    assert spinning.spin((pipe[0],), 0.5, memory) == []
    assert not memory.tensors


@needs_extension
def test_a_descriptor_that_is_ready_ends_the_reading(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"x")
    memory = Memory(1 << 26)
    assert spinning.spin((pipe[0],), 60.0, memory) == [pipe[0]]
    assert memory.read == 0


def test_more_descriptors_than_the_extension_takes_are_polled_all_the_same(pipe: tuple[int, int]) -> None:
    others = [os.dup(pipe[0]) for _ in range(100)]
    os.write(pipe[1], b"x")
    assert spinning.spin(tuple(others), 60.0) == others
    for each in others:
        os.close(each)


@needs_extension
def test_who_steps_aside_leaves_its_core_and_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed, core = os.sched_getaffinity(0), spinning.core() - 1
    asked: list[set[int]] = []
    monkeypatch.setattr(spinning, "core", lambda: core + 1)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _thread, cores: asked.append(set(cores)))
    spinning.step_aside()
    assert asked == ([allowed - {core}, allowed] if len(allowed) > 1 else [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _thread: {core})
    del asked[:]
    spinning.step_aside()
    assert not asked, "there is nowhere to go"


@pytest.mark.usefixtures("_way")
def test_cores_are_counted_from_one_and_unknown_without_the_extension() -> None:
    cores = {each + 1 for each in os.sched_getaffinity(0)}
    assert spinning.core() in (cores if extension.module else {0})
