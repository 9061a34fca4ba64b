"""Where files go, and that nobody else can enter the directory of a run's sockets."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

import pytest

from tsqp.errors import SetupError
from tsqp.paths import cache_directory, private_socket_directory


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TSQP_CACHE", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_the_cache_follows_tsqp_then_xdg_then_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_directory() == tmp_path / "home/.cache/tsqp"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg/tsqp"
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "own/deep"))
    assert cache_directory() == tmp_path / "own/deep"
    assert (tmp_path / "own/deep").is_dir()
    assert cache_directory() == tmp_path / "own/deep"


def test_a_cache_that_cannot_be_made_names_the_directory_and_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(SetupError, match=r"file/cache: Not a directory. Set TSQP_CACHE"):
        cache_directory()


@pytest.mark.parametrize("runtime", [None, "missing", "runtime"])
def test_the_socket_directory_is_fresh_and_private(
    runtime: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "runtime").mkdir(mode=0o700)
    if runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / runtime))
    with private_socket_directory() as first, private_socket_directory() as second:
        assert first != second
        assert first.parent == (tmp_path / "runtime" if runtime == "runtime" else tmp_path)
        assert stat.S_IMODE(first.stat().st_mode) == 0o700
        assert list(first.iterdir()) == []
        (first / "worker").touch()
    assert not first.exists()


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o704, 0o777])
def test_a_runtime_directory_open_to_others_is_refused(
    mode: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    runtime.chmod(mode)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    refused = pytest.raises(SetupError, match=rf"mode {mode:04o}\): expected owner \d+, mode 0700")
    with refused, private_socket_directory():
        pass
    assert list(runtime.iterdir()) == []


def test_a_runtime_directory_of_someone_else_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setattr("os.getuid", lambda: runtime.stat().st_uid + 1)
    with pytest.raises(SetupError, match="not private to you"), private_socket_directory():
        pass
