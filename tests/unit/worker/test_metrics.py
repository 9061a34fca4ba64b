"""What a worker tells Prometheus and who asks for ``stats``: the same counters."""

from __future__ import annotations

import os
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from serving import metrics_of
from tiny_models import load_linears
from workers import free_port, packed_tiny

from tsqp.arith.ring import lay_out
from tsqp.config import WorkerConfig
from tsqp.errors import ConfigError, SetupError, WeightsError
from tsqp.model.packed import open_codes
from tsqp.transport.base import Incoming
from tsqp.wire import codec, messages
from tsqp.worker.batching import MAX_WAITING
from tsqp.worker.clients import Limits
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.memory import device_memory
from tsqp.worker.metrics import MetricsServer
from tsqp.worker.products import compute
from tsqp.worker.services import ExactService
from tsqp.worker.startup import Progress, open_worker

QKV = "layers.0.qkv"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def service(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> ExactService:
    packed = open_codes(packed_tiny(tiny_llama, tmp_path_factory.mktemp("metrics") / "packed"))
    groups = tuple(load_linears(tiny_llama).groups.values())
    return ExactService(groups, {group.name: lay_out(packed.read(group.name)) for group in groups}, CPU)


def request(number: int, rows: int, service: ExactService, group: str = QKV) -> list[codec.Buffer]:
    x = torch.ones(rows, service.groups[QKV].in_features, dtype=torch.int32)
    return [messages.encode(messages.LinearExact(id=number, group=group, x=codec.spec_of(x))), codec.frame_of(x)]


@pytest.fixture
def busy(service: ExactService) -> Dispatcher:
    """One that has answered two products of 3 and 2 rows together, a failure and a message of protocol 1; one waits."""
    dispatcher = Dispatcher(service, "/models/tiny", "digest")
    batch = [dispatcher.admit(incoming(request(rows, rows, service))) for rows in (3, 2)]
    dispatcher.finish(compute(service, [each for each in batch if each]))
    dispatcher.answer(request(9, 1, service, "nothing"))
    dispatcher.pass_on(Incoming((b"old",), legacy=True, reply=lambda _frames: None), lambda _frames: [b"answer"])
    waiting = dispatcher.admit(incoming(request(4, 1, service)))
    assert waiting
    dispatcher.queue.add(waiting)
    return dispatcher


def incoming(frames: list[codec.Buffer]) -> Incoming:
    return Incoming(tuple(frames), legacy=False, reply=lambda _frames: None)


@pytest.fixture
def served(busy: Dispatcher) -> Iterator[str]:
    notices: list[str] = []
    port = free_port()
    server = MetricsServer(f"127.0.0.1:{port}", notices.append)
    assert notices == []
    server.show(busy)
    yield f"http://127.0.0.1:{port}/metrics"
    server.close()
    server.close()


def read(url: str) -> dict[tuple[str, tuple[str, ...]], float]:
    with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310  loopback
        return metrics_of(answer.read().decode())


def test_prometheus_reads_what_the_dispatcher_counts(busy: Dispatcher, served: str, service: ExactService) -> None:
    waiting_bytes = sum(map(len, request(4, 1, service)))
    found = read(served)
    for name, value in {
        "errors_total": 1,
        "refused_total": 0,
        "received_bytes_total": busy.bytes_received,
        "sent_bytes_total": busy.bytes_sent,
        "products_total": 1,
        "product_requests_total": 2,
        "rows_total": 5,
        "compute_seconds_total": busy.compute_ns / 1e9,
        "copy_seconds_total": 0,
        "waiting_requests": 1,
        "waiting_bytes": waiting_bytes,
        "device_memory_total_bytes": device_memory(CPU)[1],
    }.items():
        assert found[f"tsqp_worker_{name}", ()] == value, name
    assert found["tsqp_worker_requests_total", ("linearexact",)] == 4
    assert found["tsqp_worker_requests_total", ("legacy",)] == 1
    assert found["tsqp_worker_compute_seconds_total", ()] > 0
    assert 0 < found["tsqp_worker_device_memory_bytes", ()] < found["tsqp_worker_device_memory_total_bytes", ()]
    (labels,) = [labels for name, labels in found if name == "tsqp_worker_info"]
    assert {"tiny", "digest", "exact", "cpu", "int8"} <= set(labels)
    busy.queue.take()
    again = read(served)
    assert again["tsqp_worker_waiting_requests", ()] == again["tsqp_worker_waiting_bytes", ()] == 0
    assert again["tsqp_worker_uptime_seconds", ()] > found["tsqp_worker_uptime_seconds", ()]


def test_a_client_is_told_the_same(busy: Dispatcher) -> None:
    reply, _ = codec.decode_reply(busy.answer([messages.encode(messages.Stats(id=7))]))
    assert isinstance(reply, messages.StatsResult)
    assert (reply.id, reply.rows, reply.waiting, reply.errors) == (7, 5, 1, 1)
    assert reply.waiting_bytes == busy.queue.size_bytes > 0
    assert reply.device_memory_total_bytes > reply.device_memory_bytes > 0
    assert reply.bytes_received == busy.bytes_received


def test_time_of_copies_is_summed(service: ExactService) -> None:
    dispatcher = Dispatcher(service, "tiny", "digest")
    waiting = dispatcher.admit(incoming(request(1, 1, service)))
    assert waiting
    (product,) = compute(service, [waiting])
    for _ in range(2):
        dispatcher.finish([type(product)(product.requests, product.outcomes, 3_000_000_000, 1_000_000_000)])
    stats = dispatcher.stats()
    assert (stats.compute_s, stats.copy_s) == (6.0, 2.0)


@pytest.mark.parametrize("address", ["ipc:///tmp/x", "127.0.0.1", "http://127.0.0.1:1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError):
        MetricsServer(address, lambda _text: None)


def test_a_port_that_is_taken_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = WorkerConfig(
            model=str(tmp_path / "missing"), device="cpu", listen=(f"ipc://{tmp_path}/worker",), metrics=address
        )
        with pytest.raises(ConfigError, match=f"cannot serve metrics on {address}: Address already in use"):
            open_worker(config, Progress(lambda _text: None, lambda _name, _done: None))


def test_a_worker_that_does_not_come_up_leaves_the_port(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    config = WorkerConfig(model=str(tmp_path), device="cpu", listen=(f"ipc://{tmp_path}/worker",), metrics=address)
    with pytest.raises(WeightsError):
        open_worker(config, Progress(lambda _text: None, lambda _name, _done: None))
    MetricsServer(address, lambda _text: None).close()


def test_others_can_read_it_only_where_that_is_said() -> None:
    notices: list[str] = []
    address = f"0.0.0.0:{free_port()}"
    MetricsServer(address, notices.append).close()
    assert notices == [f"metrics at {address} are open to the network, unencrypted: whoever reaches it can read them."]


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tsqp.worker.metrics", None)
    config = WorkerConfig(device="cpu", listen=(f"ipc://{tmp_path}/worker",), metrics="127.0.0.1:1")
    with pytest.raises(SetupError, match="not installed"):
        open_worker(config, Progress(lambda _text: None, lambda _name, _done: None))


def test_memory_of_a_cpu_is_this_process() -> None:
    used, total = device_memory(CPU)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    assert used == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.5)
    assert total >= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.5


def test_a_queue_that_is_full_is_told(service: ExactService) -> None:
    dispatcher = Dispatcher(service, "tiny", "digest", Limits(clients=MAX_WAITING))
    for number in range(MAX_WAITING):
        waiting = dispatcher.admit(incoming(request(number, 1, service)))
        assert waiting
        dispatcher.queue.add(waiting)
    assert not dispatcher.queue.has_room
    assert dispatcher.stats().waiting == MAX_WAITING
