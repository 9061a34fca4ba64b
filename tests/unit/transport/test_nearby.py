"""Where a worker without an address is found by its user's enclaves, and by nobody else's trick."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from dead_workers import leave_socket

from tsqp.errors import SetupError
from tsqp.paths import user_socket_directory
from tsqp.transport.nearby import find_nearby, make_nearby
from tsqp.transport.server import Server
from tsqp.transport.urls import Endpoint

PORT = 4711
LIMIT_BYTES = 1 << 16


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    return tmp_path


def made() -> Endpoint:
    endpoint = make_nearby(PORT)
    assert endpoint is not None
    return endpoint


def test_a_worker_is_found_by_its_port_while_it_listens(runtime: Path) -> None:
    assert find_nearby(PORT) is None
    assert not (runtime / "tsqp").exists()
    endpoint = made()
    assert endpoint.url == f"shm://{runtime}/tsqp/worker-{PORT}"
    assert stat.S_IMODE((runtime / "tsqp").stat().st_mode) == 0o700
    assert find_nearby(PORT) is None
    server = Server([endpoint], LIMIT_BYTES)
    assert find_nearby(PORT) == endpoint
    assert find_nearby(PORT + 1) is None
    server.close()
    assert find_nearby(PORT) is None


def test_a_socket_that_a_killed_worker_left_is_nobody() -> None:
    endpoint = made()
    leave_socket(endpoint.url)
    assert Path(endpoint.path).is_socket()
    assert find_nearby(PORT) is None
    Server([endpoint], LIMIT_BYTES).close()


def test_without_a_runtime_directory_it_is_the_temporary_one_and_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert made().path == f"{tmp_path}/tsqp-{os.getuid()}/worker-{PORT}"


def _open_to_others(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o750)


def _a_link(directory: Path) -> None:
    (directory.parent / "elsewhere").mkdir(mode=0o700)
    directory.symlink_to(directory.parent / "elsewhere")


def _a_file(directory: Path) -> None:
    directory.touch(0o600)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (_open_to_others, r"\(directory, owner \d+, mode 0750\)"),
        (_a_link, r"\(link or file, owner \d+, mode 0777\)"),
        (_a_file, r"\(link or file, owner \d+, mode 0600\)"),
    ],
)
def test_a_directory_that_is_not_private_is_refused_by_both_sides(
    make: Callable[[Path], None], found: str, runtime: Path
) -> None:
    make(runtime / "tsqp")
    sentence = f"/tsqp is not private to you {found}: expected a directory of owner {os.getuid()}, mode 0700. Remove"
    for side in (make_nearby, find_nearby):
        with pytest.raises(SetupError, match=sentence):
            side(PORT)


def test_a_directory_of_another_user_is_refused_by_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    user_socket_directory().mkdir(mode=0o700)
    for side in (make_nearby, find_nearby):
        with pytest.raises(SetupError, match=rf"owner {owner}, mode 0700\): expected a directory of owner {owner + 1}"):
            side(PORT)


def test_where_none_can_be_made_the_reason_is_said(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(SetupError, match=rf"make the directory {re.escape(str(runtime))}/tsqp: Permission denied. Set"):
        make_nearby(PORT)


def test_a_system_without_such_sockets_has_no_shared_memory_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> socket.socket:
        raise OSError(errno.EPROTONOSUPPORT, os.strerror(errno.EPROTONOSUPPORT))

    made()
    monkeypatch.setattr("tsqp.transport.nearby.socket.socket", refused)
    with pytest.raises(SetupError, match="no UNIX sockets that keep messages apart"):
        make_nearby(PORT)
    assert find_nearby(PORT) is None
