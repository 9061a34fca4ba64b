"""Regions that dead workers left in /dev/shm go when another is made; nobody else's do."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from dead_workers import leave_region

from tsqp import doctor
from tsqp.errors import SetupError
from tsqp.transport import named
from tsqp.transport.liveness import own_identity
from tsqp.transport.named import NamedRegion
from tsqp.transport.urls import Endpoint

LIMIT_BYTES = 1 << 16


def region(path: Path) -> NamedRegion:
    return NamedRegion(Endpoint("shm", path=str(path)), LIMIT_BYTES)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A region that a dead worker left. Not in /dev/shm: other workers of this user clear up there."""
    path = tmp_path / "left"
    leave_region(path, LIMIT_BYTES)
    return path


def remains(left: Path) -> bool:
    """Make and close a region of another name; tell whether the one that was left is still there."""
    region(left.with_name("new")).close()
    return left.exists()


def write_word(path: Path, at: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(8 * at)
        file.write(value.to_bytes(8, "little"))


def test_a_region_that_a_dead_worker_left_goes_when_one_of_another_name_is_made(left: Path) -> None:
    size = left.stat().st_blocks * 512
    assert size >= named.shape_for(LIMIT_BYTES).total
    assert list(named.left_regions(left.parent)) == [(left, size)]
    (check,) = doctor._left_regions(left.parent)
    assert (check.status, check.found) == ("note", f"{left} (2 MB)")
    assert not remains(left)
    assert list(left.parent.iterdir()) == []


def test_the_doctor_says_nothing_where_nothing_was_left(tmp_path: Path) -> None:
    assert doctor._left_regions(tmp_path) == []
    assert doctor._left_regions(tmp_path / "missing") == []


def of_another_namespace(path: Path) -> None:
    write_word(path, named.IDENTITY + 2, own_identity().namespace + 1)


def of_a_live_process(path: Path) -> None:
    """Without a lock, as where there are none."""
    own = own_identity()
    for at, value in enumerate((own.pid, own.start, own.namespace), named.IDENTITY):
        write_word(path, at, value)


def of_no_magic(path: Path) -> None:
    write_word(path, named._MAGIC_WORD, 1)


def of_another_layout(path: Path) -> None:
    """Who owned it may be written elsewhere."""
    write_word(path, named._LAYOUT_WORD, named._LAYOUT + 1)


def open_to_others(path: Path) -> None:
    path.chmod(0o644)


@pytest.mark.parametrize(
    "change", [of_another_namespace, of_a_live_process, of_no_magic, of_another_layout, open_to_others]
)
def test_what_may_be_in_use_or_is_none_of_ours_stays(left: Path, change: Callable[[Path], None]) -> None:
    change(left)
    assert list(named.left_regions(left.parent)) == []
    assert remains(left)


def test_what_is_locked_stays(left: Path) -> None:
    with left.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert remains(left)
    assert not remains(left)


def test_what_another_user_left_stays(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert remains(left)


def test_a_live_worker_keeps_its_region(tmp_path: Path) -> None:
    live = region(tmp_path / "live")
    assert remains(tmp_path / "live")
    live.close()


def test_a_name_cannot_be_taken_while_what_was_left_there_is_removed(left: Path) -> None:
    """Else the region of a new worker would be."""
    for path, _ in named.left_regions(left.parent):
        with pytest.raises(SetupError, match="already in use"):
            region(path)
    region(left).close()
