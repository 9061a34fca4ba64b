"""Named regions under /dev/shm: seats, crashes, names that are taken, and a /dev/shm that is too small."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tsqp.errors import (
    AbsentPeerError,
    ConfigError,
    ProtocolError,
    SetupError,
    TransportClosedError,
    TransportTimeoutError,
)
from tsqp.transport import liveness, named, polled
from tsqp.transport.base import Incoming
from tsqp.transport.client import open_client
from tsqp.transport.link import PAGE
from tsqp.transport.liveness import CRASH_NOTICED_S, Identity, Pulse, Watch, own_identity
from tsqp.transport.server import Server
from tsqp.transport.shm import ShmClient
from tsqp.transport.urls import Endpoint, parse

LIMIT_BYTES = 1 << 16
PATIENCE_S = 60.0


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    endpoint = parse(f"shm:///dev/shm/tsqp-test-{os.getpid()}-{tmp_path.name}")
    yield endpoint
    Path(endpoint.path).unlink(missing_ok=True)


@pytest.fixture
def server(endpoint: Endpoint) -> Iterator[Server]:
    server = Server([endpoint], LIMIT_BYTES)
    yield server
    server.close()


Connect = Callable[[], ShmClient]


@pytest.fixture
def connect(endpoint: Endpoint) -> Iterator[Connect]:
    with contextlib.ExitStack() as stack:

        def connected() -> ShmClient:
            client = open_client(endpoint, LIMIT_BYTES)
            assert isinstance(client, ShmClient)
            stack.callback(client.close)
            return client

        yield connected


def receive(server: Server) -> Incoming:
    incoming = server.receive(PATIENCE_S)
    assert incoming is not None
    return incoming


def exchange(client: ShmClient, server: Server) -> None:
    client.send([b"ping", b"x" * 20_000])
    incoming = receive(server)
    assert bytes(incoming.frames[1]) == b"x" * 20_000
    incoming.reply([b"pong"])
    assert client.receive(PATIENCE_S).private() == [b"pong"]


def region_of(server: Server) -> named.NamedRegion:
    (listener,) = server._listeners
    assert isinstance(listener, polled.PolledListener)
    return listener._region


def test_several_clients_have_seats_of_their_own(server: Server, connect: Connect) -> None:
    with ThreadPoolExecutor(named.SEATS) as pool:
        clients = list(pool.map(lambda _: connect(), range(named.SEATS)))
    for _ in range(3):
        for client in clients:
            exchange(client, server)


def test_slots_go_both_ways(server: Server, connect: Connect) -> None:
    client = connect()
    slot = client.allocate(20_000)
    assert slot is not None
    slot[:] = b"s" * 20_000
    client.send([b"header", slot])
    incoming = receive(server)
    assert bytes(incoming.frames[1]) == b"s" * 20_000
    answer = incoming.allocate(30_000)
    assert answer is not None
    answer[:] = b"a" * 30_000
    incoming.reply([b"header", answer])
    delivery = client.receive(PATIENCE_S)
    assert bytes(delivery.frames[1]) == b"a" * 30_000
    delivery.release()


def test_no_slot_is_kept(server: Server, connect: Connect) -> None:
    """Once the seat is lost another client writes there."""
    client = connect()
    assert client.allocate(20_000, kept=True) is None
    exchange(client, server)


@pytest.mark.parametrize("word", [(1 << 64) - 1, 0])
def test_a_heartbeat_goes_on_whatever_the_peer_writes_there(server: Server, connect: Connect, word: int) -> None:
    client = connect()
    exchange(client, server)
    region = region_of(server)
    seen: list[list[int]] = []
    for _ in range(3):
        words = [(region.words, named.BEAT), (region.seats[0].words, named.SEAT_BEAT)]
        for memory, at in words:
            memory[at] = word
        deadline = time.monotonic() + PATIENCE_S
        while any(memory[at] == word for memory, at in words):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        seen.append([memory[at] for memory, at in words])
    assert seen == sorted(seen)
    exchange(client, server)


def test_a_heartbeat_stays_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_BEAT_S", 0.001)
    monkeypatch.setattr(liveness, "_WORD", 3)
    beats: list[int] = []
    pulse = Pulse(beats.append)
    while len(beats) < 5:
        time.sleep(0.001)
    pulse.stop()
    assert beats[:5] == [1, 2, 3, 0, 1]


def test_a_seat_is_free_again_when_its_client_leaves(
    endpoint: Endpoint, server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polled, "_CONNECT_S", 1.0)
    clients = [connect() for _ in range(named.SEATS)]
    for client in clients:
        exchange(client, server)
    with pytest.raises(SetupError, match=rf"all {named.SEATS} seats of the region are taken\. End another"):
        open_client(endpoint, LIMIT_BYTES)
    clients[1].close()
    clients[1].close()
    for _ in range(2):
        assert server.receive(0) is None
    exchange(connect(), server)
    exchange(clients[0], server)


def test_a_seat_is_not_given_away_while_its_last_request_is_computed(server: Server, connect: Connect) -> None:
    """A product kernel may still write to its slot."""
    client = connect()
    client.send([b"question"])
    incoming = receive(server)
    slot = incoming.allocate(20_000)
    assert slot is not None
    client.close()
    for _ in range(3):
        assert server.receive(0) is None
    assert incoming.allocate(20_000) is None
    assert region_of(server).seats[0].words[named.GRANT]
    incoming.reply([b"header", slot])
    assert server.receive(0) is None
    assert not region_of(server).seats[0].words[named.GRANT]


def test_a_seat_that_nobody_takes_is_free_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    words = region_of(server).seats[0].words
    words[named.CLAIM] = 5
    assert server.receive(0) is None
    assert words[named.GRANT] == 5
    monkeypatch.setattr(polled, "_CONNECT_S", -1.0)
    assert server.receive(0) is None
    assert (words[named.CLAIM], words[named.GRANT]) == (0, 0)


def test_a_client_may_connect_while_its_worker_is_busy(server: Server, connect: Connect) -> None:
    """Nobody listens here until the client has its seat and has spoken."""
    client = connect()
    client.send([b"early"])
    assert receive(server).frames[0] == b"early"


def script(body: str, endpoint: Endpoint) -> subprocess.Popen[bytes]:
    code = (
        "import sys, time\n"
        "from tsqp.transport.client import open_client\n"
        "from tsqp.transport.server import Server\n"
        "from tsqp.transport.urls import parse\n"
        f"endpoint = parse({endpoint.url!r})\n{body}\n"
        "print(flush=True)\n"
        "while True: time.sleep(1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"\n"
    return process


def killed(process: subprocess.Popen[bytes]) -> None:
    """Leave a zombie, as a crash does until somebody asks."""
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


@contextlib.contextmanager
def running(body: str, endpoint: Endpoint) -> Iterator[subprocess.Popen[bytes]]:
    with script(body, endpoint) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_worker_that_crashes_is_noticed(endpoint: Endpoint, connect: Connect) -> None:
    with running(f"server = Server([endpoint], {LIMIT_BYTES})", endpoint) as process:
        client = connect()
        client.send([b"question"])
        killed(process)
        started = time.monotonic()
        with pytest.raises(TransportClosedError, match=f"{endpoint} closed the connection or died"):
            client.receive(PATIENCE_S)
        assert time.monotonic() - started < CRASH_NOTICED_S
        with pytest.raises(TransportClosedError):
            client.send([b"again"])
        with pytest.raises(AbsentPeerError, match=r"the worker there has ended\. Start it again"):
            open_client(endpoint, LIMIT_BYTES)


def test_a_worker_of_another_namespace_that_crashes_is_noticed(
    endpoint: Endpoint, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its heartbeat alone: its process id means nothing here."""
    silence_s = 2.0
    monkeypatch.setattr(liveness, "SILENCE_S", silence_s)
    with running(f"server = Server([endpoint], {LIMIT_BYTES})", endpoint) as process:
        with Path(endpoint.path).open("r+b") as file:
            file.seek(8 * (named.IDENTITY + 2))
            file.write((own_identity().namespace + 1).to_bytes(8, "little"))
        client = connect()
        client.send([b"question"])
        with pytest.raises(TransportTimeoutError):  # it answers nothing, but its heart beats
            client.receive(2 * silence_s)
        killed(process)
        with pytest.raises(TransportClosedError, match=f"{endpoint} closed the connection or died"):
            client.receive(PATIENCE_S)


def test_the_region_of_a_dead_worker_is_replaced(endpoint: Endpoint, connect: Connect) -> None:
    with running(f"server = Server([endpoint], {LIMIT_BYTES})", endpoint) as process:
        killed(process)
        server = Server([endpoint], LIMIT_BYTES)
        exchange(connect(), server)
        server.close()


def test_a_client_that_crashes_loses_its_seat(endpoint: Endpoint, server: Server) -> None:
    with running(f"client = open_client(endpoint, {LIMIT_BYTES})\nclient.send([b'hello'])", endpoint) as process:
        assert receive(server).frames[0] == b"hello"
        assert region_of(server).seats[0].words[named.GRANT]
        killed(process)
        deadline = time.monotonic() + CRASH_NOTICED_S
        (listener,) = server._listeners
        assert isinstance(listener, polled.PolledListener)
        while not listener._leaving and time.monotonic() < deadline:
            assert server.receive(0.01) is None
        assert listener._leaving


def test_across_namespaces_a_heartbeat_that_stops_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_LOOK_S", 0.0)
    monkeypatch.setattr(liveness, "SILENCE_S", 0.2)
    beats = 0
    watch = Watch(Identity(1, 1, 7), lambda: beats)
    for _ in range(30):
        beats += 1
        time.sleep(0.01)
        assert not watch.is_dead
    deadline = time.monotonic() + PATIENCE_S
    while not watch.is_dead:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_is_known_by_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_LOOK_S", 0.0)
    own = own_identity()
    assert own.is_visible
    assert not Watch(own, lambda: 0).is_dead
    assert Watch(Identity(own.pid, own.start + 1, own.namespace), lambda: 0).is_dead


def test_its_owner_alone_may_open_it(server: Server, endpoint: Endpoint) -> None:
    assert not server.hung_up
    assert stat.S_IMODE(Path(endpoint.path).stat().st_mode) == 0o600


def test_the_name_goes_with_the_worker(endpoint: Endpoint) -> None:
    mask = os.umask(0o777)
    try:
        server = Server([endpoint], LIMIT_BYTES)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(Path(endpoint.path).stat().st_mode) == 0o600
    assert Path(endpoint.path).stat().st_blocks * 512 >= named.shape_for(LIMIT_BYTES).total
    server.close()
    assert not Path(endpoint.path).exists()


def link_to_elsewhere(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(bytes(PAGE))
    path.symlink_to(tmp_path / "elsewhere")


def with_mode(path: Path, _tmp_path: Path) -> None:
    path.write_bytes(bytes(PAGE))
    path.chmod(0o644)


def precious(path: Path, _tmp_path: Path) -> None:
    path.write_bytes(b"precious" * PAGE)
    path.chmod(0o600)


@pytest.mark.parametrize(
    ("place", "why"),
    [
        (link_to_elsewhere, "a symbolic link is there"),
        (with_mode, "the file there has mode 0644, expected 0600, for its owner alone"),
        (lambda path, _tmp_path: path.mkdir(), "Is a directory"),
        (lambda path, _tmp_path: path.write_bytes(b"short"), "a file that is no region is there"),
    ],
)
def test_what_is_no_private_file_is_refused_by_both_sides(
    place: Callable[[Path, Path], Any], why: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    path = Path(endpoint.path)
    place(path, tmp_path)
    try:
        with pytest.raises(SetupError, match=f"cannot listen on {endpoint}: {why}"):
            Server([endpoint], LIMIT_BYTES)
        with pytest.raises(SetupError, match=f"cannot connect to {endpoint}: {why}"):
            opened(endpoint)
        assert os.path.lexists(path)
    finally:
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("has_a_size", [True, False])
def test_a_region_that_looks_like_a_device_is_one_as_under_gramine(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch, *, has_a_size: bool
) -> None:
    look = os.fstat

    def as_a_device(descriptor: int) -> os.stat_result:
        fields = [int(field) for field in look(descriptor)]
        fields[stat.ST_MODE] = stat.S_IFCHR | stat.S_IMODE(fields[stat.ST_MODE])
        fields[stat.ST_SIZE] *= has_a_size
        return os.stat_result(fields)

    monkeypatch.setattr("tsqp.transport.named.os.fstat", as_a_device)
    if has_a_size:
        exchange(connect(), server)
    else:
        with pytest.raises(AbsentPeerError, match="a file that is no region is there"):
            connect()


def opened(endpoint: Endpoint) -> object:
    return open_client(endpoint, LIMIT_BYTES)


def test_a_file_that_is_no_region_is_left_alone(endpoint: Endpoint, tmp_path: Path) -> None:
    precious(Path(endpoint.path), tmp_path)
    with pytest.raises(SetupError, match="a file that is no region is there"):
        Server([endpoint], LIMIT_BYTES)
    with pytest.raises(SetupError, match="no region that this version knows") as refusal:
        opened(endpoint)
    assert not isinstance(refusal.value, AbsentPeerError)
    assert Path(endpoint.path).read_bytes() == b"precious" * PAGE


@pytest.mark.usefixtures("server")
def test_a_region_of_another_user_is_refused(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(SetupError, match=rf"belongs to user {os.getuid()}, and this process runs as 12345"):
        opened(endpoint)


def test_nobody_there_is_said_at_once(endpoint: Endpoint) -> None:
    with pytest.raises(AbsentPeerError, match=f"cannot connect to {endpoint}: No such file.*Is the worker running"):
        opened(endpoint)


@pytest.mark.parametrize("size", [0, PAGE])
def test_a_region_that_is_being_made_is_nobody_there(endpoint: Endpoint, size: int) -> None:
    path = Path(endpoint.path)
    path.touch(0o600)
    path.write_bytes(bytes(size))
    with pytest.raises(AbsentPeerError, match="no region"):
        opened(endpoint)


def test_a_larger_region_than_this_side_allows_is_refused(server: Server, endpoint: Endpoint) -> None:
    assert not server.hung_up
    with pytest.raises(SetupError, match="messages of 65536 bytes, this side allows 4096: give both sides the same"):
        open_client(endpoint, 4096)


def test_a_small_dev_shm_is_said_with_what_to_do(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    small = os.statvfs_result((4096, 4096, 16384, 16384, 16384, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _path: small)
    needed = re.escape("takes 136 MB, /dev/shm has 67 MB free. Lower TSQP_MAX_MESSAGE_BYTES on both sides")
    with pytest.raises(SetupError, match=rf"for 4 clients and messages of 16384 KB {needed}.*--shm-size.*or use tcp"):
        Server([endpoint], 16 << 20)
    assert not Path(endpoint.path).exists()


def test_a_dev_shm_that_fills_up_meanwhile_is_an_error_at_start(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SetupError, match=f"cannot listen on {endpoint}: No space left on device"):
        Server([endpoint], LIMIT_BYTES)
    assert not Path(endpoint.path).exists()


def test_a_missing_dev_shm_is_said() -> None:
    with pytest.raises(SetupError, match=r"there is no /nowhere here\. Mount a tmpfs"):
        named.NamedRegion(Endpoint("shm", path="/nowhere/worker"), LIMIT_BYTES)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", "a\nb"])
def test_a_name_is_plain(name: str) -> None:
    with pytest.raises(ConfigError, match="expected a plain name after /dev/shm/"):
        parse(f"shm:///dev/shm/{name}")


def test_a_client_that_lies_in_its_ring_is_dropped(server: Server, connect: Connect) -> None:
    liar, other = connect(), connect()
    exchange(liar, server)
    region_of(server).seats[0].words[named._REQUEST_HEAD] += 4
    assert server.receive(0) is None
    with pytest.raises(TransportClosedError):
        liar.receive(PATIENCE_S)
    exchange(other, server)


def test_a_worker_that_lies_in_its_ring_is_named(server: Server, connect: Connect) -> None:
    client = connect()
    exchange(client, server)
    region_of(server).seats[0].words[named._REPLY_HEAD] += 4
    with pytest.raises(ProtocolError, match=f"{client.peer}: the head of a ring"):
        client.receive(PATIENCE_S)


def test_a_new_client_starts_with_an_empty_seat(server: Server, connect: Connect) -> None:
    first = connect()
    for _ in range(5):
        exchange(first, server)
    first.send([b"unheard"])
    first.close()
    for _ in range(2):
        server.receive(0)
    exchange(connect(), server)
