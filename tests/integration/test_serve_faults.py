"""A worker that lies and a worker that goes away, as clients of the HTTP server see it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from attacks.lies import LIES
from attacks.test_over_sockets import HostileServer
from bad_requests import CHAT, COMPLETIONS, Answered, get, post, streamed
from hostile import HostilePeer, Material, claiming, on
from openai import OpenAI
from real_serving import MODEL, served_engine, speaking_checkpoint
from workers import free_port, packed_tiny

from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine.loop import GenerationEngine
from tsqp.engine.opening import open_engine
from tsqp.launch import local_worker
from tsqp.levels import open_model
from tsqp.paths import private_socket_directory
from tsqp.wire import messages

LIE = on("layers.1.down", claiming(LIES["a word off by 1"]))
LONG = {"model": MODEL, "max_tokens": 700, "temperature": 0, "ignore_eos": True}
SHORT = json.dumps({"model": MODEL, "prompt": "abc", "max_tokens": 6, "temperature": 0}).encode()
_PATIENCE_S = 60


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking_checkpoint(tmp_path_factory.mktemp("faults") / "tiny")


@pytest.fixture(scope="module")
def packed(floats: Path) -> Path:
    return packed_tiny(floats, floats.parent / "packed")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Served:
    """A server whose worker is at an address."""

    def __init__(self, directory: Path, level: str, address: str, stack: ExitStack, max_running: int = 64) -> None:
        model = open_model(str(directory), level)
        config = EnclaveConfig(level=level, worker=address, connect_timeout_s=1.0, request_timeout_s=20.0)
        settings = EngineConfig(kv_memory=1 << 21, max_running=max_running)
        self.engine: GenerationEngine = stack.enter_context(open_engine(model, config, settings))
        self._server = stack.enter_context(served_engine(self.engine, model, level))
        self.url = self._server.url
        self.host = self.url.removeprefix("http://")

    def complete(self) -> Answered:
        return post(self.host, COMPLETIONS, SHORT)

    def running(self) -> Asking:
        """Ask for two streams and a whole answer, and wait until all of them are being generated."""
        asking = Asking(self)
        until(lambda: self.engine.stats().batch_rows == 3)  # a token of each
        steps = self.engine.stats().steps
        until(lambda: self.engine.stats().steps > steps + 10)
        return asking

    def until_ready(self) -> None:
        until(lambda: get(self.host, "/readyz").status == 200)

    def metric(self, name: str) -> int:
        connection = HTTPConnection(self.host)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return sum(int(float(line.split()[-1])) for line in text.splitlines() if line.startswith(name))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.02)


class Asking:
    """Requests that are running."""

    def __init__(self, served: Served) -> None:
        chat = {**LONG, "messages": [{"role": "user", "content": "x"}]}
        self._streams: list[list[Any]] = []
        self._wholes: list[Answered] = []
        asks: list[Callable[[], None]] = [
            lambda: self._streams.append(streamed(served.host, COMPLETIONS, {**LONG, "prompt": "abc"})),
            lambda: self._streams.append(streamed(served.host, CHAT, chat)),
            lambda: self._wholes.append(post(served.host, CHAT, json.dumps(chat).encode())),
        ]
        self._threads = [threading.Thread(target=ask) for ask in asks]
        for thread in self._threads:
            thread.start()

    def errors(self) -> tuple[list[dict[str, Any]], Answered]:
        """Wait for the end; return the last event of each stream, and the answer that is none."""
        for thread in self._threads:
            thread.join()
        assert len(self._streams) == 2
        assert all(len(events) > 2 for events in self._streams)  # some of the answer, and then the error
        assert not any("error" in event for events in self._streams for event in events[:-1])
        return [events[-1]["error"] for events in self._streams], self._wholes[0]


@pytest.mark.parametrize("level", ["verified", "masked"])
def test_a_wrong_product_ends_all_requests_and_nothing_is_served_any_more(
    level: str, packed: Path, stack: ExitStack
) -> None:
    directory = stack.enter_context(private_socket_directory())
    liar = HostilePeer(f"ipc://{directory}/worker", Material.read(packed).dispatcher())
    stack.callback(HostileServer(liar, liar.address).close)
    served = Served(packed, level, liar.address, stack)
    assert served.complete().status == 200
    asking = served.running()
    liar.tamper = LIE
    events, whole = asking.errors()
    products = len(products_of(liar))
    liar.tamper = lambda exchange: [exchange.reply]  # too late
    assert (whole.status, whole.headers["x-should-retry"]) == (500, "false")
    for error in (*events, whole.content["error"]):
        assert (error["type"], error["code"]) == ("integrity_error", "integrity_error")
        assert liar.address in error["message"]
        assert "layers.1.down" in error["message"]
    # Ready again is only who has another worker.
    until(lambda: "no usable worker" in served.engine.stats().reason)
    ready = get(served.host, "/readyz")
    assert ready.status == 503
    assert liar.address in ready.content["reason"]
    refused = served.complete()
    assert (refused.status, refused.headers["x-should-retry"]) == (503, "false")
    error = refused.content["error"]
    assert (error["type"], error["code"]) == ("integrity_error", "not_ready")
    assert error["message"] == ready.content["reason"]
    assert served.metric("tsqp_engine_integrity_failures_total ") == 1
    assert served.metric('tsqp_generations_failed_total{code="integrity_error"}') == 3
    assert served.metric("tsqp_engine_ready ") == 0
    asked = served.metric('tsqp_http_requests_total{path="/v1/completions"')
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=3) as client:
        with pytest.raises(openai.InternalServerError, match="no usable worker"):
            client.completions.create(model=MODEL, prompt="x")
        with pytest.raises(openai.InternalServerError, match="no usable worker"):
            client.completions.create(model=MODEL, prompt="x", stream=True)
    assert served.metric('tsqp_http_requests_total{path="/v1/completions"') == asked + 2
    assert served.engine._broken is not None
    assert served.engine._broken.__traceback__ is None  # else frames of all who were refused, with their prompts
    time.sleep(1.5)  # longer than an engine waits before it tries a lost link again
    assert len(products_of(liar)) == products
    stats = served.engine.stats()
    assert (stats.running, stats.queued, stats.ready) == (0, 0, False)


def test_who_waits_when_the_last_worker_lies_is_told_that_none_is_left(packed: Path, stack: ExitStack) -> None:
    directory = stack.enter_context(private_socket_directory())
    liar = HostilePeer(f"ipc://{directory}/worker", Material.read(packed).dispatcher())
    stack.callback(HostileServer(liar, liar.address).close)
    served = Served(packed, "masked", liar.address, stack, max_running=1)
    runs: list[Answered] = []
    waits: list[Answered] = []
    events: list[Any] = []
    body = {**LONG, "prompt": "abc"}
    asks: list[Callable[[], None]] = [
        lambda: runs.append(post(served.host, COMPLETIONS, json.dumps(body).encode())),
        lambda: waits.append(post(served.host, COMPLETIONS, json.dumps(body).encode())),
        lambda: events.extend(streamed(served.host, COMPLETIONS, body)),
    ]
    threads = [threading.Thread(target=ask) for ask in asks]
    threads[0].start()
    until(lambda: served.engine.stats().completion_tokens > 2)
    for thread in threads[1:]:
        thread.start()
    until(lambda: served.engine.stats().queued == 2)
    liar.tamper = LIE
    for thread in threads:
        thread.join()
    assert (runs[0].status, runs[0].content["error"]["code"]) == (500, "integrity_error")
    assert (waits[0].status, waits[0].headers["x-should-retry"]) == (503, "false")
    assert len(events) == 1
    for error in (waits[0].content["error"], events[0]["error"]):
        assert (error["type"], error["code"]) == ("integrity_error", "not_ready")
        assert error["message"].startswith("no usable worker is left. ")


def products_of(peer: HostilePeer) -> list[object]:
    return [sent for sent in peer.journal if isinstance(sent.header, messages.LinearExact)]


@pytest.mark.parametrize("level", ["masked", "open"])
def test_a_lost_worker_ends_all_requests_and_the_server_serves_again_when_it_is_back(
    level: str, floats: Path, packed: Path, stack: ExitStack
) -> None:
    directory = packed if level == "masked" else floats
    words = ["--model", str(directory), "--threads", "1", "--listen", (address := f"127.0.0.1:{free_port()}")]
    before = set(psutil.Process().children())
    stack.enter_context(local_worker(words))
    [process] = set(psutil.Process().children()) - before
    served = Served(directory, level, address, stack)
    answered = served.complete()
    assert answered.status == 200
    asking = served.running()
    process.kill()
    events, whole = asking.errors()
    assert (whole.status, whole.headers["retry-after"]) == (502, "1")
    for error in (*events, whole.content["error"]):
        assert (error["type"], error["code"]) == ("worker_error", "worker_unavailable")
        assert address in error["message"]
    until(lambda: "no usable worker" in served.engine.stats().reason)
    ready = get(served.host, "/readyz")
    assert ready.status == 503
    assert address in ready.content["reason"]
    refused = served.complete()
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    assert "x-should-retry" not in refused.headers
    assert (refused.content["error"]["type"], refused.content["error"]["code"]) == ("worker_error", "not_ready")
    assert served.metric("tsqp_engine_integrity_failures_total ") == 0
    assert served.metric('tsqp_generations_failed_total{code="worker_unavailable"}') == 3
    stack.enter_context(local_worker(words))
    served.until_ready()
    assert served.complete().content["choices"] == answered.content["choices"]
    assert served.metric("tsqp_engine_ready ") == 1
    stats = served.engine.stats()
    assert (stats.running, stats.queued) == (0, 0)
