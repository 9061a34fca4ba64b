"""Several clients over real sockets: their requests become one product, and none disturbs another."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import load_linears
from torch import Tensor
from workers import packed_tiny

from tsqp.arith.ring import lay_out
from tsqp.enclave.session import Session
from tsqp.errors import BusyError, InputError, TsqpError
from tsqp.model.packed import open_codes
from tsqp.transport.base import Delivery, Incoming
from tsqp.transport.client import open_client
from tsqp.transport.server import Server
from tsqp.transport.spinning import Ahead
from tsqp.transport.urls import Endpoint, parse
from tsqp.wire import codec, messages
from tsqp.worker.clients import Limits
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.server import Worker
from tsqp.worker.services import ExactService

LIMIT_BYTES = 1 << 22
PATIENCE_S = 60.0
QKV, DOWN = "layers.0.qkv", "layers.0.down"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def service(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> ExactService:
    packed = open_codes(packed_tiny(tiny_llama, tmp_path_factory.mktemp("together") / "packed"))
    groups = tuple(load_linears(tiny_llama).groups.values())
    return ExactService(groups, {group.name: lay_out(packed.read(group.name)) for group in groups}, CPU)


@pytest.fixture(params=["ipc", "shm"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Endpoint:
    return parse(f"{request.param}://{tmp_path}/worker")


class Served:
    """A worker in a thread of its own, which takes nothing before ``go``: until then requests wait together."""

    def __init__(self, service: ExactService, endpoint: Endpoint, limits: Limits) -> None:
        self.server = Server([endpoint], LIMIT_BYTES)
        self.dispatcher = Dispatcher(service, "tiny", "digest", limits)
        self.worker = Worker(self.dispatcher, self.server)
        self._thread = threading.Thread(target=self.worker.serve)

    def go(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.worker.stop()
        if self._thread.ident:
            self._thread.join(PATIENCE_S)
        self.server.close()


@contextmanager
def running(
    service: ExactService, endpoint: Endpoint, clients: int, limits: Limits | None = None
) -> Iterator[tuple[Served, list[Session]]]:
    served = Served(service, endpoint, limits or Limits())
    sessions = [Session(open_client(endpoint, LIMIT_BYTES), PATIENCE_S) for _ in range(clients)]
    try:
        yield served, sessions
    finally:
        for session in sessions:
            session.close()
        served.close()


def words(rows: int, inputs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 31), 1 << 31, (rows, inputs), generator=generator).to(torch.int32)


def ask(session: Session, group: str, x_MK: Tensor) -> int:
    make = partial(_header, group, codec.spec_of(x_MK))
    return session.submit(make, [codec.frame_of(x_MK)])


def _header(group: str, spec: messages.TensorSpec, request_id: int) -> messages.LinearExact:
    return messages.LinearExact(id=request_id, group=group, x=spec)


def taken(session: Session, request_id: int, rows: int, outputs: int) -> Tensor:
    reply, delivered = session.result(request_id, messages.Result)
    frames = delivered.private() if isinstance(delivered, Delivery) else delivered
    expect = messages.TensorSpec("int32", (rows, outputs))
    return codec.claim(reply, frames, expect, "test").unverified()


class Scripted:
    """A transport over which messages come one after the other, and then the parent hangs up."""

    ahead: Ahead | None = None

    def __init__(self, messages_: list[Incoming]) -> None:
        self._left = messages_

    @property
    def hung_up(self) -> bool:
        return not self._left

    def receive(self, timeout_s: float) -> Incoming | None:  # noqa: ARG002
        return self._left.pop(0) if self._left else None

    def close(self, linger_s: float = 0.0) -> None:
        """Nothing to close."""


def test_requests_of_the_first_protocol_take_turns_with_products(service: ExactService) -> None:
    """They are answered when they come, but one at a time while others wait."""
    answered: list[str] = []

    def message(name: str) -> Incoming:
        reply = lambda _frames: answered.append(name)  # noqa: E731
        if name.startswith("old"):
            return Incoming((b"old",), legacy=True, reply=reply)
        x_MK = words(1, service.groups[name].in_features, 1)
        header = messages.LinearExact(id=1, group=name, x=codec.spec_of(x_MK))
        return Incoming((messages.encode(header), codec.frame_of(x_MK)), legacy=False, reply=reply)

    script = Scripted([message(name) for name in (QKV, DOWN, "old 1", "old 2", "old 3")])
    Worker(Dispatcher(service, "tiny", "digest"), script).serve()
    assert answered == ["old 1", QKV, "old 2", DOWN, "old 3"]


def test_each_client_gets_its_own_rows(service: ExactService, endpoint: Endpoint) -> None:
    """Five clients, two of them for another group, one with two requests under way, one with an invalid one."""
    asked = [(0, QKV, 1), (1, DOWN, 7), (2, QKV, 16), (3, DOWN, 2), (4, QKV, 5), (4, DOWN, 3)]
    with running(service, endpoint, 6) as (served, sessions):
        ids = []
        for seed, (client, group, rows) in enumerate(asked):
            ids.append(ask(sessions[client], group, words(rows, service.groups[group].in_features, seed)))
            if seed == 2:
                bad = ask(sessions[5], QKV, words(1, 47, 0))
        served.go()
        for seed, ((client, group, rows), request_id) in enumerate(zip(asked, ids, strict=True)):
            spec = service.groups[group]
            want = service.multiply(group, words(rows, spec.in_features, seed))
            assert torch.equal(taken(sessions[client], request_id, rows, spec.rows), want)
        with pytest.raises(InputError, match=r"expects int32 of shape"):
            sessions[5].result(bad, messages.Result)
        stats, _ = sessions[0].result(sessions[0].submit(lambda i: messages.Stats(id=i)), messages.StatsResult)
    assert stats.product_requests == len(asked)
    assert stats.products < len(asked)


def test_a_client_that_is_gone_takes_nobody_with_it(service: ExactService, endpoint: Endpoint) -> None:
    with running(service, endpoint, 3) as (served, sessions):
        ids = [ask(session, QKV, words(4, 48, seed)) for seed, session in enumerate(sessions)]
        sessions[1].close()
        served.go()
        for seed in (0, 2):
            want = service.multiply(QKV, words(4, 48, seed))
            assert torch.equal(taken(sessions[seed], ids[seed], 4, service.groups[QKV].rows), want)


def test_a_clients_older_request_keeps_its_memory_while_a_newer_is_answered(
    service: ExactService, endpoint: Endpoint
) -> None:
    """Replies may come in another order than requests; what waits must not be overwritten by what is sent next."""
    down, qkv = service.groups[DOWN], service.groups[QKV]
    with running(service, endpoint, 2) as (served, sessions):
        first = ask(sessions[0], QKV, words(1, 48, 0))
        rounds = [(ask(sessions[1], DOWN, words(64, 80, i)), ask(sessions[1], QKV, words(64, 48, i))) for i in range(8)]
        served.go()
        taken(sessions[0], first, 1, qkv.rows)
        for i, (older, newer) in enumerate(rounds):
            want = service.multiply(QKV, words(64, 48, i))
            assert torch.equal(taken(sessions[1], newer, 64, qkv.rows), want)
            again = ask(sessions[1], QKV, words(64, 48, 100 + i))
            want = service.multiply(DOWN, words(64, 80, i))
            assert torch.equal(taken(sessions[1], older, 64, down.rows), want)
            want = service.multiply(QKV, words(64, 48, 100 + i))
            assert torch.equal(taken(sessions[1], again, 64, qkv.rows), want)


@pytest.mark.parametrize("clients", [1, 2])
def test_a_failed_request_keeps_nothing_of_its_client(
    service: ExactService,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uncollected: None,  # noqa: ARG001
    clients: int,
) -> None:
    """What a client shared is given back when it goes, not when the garbage collector comes."""

    def fails(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("full")

    with running(service, parse(f"shm://{tmp_path}/worker"), clients) as (served, sessions):
        monkeypatch.setattr(service, "multiply", fails)
        ours = regions()
        asked = [(session, ask(session, DOWN, words(64, 80, 1))) for session in sessions]
        served.go()
        for session, request_id in asked:
            with pytest.raises(TsqpError):
                session.result(request_id, messages.Result)
        assert regions() == ours + clients
        for session in sessions:
            session.close()
        deadline = time.monotonic() + PATIENCE_S
        while regions() > ours and time.monotonic() < deadline:
            time.sleep(0.01)
        assert regions() == ours


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def regions() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"/memfd:tsqp")


def test_a_client_beyond_its_limit_gets_all_its_replies_later(service: ExactService, endpoint: Endpoint) -> None:
    """Over shared memory it is not heard for a while; over ZeroMQ it is refused, and sends the same bytes again."""
    with running(service, endpoint, 2, Limits(requests=4)) as (served, sessions):
        asked = [ask(sessions[0], QKV, words(1, 48, seed)) for seed in range(16)]
        other = ask(sessions[1], QKV, words(1, 48, 99))
        served.go()
        want = service.multiply(QKV, words(1, 48, 99))
        assert torch.equal(taken(sessions[1], other, 1, service.groups[QKV].rows), want)
        for seed, request_id in enumerate(asked):
            want = service.multiply(QKV, words(1, 48, seed))
            assert torch.equal(taken(sessions[0], request_id, 1, service.groups[QKV].rows), want)
        stats, _ = sessions[0].result(sessions[0].submit(lambda i: messages.Stats(id=i)), messages.StatsResult)
    assert stats.clients == 2
    assert stats.product_requests == 17
    assert (stats.refused > 0) == (endpoint.scheme == "ipc")


def test_more_clients_than_there_may_be_are_told_so(service: ExactService, endpoint: Endpoint) -> None:
    with running(service, endpoint, 2, Limits(clients=1)) as (served, sessions):
        served.go()
        sessions[0].hello(PATIENCE_S)
        with pytest.raises(BusyError, match=r"is busy: the worker has 1 clients, as many as it takes"):
            sessions[1].hello(0.1)
        sessions[0].close()
        sessions[1].hello(PATIENCE_S)
