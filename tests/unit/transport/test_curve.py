"""Encrypted links: what crosses the wire, who is refused, and what a person is told."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from tsqp.errors import ConfigError, PeerKeyError, TransportClosedError, TransportTimeoutError
from tsqp.transport import zeromq
from tsqp.transport.base import ClientTransport, Incoming
from tsqp.transport.client import open_client
from tsqp.transport.keys import KeyPair, ephemeral
from tsqp.transport.server import Server
from tsqp.transport.urls import Endpoint, parse
from tsqp.wire import codec

LIMIT_BYTES = 1 << 24
# Far longer than any of these messages takes; only a test that fails waits for it.
PATIENCE_S = 20.0
# Longer than several attempts of libzmq to connect again.
SEVERAL_TRIES_S = 1.0
PATTERN = bytes(range(256)) * 4

Serve = Callable[..., Server]
Connect = Callable[..., ClientTransport]


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def key() -> KeyPair:
    return ephemeral()


@pytest.fixture(params=["tcp", "ipc"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Endpoint:
    return parse(f"localhost:{free_port()}" if request.param == "tcp" else f"ipc://{tmp_path}/worker")


@pytest.fixture
def serve(closing: ExitStack) -> Serve:
    def open_server(*endpoints: Endpoint, key: KeyPair | None = None, limit_bytes: int = LIMIT_BYTES) -> Server:
        server = Server(endpoints, limit_bytes, key=key)
        closing.callback(server.close)
        return server

    return open_server


@pytest.fixture
def connect(closing: ExitStack) -> Connect:
    def open_one(endpoint: Endpoint, key: bytes | None = None, limit_bytes: int = LIMIT_BYTES) -> ClientTransport:
        client = open_client(endpoint, limit_bytes, key)
        closing.callback(client.close)
        return client

    return open_one


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def receive(server: Server) -> Incoming:
    incoming = server.receive(PATIENCE_S)
    assert incoming is not None
    return incoming


def exchange(client: ClientTransport, server: Server, payload: bytes = b"ping") -> None:
    """Prove that the link works both ways."""
    client.send([payload])
    incoming = receive(server)
    assert bytes(incoming.frames[0]) == payload
    incoming.reply([payload[::-1]])
    assert [bytes(frame) for frame in client.receive(PATIENCE_S).private()] == [payload[::-1]]


@contextlib.contextmanager
def wiretap(target: int) -> Iterator[tuple[Endpoint, bytearray]]:
    """Forward connections to a tcp port of this machine; yield the address to use and all bytes of both directions."""
    recorded = bytearray()
    open_sockets: list[socket.socket] = []

    def forward(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                recorded.extend(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", target))
                open_sockets.extend((near, far))
                for ends in ((near, far), (far, near)):
                    threads.append(threading.Thread(target=forward, args=ends))
                    threads[-1].start()

    listener = socket.create_server(("127.0.0.1", 0))
    threads = [threading.Thread(target=accept, args=(listener,))]
    threads[0].start()
    try:
        yield parse(f"127.0.0.1:{listener.getsockname()[1]}"), recorded
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        threads[0].join()
        for each in open_sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for each in open_sockets:
            each.close()


@contextlib.contextmanager
def tunnel_to_nowhere() -> Iterator[Endpoint]:
    """Accept connections and close them, as a tunnel or a container's proxy does while nothing runs behind it."""

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                listener.accept()[0].close()

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=accept, args=(listener,))
    thread.start()
    try:
        yield parse(f"127.0.0.1:{listener.getsockname()[1]}")
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_messages_cross_both_ways(endpoint: Endpoint, key: KeyPair, serve: Serve, connect: Connect) -> None:
    server = serve(endpoint, key=key)
    clients = [connect(endpoint, key.public) for _ in range(2)]
    for client in clients:
        exchange(client, server)
        exchange(client, server, PATTERN)


def test_a_client_may_start_before_its_worker(endpoint: Endpoint, key: KeyPair, serve: Serve, connect: Connect) -> None:
    client = connect(endpoint, key.public)
    exchange(client, serve(endpoint, key=key))


def test_large_tensors_cross_both_ways(endpoint: Endpoint, key: KeyPair, serve: Serve, connect: Connect) -> None:
    server, client = serve(endpoint, key=key), connect(endpoint, key.public)
    x = torch.arange(LIMIT_BYTES // 4, dtype=torch.float32)
    client.send([b"header", codec.frame_of(x), b""])
    incoming = receive(server)
    assert torch.equal(codec.tensor_of(codec.spec_of(x), incoming.frames[1]), x)
    assert len(incoming.frames[2]) == 0
    incoming.reply([b"reply", codec.frame_of(-x)])
    _, frame = client.receive(PATIENCE_S).private()
    assert torch.equal(codec.tensor_of(codec.spec_of(x), frame), -x)


def test_the_limit_on_a_frame_is_the_same_as_in_clear(
    endpoint: Endpoint, key: KeyPair, serve: Serve, connect: Connect
) -> None:
    """Encryption makes a frame longer; the limit is on what is inside."""
    limit = 1 << 16
    server, client = serve(endpoint, key=key, limit_bytes=limit), connect(endpoint, key.public, limit)
    exchange(client, server, bytes(limit))
    client.send([bytes(limit + 1)])
    with pytest.raises(TransportClosedError):
        client.receive(PATIENCE_S)
    generous = connect(endpoint, key.public, limit)
    exchange(generous, server)
    generous.send([b"question"])
    receive(server).reply([bytes(limit + 1)])
    with pytest.raises(TransportClosedError):
        generous.receive(PATIENCE_S)


@pytest.mark.parametrize("encrypted", [False, True], ids=["clear", "curve"])
def test_the_wire_shows_a_message_only_in_clear(
    key: KeyPair, serve: Serve, connect: Connect, *, encrypted: bool
) -> None:
    port = free_port()
    server = serve(parse(f"127.0.0.1:{port}"), key=key if encrypted else None)
    with wiretap(port) as (tapped, recorded):
        client = connect(tapped, key.public if encrypted else None)
        exchange(client, server, PATTERN)
        client.close()
    windows = [PATTERN[start : start + 16] for start in range(0, len(PATTERN), 16)]
    if encrypted:
        assert len(recorded) > 2 * len(PATTERN)
        assert not any(window in recorded or window[::-1] in recorded for window in windows)
    else:
        assert PATTERN in recorded
        assert PATTERN[::-1] in recorded


def test_each_connection_has_a_key_of_its_own(
    key: KeyPair, endpoint: Endpoint, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[KeyPair] = []

    def watched() -> KeyPair:
        made.append(ephemeral())
        return made[-1]

    monkeypatch.setattr(zeromq, "ephemeral", watched)
    server = serve(endpoint, key=key)
    for _ in range(2):
        exchange(connect(endpoint, key.public), server)
    assert len({pair.public for pair in made}) == 2


def test_another_key_than_the_workers_is_refused(
    endpoint: Endpoint, key: KeyPair, serve: Serve, connect: Connect
) -> None:
    server, client = serve(endpoint, key=key), connect(endpoint, ephemeral().public)
    client.send([PATTERN])
    with pytest.raises(PeerKeyError, match=f"{client.peer} does not hold the key .* check --worker-key") as caught:
        client.receive(PATIENCE_S)
    assert caught.value.exit_code == 5
    assert server.receive(0) is None
    exchange(connect(endpoint, key.public), server)


def test_a_peer_that_speaks_in_clear_is_refused_and_gets_nothing(key: KeyPair, serve: Serve, connect: Connect) -> None:
    port = free_port()
    server = serve(parse(f"127.0.0.1:{port}"))
    with wiretap(port) as (tapped, recorded):
        client = connect(tapped, key.public)
        client.send([PATTERN])
        with pytest.raises(PeerKeyError, match="does not hold the key that was given, or speaks without encryption"):
            client.receive(PATIENCE_S)
        client.close()
    assert recorded
    assert PATTERN[:16] not in recorded
    assert server.receive(0) is None


def test_a_client_in_clear_is_told_that_a_key_is_needed(
    endpoint: Endpoint, key: KeyPair, serve: Serve, connect: Connect
) -> None:
    server, client = serve(endpoint, key=key), connect(endpoint)
    client.send([PATTERN])
    with pytest.raises(ConfigError, match=f"{client.peer} wants an encrypted link: give its public key"):
        client.receive(PATIENCE_S)
    assert server.receive(0) is None
    exchange(connect(endpoint, key.public), server)


def test_a_key_holds_on_every_endpoint(key: KeyPair, serve: Serve, connect: Connect, tmp_path: Path) -> None:
    endpoints = [parse(f"127.0.0.1:{free_port()}"), parse(f"ipc://{tmp_path}/worker")]
    server = serve(*endpoints, key=key)
    for endpoint in endpoints:
        client = connect(endpoint)
        client.send([b"in clear"])
        with pytest.raises(ConfigError, match="wants an encrypted link"):
            client.receive(PATIENCE_S)
        exchange(connect(endpoint, key.public), server)


@pytest.mark.parametrize("encrypted", [False, True], ids=["clear", "curve"])
def test_a_tunnel_to_nowhere_is_not_taken_for_a_wrong_key(key: KeyPair, connect: Connect, *, encrypted: bool) -> None:
    with tunnel_to_nowhere() as endpoint:
        client = connect(endpoint, key.public if encrypted else None)
        client.send([b"anyone?"])
        with pytest.raises(TransportTimeoutError, match="did not answer"):
            client.receive(SEVERAL_TRIES_S)
        client.close()


@contextlib.contextmanager
def hasty_worker() -> Iterator[Endpoint]:
    """Want a key, and close before a client's library can read that, but answer who asks how links are secured."""

    def meet(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(0.2)  # a library sends a signature of 10 bytes and waits for ours
                    with contextlib.suppress(TimeoutError):
                        connection.recv(12, socket.MSG_WAITALL)
                        connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(52, b"\0"))
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=meet, args=(listener,), daemon=True)
        thread.start()
        yield parse(f"127.0.0.1:{listener.getsockname()[1]}")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_worker_that_closes_at_once_is_asked_whether_it_wants_a_key(connect: Connect) -> None:
    with hasty_worker() as endpoint:
        client = connect(endpoint)
        client.send([PATTERN])
        with pytest.raises(ConfigError, match="wants an encrypted link"):
            client.receive(PATIENCE_S)


def test_a_worker_that_comes_back_with_another_key_is_refused(
    endpoint: Endpoint, key: KeyPair, serve: Serve, connect: Connect
) -> None:
    server, client = serve(endpoint, key=key), connect(endpoint, key.public)
    exchange(client, server)
    server.close()
    with pytest.raises(TransportClosedError):
        client.receive(PATIENCE_S)
    impostor = serve(endpoint, key=ephemeral())
    client.send([PATTERN])
    with pytest.raises(PeerKeyError):
        client.receive(PATIENCE_S)
    assert impostor.receive(0) is None


def test_shared_memory_and_a_key_are_refused_at_both_ends(key: KeyPair, tmp_path: Path) -> None:
    shm, tcp = parse(f"shm://{tmp_path}/worker"), parse(f"127.0.0.1:{free_port()}")
    for open_one in (
        lambda: Server([tcp, shm], LIMIT_BYTES, key=key),
        lambda: open_client(shm, LIMIT_BYTES, key.public),
    ):
        with pytest.raises(ConfigError, match=rf"{shm}: shared memory carries no encryption; with a key use tcp or"):
            open_one()
    assert list(tmp_path.iterdir()) == []
    Server([tcp], LIMIT_BYTES).close()


@pytest.mark.parametrize("bad", [b"", b"short", bytes(32), bytes(40)])
def test_what_is_no_key_is_refused_before_connecting(bad: bytes) -> None:
    with pytest.raises(ConfigError, match="expected 40 of z85"):
        open_client(parse("localhost:1"), LIMIT_BYTES, bad)


def test_a_key_without_a_secret_is_refused(connect: Connect, serve: Serve, key: KeyPair) -> None:
    """The all-zero point, for which anyone could compute the shared secret."""
    endpoint = parse(f"127.0.0.1:{free_port()}")
    serve(endpoint, key=key)
    client = connect(endpoint, b"0" * 40)
    with pytest.raises(PeerKeyError):
        client.receive(PATIENCE_S)
