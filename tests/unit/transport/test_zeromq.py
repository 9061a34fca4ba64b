"""Real ZeroMQ sockets: both address families, peers that vanish, and messages that are too large."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import zmq

from tsqp.enclave.session import MAX_IN_FLIGHT
from tsqp.errors import SetupError, TransportClosedError, TransportTimeoutError
from tsqp.transport.base import Incoming
from tsqp.transport.urls import Endpoint, parse
from tsqp.transport.zeromq import ZmqClient, ZmqServer
from tsqp.wire import codec

LIMIT_BYTES = 1 << 24
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


@pytest.fixture(params=["tcp", "ipc"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Endpoint:
    return parse(f"localhost:{free_port()}" if request.param == "tcp" else f"ipc://{tmp_path}/worker")


@pytest.fixture
def ipc(tmp_path: Path) -> Endpoint:
    return parse(f"ipc://{tmp_path}/worker")


@pytest.fixture
def serve(closing: ExitStack) -> Callable[..., ZmqServer]:
    def open_server(*endpoints: Endpoint, limit_bytes: int = LIMIT_BYTES, hangup_fd: int | None = None) -> ZmqServer:
        server = ZmqServer(endpoints, limit_bytes, hangup_fd)
        closing.callback(server.close)
        return server

    return open_server


@pytest.fixture
def connect(closing: ExitStack) -> Callable[..., ZmqClient]:
    def open_client(endpoint: Endpoint, limit_bytes: int = LIMIT_BYTES) -> ZmqClient:
        client = ZmqClient(endpoint, limit_bytes)
        closing.callback(client.close)
        return client

    return open_client


Serve = Callable[..., ZmqServer]
Connect = Callable[..., ZmqClient]


def receive(server: ZmqServer) -> Incoming:
    incoming = server.receive(PATIENCE_S)
    assert incoming is not None
    return incoming


def exchange(client: ZmqClient, server: ZmqServer) -> None:
    """Prove that the link works both ways."""
    client.send([b"ping"])
    server.send(receive(server).route, [b"pong"])
    assert [bytes(frame) for frame in client.receive(PATIENCE_S)] == [b"pong"]


def test_large_tensors_cross_both_ways(endpoint: Endpoint, serve: Serve, connect: Connect) -> None:
    server, client = serve(endpoint), connect(endpoint)
    x = torch.arange(1 << 20, dtype=torch.float32).view(1024, 1024)
    client.send([b"header", codec.frame_of(x), b""])
    incoming = receive(server)
    assert not incoming.legacy
    assert bytes(incoming.frames[0]) == b"header"
    assert torch.equal(codec.tensor_of(codec.spec_of(x), incoming.frames[1]), x)
    assert len(incoming.frames[2]) == 0
    server.send(incoming.route, [b"reply", codec.frame_of(-x)])
    reply, frame = client.receive(PATIENCE_S)
    assert bytes(reply) == b"reply"
    assert torch.equal(codec.tensor_of(codec.spec_of(x), frame), -x)


def test_replies_go_to_the_client_that_asked(endpoint: Endpoint, serve: Serve, connect: Connect) -> None:
    server, clients = serve(endpoint), [connect(endpoint) for _ in range(3)]
    for index, client in enumerate(clients):
        client.send([bytes([index])])
    for incoming in [receive(server) for _ in clients][::-1]:
        server.send(incoming.route, [b"for", *incoming.frames])
    for index, client in enumerate(clients):
        assert [bytes(frame) for frame in client.receive(PATIENCE_S)] == [b"for", bytes([index])]


def test_one_server_listens_on_several_addresses(ipc: Endpoint, serve: Serve, connect: Connect) -> None:
    tcp = parse(f"127.0.0.1:{free_port()}")
    server = serve(tcp, ipc)
    for endpoint in (tcp, ipc):
        exchange(connect(endpoint), server)


def test_ipv6(serve: Serve, connect: Connect) -> None:
    try:
        endpoint = parse(f"[::1]:{free_port('::1')}")
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    exchange(connect(endpoint), serve(endpoint))


def test_a_client_may_start_before_its_worker(endpoint: Endpoint, serve: Serve, connect: Connect) -> None:
    client = connect(endpoint)
    exchange(client, serve(endpoint))


def test_a_req_socket_of_the_first_protocol_is_recognised_and_answered(endpoint: Endpoint, serve: Serve) -> None:
    server = serve(endpoint)
    with zmq.Context() as context, context.socket(zmq.REQ) as client:
        client.setsockopt(zmq.LINGER, 0)
        client.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        client.connect(endpoint.url)
        client.send(b"request")
        incoming = receive(server)
        assert incoming.legacy
        assert [bytes(frame) for frame in incoming.frames] == [b"request"]
        server.send(incoming.route, [b"reply"])
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


def test_a_server_that_hears_nothing_returns_none(ipc: Endpoint, serve: Serve) -> None:
    server = serve(ipc)
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
    server.send(incoming.route, [b"answer"])
    exchange(client, server)


def test_an_oversized_request_ends_that_connection_only(endpoint: Endpoint, serve: Serve, connect: Connect) -> None:
    server, other, client = serve(endpoint, limit_bytes=1 << 16), connect(endpoint), connect(endpoint)
    exchange(client, server)
    client.send([b"header", bytes((1 << 16) + 1)])
    with pytest.raises(TransportClosedError):
        client.receive(PATIENCE_S)
    assert server.receive(0) is None
    other.send([bytes(1 << 16)])
    assert len(receive(server).frames[0]) == 1 << 16


def test_an_oversized_reply_is_not_received(endpoint: Endpoint, serve: Serve, connect: Connect) -> None:
    server, client = serve(endpoint), connect(endpoint, limit_bytes=1 << 16)
    exchange(client, server)
    client.send([b"question"])
    server.send(receive(server).route, [bytes((1 << 16) + 1)])
    with pytest.raises(TransportClosedError):
        client.receive(PATIENCE_S)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SetupError, match=rf"port {port} is already in use on 127\.0\.0\.1.*LLAMA_GPU_PORT"):
            ZmqServer([parse(f"127.0.0.1:{port}")], LIMIT_BYTES)


def test_a_path_in_use_is_refused_and_its_owner_undisturbed(ipc: Endpoint, serve: Serve, connect: Connect) -> None:
    server = serve(ipc)
    with pytest.raises(SetupError, match=f"{ipc.url} is already in use by another process"):
        ZmqServer([ipc], LIMIT_BYTES)
    exchange(connect(ipc), server)


def test_the_socket_file_of_a_dead_worker_is_reused(ipc: Endpoint, serve: Serve, connect: Connect) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(ipc.path)
    assert Path(ipc.path).is_socket()
    exchange(connect(ipc), serve(ipc))


def test_a_file_that_is_no_socket_is_left_alone(ipc: Endpoint) -> None:
    Path(ipc.path).write_text("precious")
    with pytest.raises(SetupError, match=f"cannot listen on {ipc.url}: a file that is no socket"):
        ZmqServer([ipc], LIMIT_BYTES)
    assert Path(ipc.path).read_text() == "precious"


def test_only_its_owner_may_use_an_ipc_socket(ipc: Endpoint, serve: Serve) -> None:
    mask = os.umask(0)
    try:
        serve(ipc)
        assert os.umask(0) == 0
    finally:
        os.umask(mask)
    assert stat.S_IMODE(Path(ipc.path).stat().st_mode) == 0o600


@pytest.mark.parametrize("address", ["192.0.2.1:50051", "ipc:///no/such/directory/worker"])
def test_an_address_that_cannot_be_bound_is_named(address: str) -> None:
    with pytest.raises(SetupError, match=f"cannot listen on {address}"):
        ZmqServer([parse(address)], LIMIT_BYTES)


def test_an_address_that_cannot_be_connected_to_is_named() -> None:
    with pytest.raises(SetupError, match="cannot connect to bad host:50051"):
        ZmqClient(parse("bad host:50051"), LIMIT_BYTES)


def test_a_failed_bind_releases_the_addresses_before_it(ipc: Endpoint, serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(SetupError):
        ZmqServer([ipc, parse(f"ipc://{tmp_path}/missing/worker")], LIMIT_BYTES)
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


def test_both_ends_may_be_closed_twice(ipc: Endpoint) -> None:
    server, client = ZmqServer([ipc], LIMIT_BYTES), ZmqClient(ipc, LIMIT_BYTES)
    client.send([b"never delivered"])
    for end in (server, client):
        end.close()
        end.close()
