"""What a worker's sockets take from a client that keeps to no rule, and how long they wait for a silent one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from raw_zmtp import MORE, RawPeer, frame, greeting
from workers import free_port

from tsqp.transport import zeromq_listener as zeromq
from tsqp.transport.client import open_client
from tsqp.transport.keys import KeyPair, ephemeral
from tsqp.transport.server import Server
from tsqp.transport.urls import parse

LIMIT_BYTES = 1 << 22
PATIENCE_S = 60.0
# A peer whose messages nobody takes gives up when it has waited for so long.
BLOCKED_S = 1.0
MESSAGE = frame(bytes(1 << 16))
# After 30 s libzmq lets go by itself.
LESS_THAN_LIBZMQ_S = 25.0
# At the limit of messages that libzmq has by itself.
MANY = 1000

Serve = Callable[..., tuple[Server, str]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(key: KeyPair | None = None) -> tuple[Server, str]:
            address = f"127.0.0.1:{free_port()}"
            server = Server([parse(address)], LIMIT_BYTES, key=key)
            stack.callback(server.close)
            return server, address

        yield start


def test_few_frames_of_a_message_are_kept(serve: Serve) -> None:
    server, address = serve()
    with RawPeer(address) as peer:
        peer.shake_hands().send(frame(b"x", MORE) * 1000, frame(b"x"), frame(b"next"))
        many, following = server.receive(PATIENCE_S), server.receive(PATIENCE_S)
    assert many is not None
    assert following is not None
    assert len(many.frames) == zeromq._KEPT_FRAMES
    assert [bytes(each) for each in following.frames] == [b"next"]


def send_many(peer: RawPeer) -> None:
    for _ in range(MANY):
        peer.send(MESSAGE)


def test_messages_that_nobody_takes_wait_on_the_clients_side(serve: Serve) -> None:
    _, address = serve()
    with RawPeer(address) as peer:
        peer.shake_hands().wait_at_most(BLOCKED_S)
        with pytest.raises(TimeoutError):
            send_many(peer)


def test_who_does_not_finish_a_handshake_is_let_go(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeromq, "_HANDSHAKE_MS", 100)
    _, address = serve()
    with RawPeer(address) as mute, RawPeer(address) as slow:
        slow.send(greeting()[:30])
        for peer in (mute, slow):
            peer.wait_at_most(LESS_THAN_LIBZMQ_S)
        assert mute.is_closed()
        assert slow.is_closed()


def test_who_is_gone_without_a_word_is_let_go(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeromq, "_HEARTBEAT_MS", 50)
    monkeypatch.setattr(zeromq, "_ALIVE_MS", 100)
    _, address = serve()
    with RawPeer(address) as gone:
        gone.shake_hands()
        assert gone.is_closed()


@pytest.mark.parametrize("encrypted", [False, True], ids=["clear", "curve"])
def test_who_is_silent_but_there_is_kept(serve: Serve, monkeypatch: pytest.MonkeyPatch, *, encrypted: bool) -> None:
    monkeypatch.setattr(zeromq, "_HEARTBEAT_MS", 20)
    key = ephemeral() if encrypted else None
    server, address = serve(key)
    client = open_client(parse(address), LIMIT_BYTES, key.public if key else None)
    try:
        for _ in range(3):
            client.send([b"ping"])
            incoming = server.receive(PATIENCE_S)
            assert incoming is not None
            incoming.reply([b"pong"])
            assert [bytes(each) for each in client.receive(PATIENCE_S).private()] == [b"pong"]
            time.sleep(0.2)
    finally:
        client.close()
