"""Whose socket an enclave believes in, over ipc and shared memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tsqp.errors import SetupError
from tsqp.transport.base import ClientTransport
from tsqp.transport.client import open_client
from tsqp.transport.keys import ephemeral
from tsqp.transport.server import Server
from tsqp.transport.urls import Endpoint, parse

LIMIT_BYTES = 1 << 20
PATIENCE_S = 60.0


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "here"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture(params=["ipc", "shm"])
def endpoint(request: pytest.FixtureRequest, directory: Path) -> Endpoint:
    return parse(f"{request.param}://{directory}/worker")


def greet(endpoint: Endpoint, closing: ExitStack, key: bytes | None = None) -> ClientTransport:
    """Connect and send a first message, whose answer is not taken yet."""
    client = open_client(endpoint, LIMIT_BYTES, key)
    closing.callback(client.close)
    client.send([b"hello"])
    return client


def answered(server: Server) -> None:
    incoming = server.receive(PATIENCE_S)
    assert incoming is not None
    incoming.reply([b"welcome"])


def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be another user than the one who made the socket and its directory."""
    monkeypatch.setattr("os.getuid", lambda: os.geteuid() + 1)


Spoil = Callable[[Path, pytest.MonkeyPatch], None]
SPOILT: dict[str, tuple[Spoil, str]] = {
    "mode": (lambda socket, _: socket.chmod(0o660), r"is not yours alone \(owner \d+, mode 0660\)"),
    "owner": (lambda _, patch: foreign(patch), "is not yours alone"),
    "directory": (lambda socket, _: socket.parent.chmod(0o770), r"others could put a socket .*mode 0770"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=list(SPOILT))
def test_a_socket_that_is_not_this_users_alone_is_not_believed(
    endpoint: Endpoint, spoil: Spoil, message: str, closing: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server([endpoint], LIMIT_BYTES)
    closing.callback(server.close)
    spoil(Path(endpoint.path), monkeypatch)
    if endpoint.scheme == "shm":
        with pytest.raises(SetupError, match=message):
            greet(endpoint, closing)
        assert server.receive(0) is None
        return
    client = greet(endpoint, closing)
    answered(server)
    with pytest.raises(SetupError, match=message):
        client.receive(PATIENCE_S)


def test_a_worker_with_a_key_may_be_another_users(
    directory: Path, closing: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, key = parse(f"ipc://{directory}/worker"), ephemeral()
    server = Server([endpoint], LIMIT_BYTES, key=key)
    closing.callback(server.close)
    foreign(monkeypatch)
    client = greet(endpoint, closing, key.public)
    answered(server)
    assert [bytes(each) for each in client.receive(PATIENCE_S).private()] == [b"welcome"]


def test_what_a_worker_makes_is_believed_also_in_a_directory_for_all(
    endpoint: Endpoint, directory: Path, closing: ExitStack
) -> None:
    """As /tmp is: others may make files there, and not remove those of others."""
    directory.chmod(0o1777)
    server = Server([endpoint], LIMIT_BYTES)
    closing.callback(server.close)
    client = greet(endpoint, closing)
    answered(server)
    assert [bytes(each) for each in client.receive(PATIENCE_S).private()] == [b"welcome"]
