"""Which clients get past the handshake of a worker with an allow-list, and what the others are told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq
from workers import free_port

from tsqp.errors import ConfigError, KeyRefusedError, PeerKeyError, SetupError, TransportTimeoutError
from tsqp.transport.allowing import AllowList
from tsqp.transport.base import ClientTransport
from tsqp.transport.client import open_client
from tsqp.transport.keys import KeyPair, create, ephemeral, load_allowed, load_secret
from tsqp.transport.server import Server
from tsqp.transport.urls import Endpoint, parse

LIMIT_BYTES = 1 << 20
# Far longer than any of these messages takes; only a test that fails waits for it.
PATIENCE_S = 60.0
# Longer than a handshake takes.
A_WHILE_S = 1.0

Connect = Callable[..., ClientTransport]


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=["tcp", "ipc"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Endpoint:
    return parse(f"localhost:{free_port()}" if request.param == "tcp" else f"ipc://{tmp_path}/worker")


@pytest.fixture
def key() -> KeyPair:
    return ephemeral()


@pytest.fixture
def known() -> KeyPair:
    return ephemeral()


@pytest.fixture
def server(closing: ExitStack, endpoint: Endpoint, key: KeyPair, known: KeyPair) -> Server:
    server = Server([endpoint], LIMIT_BYTES, key=key, allowed=frozenset((ephemeral().public, known.public)))
    closing.callback(server.close)
    return server


@pytest.fixture
def connect(closing: ExitStack, endpoint: Endpoint) -> Connect:
    def open_one(key: bytes, own: KeyPair | None = None) -> ClientTransport:
        client = open_client(endpoint, LIMIT_BYTES, key, own)
        closing.callback(client.close)
        return client

    return open_one


def exchange(client: ClientTransport, server: Server) -> None:
    client.send([b"ping"])
    incoming = server.receive(PATIENCE_S)
    assert incoming is not None
    incoming.reply([b"pong"])
    assert [bytes(frame) for frame in client.receive(PATIENCE_S).private()] == [b"pong"]


def test_who_holds_a_key_of_the_list_is_served(server: Server, key: KeyPair, known: KeyPair, connect: Connect) -> None:
    for _ in range(2):  # two links with one key at once
        exchange(connect(key.public, known), server)


@pytest.mark.parametrize("has_own", [False, True], ids=["fresh key", "other key"])
def test_anybody_else_is_refused_in_the_handshake_and_told_why(
    server: Server, key: KeyPair, known: KeyPair, connect: Connect, *, has_own: bool
) -> None:
    stranger = connect(key.public, ephemeral() if has_own else None)
    stranger.send([b"ping"])
    with pytest.raises(KeyRefusedError, match=rf"{stranger.peer} lets only those in .*--own-key.*Nothing was sent"):
        stranger.receive(PATIENCE_S)
    assert server.receive(0) is None
    exchange(connect(key.public, known), server)


def test_a_key_of_the_list_does_not_make_up_for_the_wrong_worker(
    server: Server, known: KeyPair, connect: Connect
) -> None:
    client = connect(ephemeral().public, known)
    with pytest.raises(PeerKeyError):
        client.receive(PATIENCE_S)
    assert server.receive(0) is None


def test_where_nobody_answers_for_the_list_nobody_is_let_in(
    server: Server, key: KeyPair, known: KeyPair, connect: Connect
) -> None:
    """As libzmq has it by default, everybody would be."""
    (listener,) = server._listeners
    listener._allow_list.close()  # type: ignore[attr-defined]
    client = connect(key.public, known)
    client.send([b"ping"])
    with pytest.raises((PeerKeyError, TransportTimeoutError)):
        client.receive(A_WHILE_S)
    assert server.receive(0) is None


def test_a_list_without_a_key_is_refused(endpoint: Endpoint, known: KeyPair) -> None:
    with pytest.raises(ConfigError, match=r"an allow-list .* \(--key\)"):
        Server([endpoint], LIMIT_BYTES, allowed=frozenset((known.public,)))


def test_an_own_key_is_not_shown_on_a_link_in_clear(endpoint: Endpoint, known: KeyPair, closing: ExitStack) -> None:
    server = Server([endpoint], LIMIT_BYTES)
    closing.callback(server.close)
    client = open_client(endpoint, LIMIT_BYTES, own=known)
    closing.callback(client.close)
    exchange(client, server)


def test_a_list_is_read_from_files_and_texts(tmp_path: Path) -> None:
    public, secret = create(tmp_path, "enclave")
    pair, other = load_secret(secret), ephemeral().public
    assert load_allowed([str(public), other.decode()]) == frozenset((pair.public, other))
    assert load_allowed([]) is None
    with pytest.raises(SetupError, match="a key file does not exist"):
        load_allowed(["", str(public)])


def test_closing_twice_does_no_harm_and_nothing_is_logged(known: KeyPair, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), zmq.Context() as context:
        guard = AllowList(context, frozenset((known.public,)))
        assert guard.callback("tsqp", known.public)
        assert not guard.callback("tsqp", ephemeral().public)
        guard.close()
        guard.close()
    assert not caplog.records
