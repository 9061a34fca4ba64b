"""What counts as a worker's memory, which limit it has, and what it says. That it ends: test_worker_limits.py."""

from __future__ import annotations

import logging
import mmap
import os
import resource
from pathlib import Path

import pytest

from tsqp.errors import ConfigError
from tsqp.worker import limits
from tsqp.worker.limits import Limits, watched

SIZE = 64 << 20
# What the rest of the process may take or give back meanwhile.
SLACK = 16 << 20


def filled(flags: int) -> mmap.mmap:
    memory = mmap.mmap(-1, SIZE, flags=flags | mmap.MAP_ANONYMOUS)
    for at in range(0, SIZE, mmap.PAGESIZE):
        memory[at] = 1
    return memory


def test_memory_of_its_own_counts_and_shared_memory_does_not() -> None:
    watch = Limits(None, 1 << 20)
    before = watch.own_bytes()
    with filled(mmap.MAP_SHARED):
        assert abs(watch.own_bytes() - before) < SLACK
    with filled(mmap.MAP_PRIVATE):
        assert abs(watch.own_bytes() - before - SIZE) < SLACK


def test_by_default_there_is_room_for_eight_messages_or_4_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plenty:
        available = 1 << 50

    monkeypatch.setattr("psutil.virtual_memory", Plenty)
    for message, room in ((1 << 30, 8 << 30), (1 << 20, 4 << 30)):
        with watched(None, message) as watch:
            watch.loaded()
            assert watch.memory_bytes is not None
            assert abs(watch.memory_bytes - watch.own_bytes() - room) < SLACK


def test_no_more_than_the_machine_has_is_allowed() -> None:
    with watched(None, 1 << 40) as watch:
        watch.loaded()
        assert watch.memory_bytes is not None
        assert watch.memory_bytes < os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE


def test_a_limit_that_the_model_alone_passes_is_refused() -> None:
    with (
        watched(1 << 20, 1 << 20) as watch,
        pytest.raises(ConfigError, match="--memory-limit 1048576: the model alone"),
    ):
        watch.loaded()
    with watched(1 << 40, 1 << 20) as watch:
        watch.loaded()
        assert watch.memory_bytes == 1 << 40


def test_where_memory_is_not_told_a_limit_is_refused_and_none_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(limits, "_STATM", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="does not tell a process's memory"):
        Limits(1 << 40, 1 << 20)
    with watched(None, 1 << 20) as watch:
        watch.loaded()
        assert watch.memory_bytes is None


def test_that_no_descriptor_is_left_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with caplog.at_level(logging.WARNING):
        assert limits._tell_descriptors(told=False) is False
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            assert limits._tell_descriptors(told=False) is True
            assert limits._tell_descriptors(told=True) is True
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert limits._tell_descriptors(told=True) is False
    (record,) = caplog.records
    assert "no file descriptor is left" in record.getMessage()
