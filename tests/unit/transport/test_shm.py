"""Shared memory: what lies in the region, what happens when it is full, and clients that lie about it."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from tsqp.errors import AbsentPeerError, InputError, ProtocolError, SetupError, TransportClosedError
from tsqp.transport import guests, region, shm, spinning
from tsqp.transport.base import Incoming
from tsqp.transport.server import Server
from tsqp.transport.shm import ShmClient, connect_socket
from tsqp.transport.sockets import owner_only
from tsqp.transport.urls import Endpoint, parse

LIMIT_BYTES = 1 << 16
PATIENCE_S = 60.0
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
REGION_BYTES = mmap.PAGESIZE + 2 * LIMIT_BYTES
GREETING = b"tsqp region 2"
DEV_SHM = Path("/dev/shm")  # noqa: S108


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    return parse(f"shm://{tmp_path}/worker")


@pytest.fixture
def server(endpoint: Endpoint) -> Iterator[Server]:
    server = Server([endpoint], LIMIT_BYTES)
    yield server
    server.close()


@pytest.fixture
def client(endpoint: Endpoint, server: Server) -> Iterator[ShmClient]:
    assert not server.hung_up
    client = connect_socket(endpoint, LIMIT_BYTES)
    yield client
    client.close()


def receive(server: Server) -> Incoming:
    incoming = server.receive(PATIENCE_S)
    assert incoming is not None
    return incoming


def exchange(client: ShmClient, server: Server) -> None:
    """Prove that the link works both ways."""
    client.send([b"ping"])
    receive(server).reply([b"pong"])
    assert client.receive(PATIENCE_S).private() == [b"pong"]


def test_the_worker_reads_a_long_frame_where_the_client_wrote_it(client: ShmClient, server: Server) -> None:
    client.send([b"header", bytes(20_000)])
    frame = receive(server).frames[1]
    client._link._memory[mmap.PAGESIZE : mmap.PAGESIZE + 5] = b"later"
    assert bytes(frame[:5]) == b"later"


def test_the_enclave_reads_a_long_frame_where_the_worker_wrote_it_until_it_copies(
    client: ShmClient, server: Server
) -> None:
    client.send([b"question"])
    receive(server).reply([b"header", bytes(20_000)])
    delivery = client.receive(PATIENCE_S)
    half = mmap.PAGESIZE + LIMIT_BYTES
    client._link._memory[half : half + 5] = b"later"
    assert bytes(delivery.frames[1][:5]) == b"later"
    _, frame = delivery.private()
    client._link._memory[half : half + 5] = b"never"
    assert bytes(frame[:5]) == b"later"


def test_a_header_is_a_copy_on_both_sides(client: ShmClient, server: Server) -> None:
    client.send([bytes(20_000)])
    incoming = receive(server)
    client._link._memory[mmap.PAGESIZE : mmap.PAGESIZE + 5] = b"later"
    assert bytes(incoming.frames[0]) == bytes(20_000)
    incoming.reply([bytes(20_000)])
    delivery = client.receive(PATIENCE_S)
    half = mmap.PAGESIZE + LIMIT_BYTES
    client._link._memory[half : half + 5] = b"later"
    assert bytes(delivery.frames[0]) == bytes(20_000)


def test_a_slot_is_sent_without_a_copy_both_ways(client: ShmClient, server: Server) -> None:
    slot = client.allocate(18_000)
    assert slot is not None
    assert not slot.readonly
    slot[:] = b"x" * 18_000
    client.send([b"header", slot])
    incoming = receive(server)
    slot[:5] = b"later"  # to prove that it is the same memory; nobody may do so
    assert bytes(incoming.frames[1][:5]) == b"later"
    answer = incoming.allocate(20_000)
    assert answer is not None
    incoming.reply([b"header", answer])
    answer[:5] = b"later"
    assert bytes(client.receive(PATIENCE_S).frames[1][:5]) == b"later"


def test_slots_may_be_sent_in_any_order_and_given_back(client: ShmClient, server: Server) -> None:
    for _ in range(50):
        slots = [client.allocate(20_000) for _ in range(3)]
        assert client.allocate(20_000) is None
        for number in (2, 0):
            slot = slots[number]
            assert slot is not None
            slot[:] = bytes([number]) * 20_000
            client.send([b"header", slot])
        assert slots[1] is not None
        client.discard(slots[1])
        for number in (2, 0):
            incoming = receive(server)
            assert bytes(incoming.frames[1]) == bytes([number]) * 20_000
            incoming.reply([b"done"])
            client.receive(PATIENCE_S).release()
    assert client.allocate(LIMIT_BYTES) is not None


def test_a_slot_sent_twice_is_copied(client: ShmClient, server: Server) -> None:
    slot = client.allocate(18_000)
    assert slot is not None
    slot[:] = b"x" * 18_000
    client.send([b"first", slot])
    client.send([b"again", slot, slot])
    client.discard(slot)
    assert [len(receive(server).frames) for _ in range(2)] == [2, 3]
    assert client._link._spans.used == 3 * 18_048


def kept_slot(client: ShmClient, size: int = 18_000) -> memoryview:
    slot = client.allocate(size, kept=True)
    assert slot is not None
    slot[:] = b"k" * size
    return slot


def answered(client: ShmClient, server: Server) -> None:
    receive(server).reply([b"done"])
    client.receive(PATIENCE_S).release()


def test_a_slot_that_is_kept_is_not_written_again_before_it_is_given_up(client: ShmClient, server: Server) -> None:
    slot = kept_slot(client)
    client.send([b"header", slot])
    answered(client, server)
    client.send([b"more", bytes(18_000)])
    answered(client, server)
    assert bytes(slot) == b"k" * 18_000
    client.discard(slot)
    client.discard(slot)
    assert client.allocate(LIMIT_BYTES) is not None


def test_a_slot_given_up_early_is_the_workers_until_it_has_answered(client: ShmClient, server: Server) -> None:
    slot = kept_slot(client)
    client.send([b"header", slot])
    client.discard(slot)
    client.send([b"more", bytes(18_000)])
    assert bytes(receive(server).frames[1]) == b"k" * 18_000
    assert client.allocate(LIMIT_BYTES) is None
    client.discard(kept_slot(client))
    assert client._link._spans.used == 2 * 18_048


def test_a_slot_that_is_kept_stands_after_the_end_of_its_link(
    client: ShmClient, server: Server, endpoint: Endpoint
) -> None:
    slot = kept_slot(client)
    client.send([b"header", slot])
    assert len(receive(server).frames) == 2
    server.close()
    with pytest.raises(TransportClosedError):
        client.receive(PATIENCE_S)
    client.close()
    other = Server([endpoint], LIMIT_BYTES)
    again = connect_socket(endpoint, LIMIT_BYTES)
    again.send([b"header", slot])
    assert bytes(receive(other).frames[1]) == bytes(slot) == b"k" * 18_000
    again.close()
    other.close()


def test_slots_that_are_kept_stay_where_they_are_while_a_message_before_them_waits(
    client: ShmClient, server: Server
) -> None:
    slot = kept_slot(client, 20_000)
    client.send([b"header", bytes(LIMIT_BYTES - 100)])
    client.send([b"header", slot])
    assert client._link.has_unsent
    client._link.flush()
    assert bytes(slot) == b"k" * 20_000
    client.discard(slot)
    client._link.flush()
    assert len(receive(server).frames[1]) == LIMIT_BYTES - 100


def test_a_message_that_does_not_fit_takes_no_room(client: ShmClient) -> None:
    slot = kept_slot(client)
    with pytest.raises(InputError, match="does not fit"):
        client.send([b"header", slot, bytes(LIMIT_BYTES)])
    client.discard(slot)
    assert client._link._spans.used == 0


@pytest.mark.parametrize("datagram", [b"\x01", struct.pack("<QQQ", 1, LIMIT_BYTES, 1)], ids=["short", "elsewhere"])
def test_a_malformed_message_is_counted(client: ShmClient, server: Server, datagram: bytes) -> None:
    """What comes after it, if anybody still listens, has the number that its sender gave it."""
    exchange(client, server)
    (guest,) = server._listeners[0]._guests  # type: ignore[attr-defined]
    guest.link.bell.send(datagram)
    with pytest.raises(ProtocolError):
        client.receive(PATIENCE_S)
    assert client._link._counters[0] == 2
    guest.link.bell.send(struct.pack("<QQQ", 1, (1 << 64) - 1, 2) + b"ok")
    number, delivery = client._link.receive()
    assert number == 2
    delivery.release()
    assert client._link._counters[0] == 3


def test_a_slot_that_blocks_a_message_in_front_of_it_gives_way(client: ShmClient, server: Server) -> None:
    """A message waits for room that the slot of the message after it takes: nobody else would move it."""
    for size in (40_000, 20_000):
        first, slot = client.allocate(20_000), client.allocate(size)
        assert first is not None
        assert slot is not None
        slot[:] = b"s" * size
        client.discard(first)
        client.send([b"header", bytes(LIMIT_BYTES - size - 100)])
        client.send([b"header", slot])
        for expected in (LIMIT_BYTES - size - 100, size):
            incoming = receive(server)
            assert len(incoming.frames[1]) == expected
            incoming.reply([b"done"])
            client.receive(PATIENCE_S).release()


def test_replies_may_be_released_in_any_order(client: ShmClient, server: Server) -> None:
    for _ in range(3):
        client.send([b"question"])
        receive(server).reply([b"header", bytes(20_000)])
    deliveries = [client.receive(PATIENCE_S) for _ in range(3)]
    consumed = []
    for number in (1, 1, 2, 0):
        deliveries[number].release()
        consumed.append(client._link._counters[0])
    assert consumed == [0, 0, 0, 3]


def test_replies_may_be_given_in_any_order_and_slots_left_out_are_free(client: ShmClient, server: Server) -> None:
    for number in range(2):
        client.send([bytes([number]), bytes(20_000)])
    first, second = receive(server), receive(server)
    unused = first.allocate(30_000)
    assert unused is not None
    assert second.allocate(60_000) is None
    second.reply([b"second"])
    assert client._link._counters[8] == 0
    first.reply([b"first"])
    assert client._link._counters[8] == 2
    assert [bytes(client.receive(PATIENCE_S).frames[0]) for _ in range(2)] == [b"second", b"first"]
    client.send([b"more"])
    assert receive(server).allocate(60_000) is not None


def test_a_client_that_is_gone_gets_no_slot(client: ShmClient, server: Server) -> None:
    client.send([b"question"])
    incoming = receive(server)
    client.close()
    assert server.receive(0) is None
    assert incoming.allocate(20_000) is None
    incoming.reply([b"nobody hears"])


def test_while_a_message_waits_for_room_there_are_no_slots(client: ShmClient) -> None:
    client.send([b"header", bytes(40_000)])
    client.send([b"header", bytes(40_000)])
    assert client._link.has_unsent
    assert client.allocate(20_000) is None


def test_a_short_frame_travels_in_the_datagram_and_needs_no_slot(client: ShmClient) -> None:
    assert client.allocate(4096) is None
    assert client.allocate(0) is None


def test_who_finds_its_peer_on_its_core_leaves_it(
    client: ShmClient, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []
    monkeypatch.setattr(spinning, "core", lambda: 3)
    monkeypatch.setattr(spinning, "step_aside", lambda: left.append("worker"))
    client.send([b"hello"])
    request = receive(server)
    assert left == ["worker"]
    monkeypatch.setattr(spinning, "step_aside", lambda: left.append("client"))
    request.reply([b"hello"])
    client.receive(1.0)
    assert left == ["worker", "client"]
    client.send([b"hello"])
    monkeypatch.setattr(spinning, "core", lambda: 4)
    receive(server).reply([b"hello"])
    monkeypatch.setattr(spinning, "core", lambda: 5)
    client.receive(1.0)
    assert left == ["worker", "client"], "the peer was elsewhere"


def test_a_client_waits_awake_while_no_other_of_its_process_awaits_an_answer(
    monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint, client: ShmClient, server: Server
) -> None:
    monkeypatch.setattr(shm, "_CORES", 2)
    with contextlib.closing(connect_socket(endpoint, LIMIT_BYTES)) as other:
        exchange(other, server)  # it is open, and awaits nothing
        client.send([b"ping"])
        assert shm._may_spin()
        other.send([b"ping"])
        assert not shm._may_spin()
        for _ in range(2):
            receive(server).reply([b"pong"])
        client.receive(PATIENCE_S)
        assert shm._may_spin()
        client.send([b"ping"])
        assert not shm._may_spin()
    assert shm._may_spin(), "a link that is closed awaits nothing"
    monkeypatch.setattr(shm, "_CORES", 1)
    assert not shm._may_spin()


def test_after_a_longer_wait_a_client_sleeps_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the clock decides: a wait is as long as ``spin`` and what follows it are said to have taken."""
    now, spun = [0.0], []

    def spin(_descriptors: tuple[int, ...], limit_s: float) -> list[int]:
        spun.append(limit_s)
        return [1]

    monkeypatch.setattr(region, "spin", spin)
    monkeypatch.setattr(region, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        bell = region.SocketBell(ours, lambda: True)
        assert bell.wait(PATIENCE_S)
        assert spun == [region._SPIN_S]
        monkeypatch.setattr(bell, "_may_spin", lambda: now.__setitem__(0, now[0] + 1.0) or True)
        assert bell.wait(PATIENCE_S)  # a second passes
        monkeypatch.setattr(bell, "_may_spin", lambda: True)
        theirs.send(b"x")
        assert bell.wait(PATIENCE_S)
        assert len(spun) == 2, "the wait before was longer"
        assert bell.wait(PATIENCE_S)
        assert len(spun) == 3, "the wait before was short again"


def test_where_cores_are_not_known_nobody_leaves(
    client: ShmClient, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spinning, "core", lambda: 0)
    monkeypatch.setattr(spinning, "step_aside", lambda: pytest.fail("left a core that nobody knows"))
    exchange(client, server)


@pytest.mark.usefixtures("server")
def test_no_name_is_left_in_dev_shm(endpoint: Endpoint) -> None:
    before = set(DEV_SHM.iterdir())
    client = connect_socket(endpoint, LIMIT_BYTES)
    client.send([bytes(20_000)])
    assert set(DEV_SHM.iterdir()) == before
    client.close()


def test_messages_beyond_the_room_wait_and_none_is_lost(client: ShmClient, server: Server) -> None:
    """Forty messages of 30 KB through halves of 64 KB, all sent before any reply is taken."""

    def answer() -> None:
        for _ in range(40):
            incoming = receive(server)
            incoming.reply([bytes([255 - incoming.frames[0][0]]) * 30_000])
        while server.receive(0) or any(listener.has_unsent for listener in server._listeners):
            pass

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(answer)
        for number in range(40):
            client.send([bytes([number]) * 30_000])
        for number in range(40):
            assert bytes(client.receive(PATIENCE_S).private()[0]) == bytes([255 - number]) * 30_000
        done.result(PATIENCE_S)


def test_a_message_larger_than_the_region_is_refused(client: ShmClient, server: Server) -> None:
    with pytest.raises(InputError, match=r"does not fit the shared region of 65536: shorten the prompt"):
        client.send([bytes(LIMIT_BYTES + 1)])
    exchange(client, server)


def test_a_reply_larger_than_the_region_ends_that_connection(client: ShmClient, server: Server) -> None:
    client.send([b"question"])
    receive(server).reply([bytes(LIMIT_BYTES + 1)])
    with pytest.raises(TransportClosedError, match="closed the connection or died"):
        client.receive(PATIENCE_S)


def test_many_short_frames_fit_one_message(client: ShmClient, server: Server) -> None:
    frames = [bytes([number]) * 100 for number in range(200)]
    client.send(frames)
    assert [bytes(frame) for frame in receive(server).frames] == frames


def test_nobody_there_is_said_at_once(endpoint: Endpoint) -> None:
    with pytest.raises(AbsentPeerError, match=f"cannot connect to {endpoint}: No such file.*Is the worker running"):
        connect_socket(endpoint, LIMIT_BYTES)


def test_a_socket_that_nobody_listens_on_is_nobody_there(endpoint: Endpoint) -> None:
    """A worker that crashed leaves it behind."""
    with owner_only(), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(endpoint.path)
    with pytest.raises(AbsentPeerError, match="Connection refused"):
        connect_socket(endpoint, LIMIT_BYTES)
    Path(endpoint.path).unlink()
    Path(endpoint.path).write_bytes(b"")
    Path(endpoint.path).chmod(0o000)
    if os.geteuid():
        with pytest.raises(SetupError, match="Permission denied") as refusal:
            connect_socket(endpoint, LIMIT_BYTES)
        assert not isinstance(refusal.value, AbsentPeerError)


def sealed_region(size: int = REGION_BYTES, seals: int = SEALS) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


@contextlib.contextmanager
def raw_client(endpoint: Endpoint, *descriptors: int, greeting: bytes = GREETING) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(endpoint.path)
        socket.send_fds(connection, [greeting], list(descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
        yield connection


def assert_dropped(connection: socket.socket, server: Server) -> None:
    for _ in range(3):
        assert server.receive(0) is None
    connection.settimeout(PATIENCE_S)
    with contextlib.suppress(ConnectionResetError):
        assert connection.recv(8) in (b"", region.REFUSAL)
        assert connection.recv(8) == b""


@pytest.mark.parametrize(
    "offer",
    [
        pytest.param(list, id="no region"),
        pytest.param(lambda: [sealed_region(), sealed_region()], id="two regions"),
        pytest.param(lambda: [sealed_region(seals=0)], id="unsealed: a client that shrinks it would kill the worker"),
        pytest.param(lambda: [sealed_region(REGION_BYTES + 2 * mmap.PAGESIZE)], id="larger than the worker's limit"),
        pytest.param(lambda: [sealed_region(mmap.PAGESIZE)], id="no room"),
        pytest.param(lambda: [sealed_region(REGION_BYTES - 1)], id="no whole pages"),
        pytest.param(lambda: [os.open("/dev/null", os.O_RDWR)], id="no memory"),
    ],
)
def test_a_client_without_a_proper_region_is_dropped(
    offer: Callable[[], list[int]], endpoint: Endpoint, server: Server
) -> None:
    with raw_client(endpoint, *offer()) as connection:
        assert_dropped(connection, server)


def test_a_client_with_another_greeting_is_dropped(endpoint: Endpoint, server: Server) -> None:
    with raw_client(endpoint, sealed_region(), greeting=b"GET / HTTP/1.1") as connection:
        assert_dropped(connection, server)


@pytest.mark.parametrize(
    "datagram",
    [
        pytest.param(b"\x01", id="no count"),
        pytest.param(struct.pack("<Q", 1), id="no span"),
        pytest.param(struct.pack("<QQQ", 1, (1 << 64) - 1, 5) + b"four", id="short inline frame"),
        pytest.param(struct.pack("<QQQ", 1, LIMIT_BYTES, 1), id="the worker's own half"),
        pytest.param(struct.pack("<QQQ", 1, LIMIT_BYTES - 4, 5), id="across the end of the half"),
        pytest.param(struct.pack("<QQQ", 1, 0, (1 << 64) - 1), id="huge length"),
        pytest.param(struct.pack("<QQQ", 1, (1 << 64) - 2, 8), id="huge offset"),
        pytest.param(struct.pack("<Q", (1 << 31) - 1), id="huge count"),
        pytest.param(struct.pack("<QQQQQ", 2, 0, LIMIT_BYTES, 0, 1), id="frames that overlap, larger than the half"),
    ],
)
def test_a_datagram_that_points_elsewhere_ends_the_connection(
    datagram: bytes, endpoint: Endpoint, server: Server
) -> None:
    with raw_client(endpoint, sealed_region()) as connection:
        assert server.receive(0) is None
        connection.send(datagram)
        assert_dropped(connection, server)


def test_a_counter_that_lies_ends_the_connection(client: ShmClient, server: Server) -> None:
    client.send([b"question"])
    incoming = receive(server)
    client._link._counters[0] = 7
    incoming.reply([b"answer"])
    assert bytes(client.receive(PATIENCE_S).frames[0]) == b"answer"
    with pytest.raises(TransportClosedError):
        client.receive(PATIENCE_S)


def test_a_worker_whose_counter_lies_is_named(client: ShmClient) -> None:
    client._link._counters[8] = 7
    with pytest.raises(ProtocolError, match=f"{client.peer}: the shared region's counter"):
        client.send([b"question"])


def test_a_client_with_a_larger_limit_is_told_so(endpoint: Endpoint, server: Server) -> None:
    client = connect_socket(endpoint, 2 * LIMIT_BYTES)
    client.send([b"hello"])
    for _ in range(2):
        assert server.receive(0) is None
    with pytest.raises(SetupError, match="refused the shared region: give both sides the same TSQP_MAX_MESSAGE_BYTES"):
        client.receive(PATIENCE_S)
    client.close()


def answer_all(server: Server, count: int) -> None:
    for _ in range(count):
        receive(server).reply([b"ok"])


def test_room_is_given_back_after_the_socket_was_full(client: ShmClient, server: Server) -> None:
    """More short messages than a socket holds: each waits to be sent, none may reserve room twice."""
    for _ in range(1000):
        client.send([bytes(3000)])
    assert client._link.has_unsent
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(answer_all, server, 1000)
        for _ in range(1000):
            client.receive(PATIENCE_S)
        served.result(PATIENCE_S)
    client.send([bytes(LIMIT_BYTES)])
    assert not client._link.has_unsent
    assert len(receive(server).frames[0]) == LIMIT_BYTES


def test_a_client_that_takes_no_reply_is_not_heard_and_holds_one_message(
    client: ShmClient, server: Server, endpoint: Endpoint
) -> None:
    for _ in range(10):
        client.send([b"more"])
    for _ in range(2):
        receive(server).reply([bytes(40_000)])
    assert server.receive(0) is None
    other = connect_socket(endpoint, LIMIT_BYTES)
    exchange(other, server)
    other.close()
    assert len(client.receive(PATIENCE_S).private()[0]) == 40_000
    assert server.receive(0) is None
    assert len(client.receive(PATIENCE_S).private()[0]) == 40_000
    receive(server).reply([b"at last"])
    assert client.receive(PATIENCE_S).private() == [b"at last"]


def test_a_client_that_takes_no_reply_for_long_is_dropped(
    endpoint: Endpoint, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raw_client(endpoint, sealed_region()) as connection:
        for _ in range(2):
            connection.send(struct.pack("<QQQ", 1, (1 << 64) - 1, 0))
        for _ in range(2):
            receive(server).reply([bytes(40_000)])
        assert server.receive(0) is None
        assert connection.recv(100)
        monkeypatch.setattr(guests, "PATIENCE_S", -1.0)
        assert server.receive(0) is None
        assert connection.recv(100) == b""


def test_a_client_that_hands_nothing_over_is_dropped(
    endpoint: Endpoint, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(connected(endpoint)) as connection:
        assert server.receive(0) is None
        monkeypatch.setattr(shm, "PATIENCE_S", -1.0)
        assert server.receive(0) is None
        assert connection.recv(100) == b""


def connected(endpoint: Endpoint) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(endpoint.path)
    return connection


def test_a_worker_out_of_descriptors_still_returns_and_recovers(
    endpoint: Endpoint, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "_PAUSE_S", 0.05)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = connect_socket(endpoint, LIMIT_BYTES)
    assert isinstance(waiting._link.bell, region.SocketBell)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (waiting._link.bell._connection.fileno() + 1, limits[1]))
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        assert server.receive(0.01) is None
        assert server.receive(0.01) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in taken:
            os.close(descriptor)
    time.sleep(0.06)
    server.receive(0)
    exchange(waiting, server)
    waiting.close()


def test_a_counter_is_never_seen_half_written() -> None:
    """One process counts up, the other must see the count only grow."""
    command = (
        "import mmap, sys; counters = memoryview(mmap.mmap(int(sys.argv[1]), mmap.PAGESIZE)).cast('Q')\n"
        "for n in range(1 << 20): counters[0] = n"
    )
    descriptor = os.memfd_create("counter")
    os.ftruncate(descriptor, mmap.PAGESIZE)
    counters = memoryview(mmap.mmap(descriptor, mmap.PAGESIZE)).cast("Q")
    process = subprocess.Popen([sys.executable, "-c", command, str(descriptor)], pass_fds=[descriptor])
    seen = 0
    while process.poll() is None:
        for _ in range(1000):
            now = counters[0]
            assert now >= seen
            seen = now
    os.close(descriptor)
    assert counters[0] == (1 << 20) - 1
