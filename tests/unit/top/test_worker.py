"""A worker or dealer is read by its own protocol, over any link."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from msgspec import structs
from tiny_models import load_linears

from tsqp.arith.ring import lay_out
from tsqp.config import EnclaveConfig
from tsqp.enclave.session import Session
from tsqp.errors import (
    AbsentPeerError,
    ConfigError,
    KeyRefusedError,
    PeerKeyError,
    ProtocolError,
    TransportTimeoutError,
)
from tsqp.top.reading import Reading
from tsqp.top.worker import WorkerSource
from tsqp.transport.client import open_client
from tsqp.transport.keys import KeyPair, create, ephemeral, load_public
from tsqp.transport.server import Server
from tsqp.transport.urls import parse
from tsqp.wire import codec, messages
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.server import Worker
from tsqp.worker.services import DealerService, OpenService, WorkerService

LIMIT_BYTES = 1 << 20
QKV = "layers.0.qkv"


@pytest.fixture(scope="module")
def service(tiny_llama: Path) -> OpenService:
    return OpenService(load_linears(tiny_llama), {})


@pytest.fixture(params=["ipc", "shm"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}://{tmp_path}/worker"


@contextmanager
def running(
    service: WorkerService, address: str, key: KeyPair | None = None, allowed: frozenset[bytes] | None = None
) -> Iterator[Worker]:
    server = Server([parse(address)], LIMIT_BYTES, key=key, allowed=allowed)
    worker = Worker(Dispatcher(service, "/models/ti\x1bny", "digest"), server)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join()
        server.close()


def config(**settings: object) -> EnclaveConfig:
    return EnclaveConfig(**{"connect_timeout_s": 60.0, "max_message_bytes": LIMIT_BYTES, **settings})  # type: ignore[arg-type]


def read(address: str, **settings: object) -> Reading:
    source = WorkerSource(address, config(**settings))
    try:
        return source.read()
    finally:
        source.close()
        source.close()


def ask(address: str, service: WorkerService, rows: int) -> None:
    session = Session(open_client(parse(address), LIMIT_BYTES), 60.0)
    x = torch.ones(rows, service.groups[QKV].in_features)
    frame = codec.frame_of(x)
    number = session.submit(lambda i: messages.Linear(id=i, group=QKV, x=codec.spec_of(x)), [frame])
    session.result(number, messages.Result)
    session.close()


def test_a_worker_tells_its_numbers(service: OpenService, address: str) -> None:
    with running(service, address):
        before = read(address)
        assert before.requests == {}  # who watches is no work
        ask(address, service, 5)
        found = read(address)
    assert (found.kind, found.model, found.serves, found.device, found.dtype) == (
        "worker", "ti?ny", "open", "cpu", "float32",
    )  # fmt: skip
    assert found.requests == {"linear": 1}
    assert (found.counters["rows"], found.counters["products"], found.counters["product_requests"]) == (5, 1, 1)
    assert found.counters["bytes_in"] > before.counters["bytes_in"] + 5 * 4 * service.groups[QKV].in_features
    assert found.counters["bytes_out"] > before.counters["bytes_out"] + 5 * 4 * service.groups[QKV].rows
    assert found.parts["computing"] > 0 == found.parts["copying"]
    assert found.memory_bytes is not None
    assert found.memory_total_bytes is not None
    assert 0 < found.memory_bytes < found.memory_total_bytes
    assert found.uptime_s > before.uptime_s


def test_one_link_serves_many_readings(service: OpenService, address: str) -> None:
    with running(service, address) as worker:
        source = WorkerSource(address, config())
        for _ in range(3):
            source.read()
        assert worker.dispatcher.requests[messages.Hello] == 1
        source.close()
        source.read()
        assert worker.dispatcher.requests[messages.Hello] == 2
        source.close()


def test_a_dealer_is_called_one(service: OpenService, tmp_path: Path) -> None:
    group = service.groups[QKV]
    codes = lay_out(torch.ones(group.rows, group.in_features, dtype=torch.int8))
    address = f"ipc://{tmp_path}/dealer"
    with running(DealerService([group], {QKV: codes}, service.device), address):
        found = read(address)
    assert (found.kind, found.serves) == ("dealer", "masks")


def test_with_a_key_the_worker_must_hold_it(service: OpenService, tmp_path: Path) -> None:
    address, key, other = f"ipc://{tmp_path}/worker", ephemeral(), ephemeral()
    with running(service, address, key):
        assert read(address, worker_key=key.public.decode()).kind == "worker"
        with pytest.raises(PeerKeyError):
            read(address, worker_key=other.public.decode())
        with pytest.raises(ConfigError, match="wants an encrypted link: give its public key"):
            read(address)
    with pytest.raises(ConfigError):
        read(f"shm://{tmp_path}/worker", worker_key=key.public.decode())


def test_who_lets_only_some_in_is_watched_with_an_own_key(service: OpenService, tmp_path: Path) -> None:
    address, key = f"ipc://{tmp_path}/worker", ephemeral()
    public, secret = create(tmp_path, "watcher")
    with running(service, address, key, frozenset([load_public(public)])):
        settings = {"worker_key": key.public.decode()}
        assert read(address, **settings, own_key=str(secret)).kind == "worker"
        with pytest.raises(KeyRefusedError):
            read(address, **settings)


def test_a_link_in_clear_that_leaves_this_machine_must_be_meant() -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        WorkerSource("192.0.2.1:50051", config())
    WorkerSource("192.0.2.1:50051", config(insecure="on"))


def test_who_is_not_there_may_come_later(service: OpenService, address: str) -> None:
    source = WorkerSource(address, config(connect_timeout_s=0.05))
    with pytest.raises((AbsentPeerError, TransportTimeoutError)):
        source.read()
    source = WorkerSource(address, config())
    with running(service, address):
        assert source.read().kind == "worker"
    source.close()


def test_a_worker_that_does_not_answer_is_not_waited_for_long(service: OpenService, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/worker"
    with running(service, address) as worker:
        worker.dispatcher._answers[messages.Stats] = lambda _number: [b""] * 0
        source = WorkerSource(address, config(connect_timeout_s=0.5))
        worker.dispatcher._send = lambda reply, frames: reply(frames) if frames else None  # type: ignore[method-assign]
        with pytest.raises(TransportTimeoutError, match=r"worker at ipc://.* has not answered for 0\.5 s: it hangs"):
            source.read()
        source.close()


@pytest.mark.parametrize(
    "change",
    [{"errors": -1}, {"uptime_s": float("nan")}, {"requests": {str(i): 1 for i in range(65)}}, {"waiting": 1 << 62}],
    ids=lambda change: next(iter(change)),
)
def test_numbers_out_of_bounds_are_no_numbers(
    change: dict[str, object], service: OpenService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"ipc://{tmp_path}/worker"
    honest = Dispatcher.stats
    monkeypatch.setattr(Dispatcher, "stats", lambda self, number: structs.replace(honest(self, number), **change))
    with running(service, address), pytest.raises(ProtocolError, match="not a valid message from the worker"):
        read(address)


def test_names_of_requests_are_made_fit_for_a_terminal(
    service: OpenService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"ipc://{tmp_path}/worker"
    honest = Dispatcher.stats
    lie = {"\x1b[31mred": 3}
    monkeypatch.setattr(Dispatcher, "stats", lambda self, number: structs.replace(honest(self, number), requests=lie))
    with running(service, address):
        assert read(address).requests == {"?[31mred": 3}
