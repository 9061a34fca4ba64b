"""Real sockets of every transport: both address families, peers that vanish, and messages that are too large."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from contextlib import closing as closed_after
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import zmq

from tsqp.arith import extension
from tsqp.enclave.session import MAX_IN_FLIGHT
from tsqp.errors import SetupError, TransportClosedError, TransportTimeoutError
from tsqp.transport import zeromq_listener as zeromq_module
from tsqp.transport.base import Buffer, ClientTransport, Incoming
from tsqp.transport.client import open_client
from tsqp.transport.server import Server
from tsqp.transport.urls import Endpoint, parse
from tsqp.wire import codec

LIMIT_BYTES = 1 << 22
# Far longer than any of these messages takes; only a test that fails waits for it.
PATIENCE_S = 60.0
SHORT_S = 0.05


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def free_port(host: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@pytest.fixture(params=["tcp", "ipc", "shm", "named"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Endpoint:
    return parse(f"localhost:{free_port()}") if request.param == "tcp" else at_path(request.param, tmp_path)


def at_path(kind: str, tmp_path: Path) -> Endpoint:
    """Return an address with a path: of a socket, or, for ``named``, of a region in /dev/shm."""
    if kind == "named":
        return parse(f"shm:///dev/shm/tsqp-test-{os.getpid()}-{tmp_path.name}")
    return parse(f"{kind}://{tmp_path}/worker")


@pytest.fixture(params=["tcp", "ipc"])
def zeromq(request: pytest.FixtureRequest, tmp_path: Path) -> Endpoint:
    return parse(f"localhost:{free_port()}" if request.param == "tcp" else f"ipc://{tmp_path}/worker")


@pytest.fixture(params=["ipc", "shm"])
def socket_path(request: pytest.FixtureRequest, tmp_path: Path) -> Endpoint:
    return at_path(request.param, tmp_path)


@pytest.fixture(params=["ipc", "shm", "named"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Endpoint:
    return at_path(request.param, tmp_path)


@pytest.fixture
def ipc(tmp_path: Path) -> Endpoint:
    return parse(f"ipc://{tmp_path}/worker")


@pytest.fixture
def serve(closing: ExitStack) -> Callable[..., Server]:
    def open_server(*endpoints: Endpoint, limit_bytes: int = LIMIT_BYTES, hangup_fd: int | None = None) -> Server:
        server = Server(endpoints, limit_bytes, hangup_fd)
        closing.callback(server.close)
        return server

    return open_server


@pytest.fixture
def connect(closing: ExitStack) -> Callable[..., ClientTransport]:
    def open_one(endpoint: Endpoint, limit_bytes: int = LIMIT_BYTES) -> ClientTransport:
        client = open_client(endpoint, limit_bytes)
        closing.callback(client.close)
        return client

    return open_one


Serve = Callable[..., Server]
Connect = Callable[..., ClientTransport]


def receive(server: Server) -> Incoming:
    incoming = server.receive(PATIENCE_S)
    assert incoming is not None
    return incoming


class Memory:
    """Something to read ahead that never ends."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(1 << 16)
        self.read = 0

    def span(self) -> tuple[int, int]:
        return self.tensor.data_ptr(), self.tensor.nbytes

    def fetched(self, size: int) -> None:
        self.read += size


def exchange(client: ClientTransport, server: Server) -> None:
    """Prove that the link works both ways."""
    client.send([b"ping"])
    receive(server).reply([b"pong"])
    assert [bytes(frame) for frame in client.receive(PATIENCE_S).private()] == [b"pong"]


def test_large_tensors_cross_both_ways(endpoint: Endpoint, serve: Serve, connect: Connect) -> None:
    server, client = serve(endpoint), connect(endpoint)
    x = torch.arange(1 << 20, dtype=torch.float32).view(1024, 1024)
    client.send([b"header", codec.frame_of(x), b""])
    incoming = receive(server)
    assert not incoming.legacy
    assert bytes(incoming.frames[0]) == b"header"
    assert torch.equal(codec.tensor_of(codec.spec_of(x), incoming.frames[1]), x)
    assert len(incoming.frames[2]) == 0
    incoming.reply([b"reply", codec.frame_of(-x)])
    reply, frame = client.receive(PATIENCE_S).private()
    assert bytes(reply) == b"reply"
    assert torch.equal(codec.tensor_of(codec.spec_of(x), frame), -x)


def address_of(frame: Buffer) -> int:
    return int(np.frombuffer(frame, np.uint8).ctypes.data)


def test_zeromq_copies_no_large_tensor(
    zeromq: Endpoint, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent is the tensor's own memory, and what comes is libzmq's."""
    sent: list[tuple[bool, int]] = []
    send = zmq.Socket.send_multipart

    def noted(self: zmq.Socket[bytes], frames: Sequence[Buffer], flags: int = 0, *, copy: bool, **more: Any) -> object:
        sent.append((copy, address_of(frames[-1])))
        return send(self, frames, flags, copy, **more)

    monkeypatch.setattr(zmq.Socket, "send_multipart", noted)
    server, client = serve(zeromq), connect(zeromq)
    x = torch.arange(1 << 18, dtype=torch.float32)
    client.send([b"header", codec.frame_of(x)])
    incoming = receive(server)
    incoming.reply([b"reply", codec.frame_of(x)])
    assert sent == [(False, x.data_ptr())] * 2
    for frame in (incoming.frames[1], client.receive(PATIENCE_S).private()[1]):
        assert isinstance(memoryview(frame).obj, zmq.Frame)
        assert codec.tensor_of(codec.spec_of(x), frame).data_ptr() == address_of(frame)


def test_a_message_that_waits_for_its_server_has_not_been_copied(
    zeromq: Endpoint, serve: Serve, connect: Connect
) -> None:
    client = connect(zeromq)
    x = torch.zeros(1 << 18)
    client.send([b"header", codec.frame_of(x)])
    x.fill_(7)
    assert torch.equal(codec.tensor_of(codec.spec_of(x), receive(serve(zeromq)).frames[1]), x)


def test_replies_go_to_the_client_that_asked(endpoint: Endpoint, serve: Serve, connect: Connect) -> None:
    server, clients = serve(endpoint), [connect(endpoint) for _ in range(3)]
    for index, client in enumerate(clients):
        client.send([bytes([index])])
    for incoming in [receive(server) for _ in clients][::-1]:
        incoming.reply([b"for", *incoming.frames])
    for index, client in enumerate(clients):
        assert [bytes(frame) for frame in client.receive(PATIENCE_S).private()] == [b"for", bytes([index])]


def test_one_server_listens_on_several_addresses(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    paths = [parse(f"{kind}://{tmp_path}/{kind}") for kind in ("ipc", "shm")]
    endpoints = [parse(f"127.0.0.1:{free_port()}"), *paths, at_path("named", tmp_path)]
    server = serve(*endpoints)
    for endpoint in endpoints:
        exchange(connect(endpoint), server)


@pytest.mark.parametrize("second", ["tcp", "ipc"])
def test_a_server_that_spins_reads_ahead_and_hears_every_address(
    serve: Serve, connect: Connect, tmp_path: Path, second: str
) -> None:
    shm, other = parse(f"shm://{tmp_path}/shm"), at_path("ipc", tmp_path)
    other = parse(f"localhost:{free_port()}") if second == "tcp" else other
    server, ahead = serve(shm, other), Memory()
    server.ahead = ahead
    clients = [connect(shm), connect(other)]
    for client in clients:
        exchange(client, server)
    server._listeners[0].spin_s = server._listeners[1].spin_s = PATIENCE_S
    for client in (*clients, *clients):
        exchange(clients[0], server)  # after it the server spins
        read = ahead.read
        later = threading.Timer(SHORT_S, client.send, ([b"ping"],))
        later.start()
        receive(server).reply([b"pong"])
        later.join()
        assert ahead.read > read or extension.module is None
        client.receive(PATIENCE_S).release()


def test_ipv6(serve: Serve, connect: Connect) -> None:
    try:
        endpoint = parse(f"[::1]:{free_port('::1')}")
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    exchange(connect(endpoint), serve(endpoint))


def test_a_client_may_start_before_its_worker(zeromq: Endpoint, serve: Serve, connect: Connect) -> None:
    client = connect(zeromq)
    exchange(client, serve(zeromq))


def test_a_req_socket_of_the_first_protocol_is_recognised_and_answered(zeromq: Endpoint, serve: Serve) -> None:
    server = serve(zeromq)
    with zmq.Context() as context, context.socket(zmq.REQ) as client:
        client.setsockopt(zmq.LINGER, 0)
        client.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        client.connect(zeromq.url)
        client.send(b"request")
        incoming = receive(server)
        assert incoming.legacy
        assert [bytes(frame) for frame in incoming.frames] == [b"request"]
        incoming.reply([b"reply"])
        assert client.recv() == b"reply"


def test_a_message_of_one_empty_frame_has_no_frames(ipc: Endpoint, serve: Serve, connect: Connect) -> None:
    server, client = serve(ipc), connect(ipc)
    client.send([b""])
    assert receive(server).frames == ()
    exchange(client, server)


def test_a_timeout_names_the_peer_and_the_seconds(connect: Connect) -> None:
    port = free_port()
    client = connect(parse(f"localhost:{port}"))
    client.send([b"anyone?"])
    with pytest.raises(TransportTimeoutError, match=rf"localhost:{port} did not answer within 0\.05 s"):
        client.receive(SHORT_S)


def test_requests_to_nobody_never_block(connect: Connect) -> None:
    client = connect(parse(f"localhost:{free_port()}"))
    for _ in range(2 * MAX_IN_FLIGHT):
        client.send([b"x"])


def test_a_server_that_hears_nothing_returns_none(path: Endpoint, serve: Serve) -> None:
    server = serve(path)
    assert server.receive(0) is None
    assert server.receive(SHORT_S) is None
    assert not server.hung_up


def test_a_worker_that_goes_away_is_noticed_at_once(endpoint: Endpoint, serve: Serve, connect: Connect) -> None:
    server, client = serve(endpoint), connect(endpoint)
    exchange(client, server)
    server.close()
    with pytest.raises(TransportClosedError, match=f"{client.peer} closed the connection or died"):
        client.receive(PATIENCE_S)


def test_a_reply_to_a_client_that_is_gone_is_dropped(endpoint: Endpoint, serve: Serve, connect: Connect) -> None:
    server, gone, client = serve(endpoint), connect(endpoint), connect(endpoint)
    gone.send([b"question"])
    incoming = receive(server)
    gone.close()
    incoming.reply([b"answer"])
    exchange(client, server)


def test_an_oversized_request_ends_that_connection_only(zeromq: Endpoint, serve: Serve, connect: Connect) -> None:
    server, other, client = serve(zeromq, limit_bytes=1 << 16), connect(zeromq), connect(zeromq)
    exchange(client, server)
    client.send([b"header", bytes((1 << 16) + 1)])
    with pytest.raises(TransportClosedError):
        client.receive(PATIENCE_S)
    assert server.receive(0) is None
    other.send([bytes(1 << 16)])
    assert len(receive(server).frames[0]) == 1 << 16


def test_an_oversized_reply_is_not_received(zeromq: Endpoint, serve: Serve, connect: Connect) -> None:
    server, client = serve(zeromq), connect(zeromq, limit_bytes=1 << 16)
    exchange(client, server)
    client.send([b"question"])
    receive(server).reply([bytes((1 << 16) + 1)])
    with pytest.raises(TransportClosedError):
        client.receive(PATIENCE_S)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SetupError, match=rf"port {port} is already in use on 127\.0\.0\.1.*LLAMA_GPU_PORT"):
            Server([parse(f"127.0.0.1:{port}")], LIMIT_BYTES)


def test_a_path_in_use_is_refused_and_its_owner_undisturbed(path: Endpoint, serve: Serve, connect: Connect) -> None:
    server = serve(path)
    with pytest.raises(SetupError, match=f"{path.url} is already in use by another process"):
        Server([path], LIMIT_BYTES)
    exchange(connect(path), server)


def test_the_socket_file_of_a_dead_worker_is_reused(socket_path: Endpoint, serve: Serve, connect: Connect) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(socket_path.path)
    assert Path(socket_path.path).is_socket()
    server = serve(socket_path)
    exchange(connect(socket_path), server)


def test_a_worker_asks_whether_a_silent_client_is_there(serve: Serve, connect: Connect) -> None:
    """Else a connection whose client's machine has gone would stay for ever."""
    endpoint = parse(f"127.0.0.1:{free_port()}")
    server = serve(endpoint)
    exchange(connect(endpoint), server)
    (accepted,) = (
        each
        for each in psutil.Process().net_connections("tcp")
        if each.laddr.port == endpoint.port and each.status == psutil.CONN_ESTABLISHED
    )
    with socket.socket(fileno=os.dup(accepted.fd)) as connection:
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


def test_nothing_is_left_where_a_server_has_ended(path: Endpoint) -> None:
    with closed_after(Server([path], LIMIT_BYTES)):
        assert Path(path.path).exists()
    assert not Path(path.path).exists()


def test_a_file_that_is_no_socket_is_left_alone(socket_path: Endpoint) -> None:
    Path(socket_path.path).write_text("precious")
    with pytest.raises(SetupError, match=f"cannot listen on {socket_path.url}: a file that is no socket"):
        Server([socket_path], LIMIT_BYTES)
    assert Path(socket_path.path).read_text() == "precious"


def test_only_its_owner_may_use_a_socket(path: Endpoint, serve: Serve) -> None:
    mask = os.umask(0)
    try:
        serve(path)
        assert os.umask(0) == 0
    finally:
        os.umask(mask)
    assert stat.S_IMODE(Path(path.path).stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "address", ["192.0.2.1:50051", "ipc:///no/such/directory/worker", "shm:///no/such/directory/worker"]
)
def test_an_address_that_cannot_be_bound_is_named(address: str) -> None:
    with pytest.raises(SetupError, match=f"cannot listen on {address}"):
        Server([parse(address)], LIMIT_BYTES)


def test_an_address_that_cannot_be_connected_to_is_named() -> None:
    with pytest.raises(SetupError, match="cannot connect to bad host:50051"):
        open_client(parse("bad host:50051"), LIMIT_BYTES)


def test_a_failed_bind_releases_the_addresses_before_it(ipc: Endpoint, serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(SetupError):
        Server([ipc, parse(f"ipc://{tmp_path}/missing/worker")], LIMIT_BYTES)
    serve(ipc)


def test_the_end_of_the_parents_pipe_is_noticed(ipc: Endpoint, serve: Serve) -> None:
    reader, writer = os.pipe()
    try:
        server = serve(ipc, hangup_fd=reader)
        assert server.receive(0) is None
        assert not server.hung_up
        os.close(writer)
        assert server.receive(PATIENCE_S) is None
        assert server.hung_up
    finally:
        os.close(reader)


def test_both_ends_may_be_closed_twice(path: Endpoint) -> None:
    server, client = Server([path], LIMIT_BYTES), open_client(path, LIMIT_BYTES)
    client.send([b"never delivered"])
    for end in (server, client):
        end.close()
        end.close()


def test_replies_on_their_way_leave_before_a_server_closes(endpoint: Endpoint, serve: Serve, connect: Connect) -> None:
    """More of them than there is room for on the way, to a client that begins to read when the server closes."""
    server, client = serve(endpoint), connect(endpoint)
    for number in range(8):
        client.send([bytes([number])])
    incoming = [receive(server) for _ in range(8)]
    client.send([b"not taken in"])
    for number, each in enumerate(incoming):
        each.reply([b"header", bytes([number]) * (LIMIT_BYTES // 4)])
    closing = threading.Thread(target=server.close, args=(PATIENCE_S,))
    closing.start()
    for number in range(8):
        _, frame = client.receive(PATIENCE_S).private()
        assert bytes(frame) == bytes([number]) * (LIMIT_BYTES // 4)
    closing.join()
    with pytest.raises(TransportClosedError):
        client.receive(PATIENCE_S)


def test_replies_that_zeromq_holds_leave_before_a_server_closes(
    zeromq: Endpoint, serve: Serve, closing: ExitStack
) -> None:
    """More than sockets hold."""
    server, deaf = serve(zeromq), Deaf(zeromq, closing)
    deaf.socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
    deaf.socket.send(b"question")
    incoming = receive(server)
    for number in range(16):
        incoming.reply([bytes([number]) * LIMIT_BYTES])
    ending = threading.Thread(target=server.close, args=(PATIENCE_S,))
    ending.start()
    assert [deaf.socket.recv()[0] for _ in range(16)] == list(range(16))
    ending.join()


@pytest.mark.parametrize("kind", ["shm", "named"])
def test_a_message_that_is_not_taken_in_costs_no_reply_to_one_before(
    kind: str, serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    """The kernel resets a connection that is closed with messages unread."""
    endpoint = at_path(kind, tmp_path)
    server, client = serve(endpoint), connect(endpoint)
    client.send([b"question"])
    incoming = receive(server)
    client.send([b"not taken in"])
    incoming.reply([b"answer"])
    server.close()
    assert [bytes(frame) for frame in client.receive(PATIENCE_S).private()] == [b"answer"]
    with pytest.raises(TransportClosedError):
        client.receive(PATIENCE_S)


@pytest.mark.parametrize("kind", ["shm", "named"])
def test_a_full_client_of_shared_memory_is_heard_again_when_it_is_not(
    kind: str, serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    endpoint = at_path(kind, tmp_path)
    server, full, other = serve(endpoint), connect(endpoint), connect(endpoint)
    full.send([b"first"])
    first = receive(server)
    first.client.is_full = True
    full.send([b"second"])
    assert server.receive(SHORT_S) is None
    exchange(other, server)
    first.client.is_full = False
    assert bytes(receive(server).frames[0]) == b"second"


def test_messages_of_one_connection_are_of_one_client(endpoint: Endpoint, serve: Serve, connect: Connect) -> None:
    server, clients = serve(endpoint), [connect(endpoint) for _ in range(2)]
    for client in (*clients, *clients):
        client.send([b"who"])
    heard = [receive(server).client for _ in range(4)]
    assert len(set(heard)) == 2
    assert not any(client.is_gone for client in heard)
    clients[0].close()
    deadline = time.monotonic() + PATIENCE_S
    while not any(client.is_gone for client in heard) and time.monotonic() < deadline:
        server.receive(SHORT_S)
    assert len({client for client in heard if client.is_gone}) == 1


class Deaf:
    """A client over ZeroMQ that sends and does not read."""

    def __init__(self, endpoint: Endpoint, closing: ExitStack) -> None:
        context = closing.enter_context(zmq.Context())
        self.socket = closing.enter_context(context.socket(zmq.DEALER))
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 1)
        self.socket.setsockopt(zmq.RCVBUF, 1 << 16)
        self.socket.connect(endpoint.url)


def test_what_a_client_does_not_read_is_counted_and_ends_its_connection(
    zeromq: Endpoint, serve: Serve, connect: Connect, closing: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, other, deaf = serve(zeromq), connect(zeromq), Deaf(zeromq, closing)
    sizes = [LIMIT_BYTES - 100] * 16
    deaf.socket.send(b"question")
    incoming = receive(server)
    for size in sizes:
        incoming.reply([bytes(4), bytes(size)])
    exchange(other, server)
    assert 0 < incoming.client.unread_bytes <= sum(sizes) + 4 * len(sizes)
    assert not incoming.client.is_gone
    monkeypatch.setattr(zeromq_module, "PATIENCE_S", 0.0)
    deadline = time.monotonic() + PATIENCE_S
    while (incoming.client.unread_bytes or not incoming.client.is_gone) and time.monotonic() < deadline:
        server.receive(SHORT_S)
    assert incoming.client.is_gone
    assert incoming.client.unread_bytes == 0
    exchange(other, server)


def test_short_frames_of_a_long_reply_are_counted_too(zeromq: Endpoint, serve: Serve, closing: ExitStack) -> None:
    server, deaf = serve(zeromq), Deaf(zeromq, closing)
    deaf.socket.send(b"question")
    incoming = receive(server)
    for _ in range(16):
        incoming.reply([b"header", *[bytes(zmq.COPY_THRESHOLD - 1)] * 64])
    assert incoming.client.unread_bytes > LIMIT_BYTES


def test_short_replies_that_nobody_reads_are_bounded_too(
    zeromq: Endpoint, connect: Connect, closing: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zeromq_module, "UNREAD_REPLIES", 16)
    server = Server([zeromq], LIMIT_BYTES)
    closing.callback(server.close)
    other, deaf = connect(zeromq), Deaf(zeromq, closing)
    deaf.socket.send(b"question")
    incoming = receive(server)
    deadline = time.monotonic() + PATIENCE_S
    while not incoming.client.is_gone and time.monotonic() < deadline:
        incoming.reply([bytes(zmq.COPY_THRESHOLD - 1)])
    assert incoming.client.is_gone
    exchange(other, server)


_ASKS = """
import sys, time, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
socket.send(b"question")
time.sleep(600)
"""


def test_a_client_that_shows_no_life_is_gone(
    zeromq: Endpoint, closing: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped, and nothing waits for it: its connection would last for ever."""
    monkeypatch.setattr(zeromq_module, "_HEARTBEAT_MS", 100)
    monkeypatch.setattr(zeromq_module, "_ALIVE_MS", 500)
    server = Server([zeromq], LIMIT_BYTES)
    closing.callback(server.close)
    process = subprocess.Popen([sys.executable, "-c", _ASKS, zeromq.url])
    try:
        client = receive(server).client
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + PATIENCE_S
        while not client.is_gone and time.monotonic() < deadline:
            server.receive(SHORT_S)
        assert client.is_gone
    finally:
        process.kill()
        process.wait()
