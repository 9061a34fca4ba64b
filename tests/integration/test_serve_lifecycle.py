"""The server over sockets: limits, TLS, the worker's view, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest
from fake_engine import MODEL, FakeEngine
from http_server import Running, http_server, own_certificate
from openai import OpenAI

from tsqp.config import ServeConfig
from tsqp.errors import ConfigError, TransportClosedError
from tsqp.serve import padding
from tsqp.serve.bodies import read_body
from tsqp.serve.server import bind, check_exposure

_PATIENCE_S = 60


def client_of(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def status_of(server: Running, path: str) -> int:
    host = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


class Asking(threading.Thread):
    """Asks for a stream and keeps what comes of it."""

    def __init__(self, server: Running, *, stream: bool = True) -> None:
        super().__init__()
        self.server, self.stream, self.text = server, stream, ""
        self.error: openai.APIError | None = None
        self.start()

    def run(self) -> None:
        with client_of(self.server) as client:
            try:
                if self.stream:
                    for chunk in client.completions.create(model=MODEL, prompt="x", stream=True):
                        self.text += chunk.choices[0].text
                else:
                    self.text = client.completions.create(model=MODEL, prompt="x").choices[0].text
            except openai.APIError as error:
                self.error = error


@pytest.mark.parametrize("stream", [True, False])
def test_no_more_requests_at_once_than_the_limit(stream: bool) -> None:  # noqa: FBT001
    engine = FakeEngine(hold_after=2)
    with http_server(engine, max_requests=2) as server, client_of(server) as client:
        first, second = Asking(server, stream=stream), Asking(server, stream=stream)
        engine.wait_until_submitted(2)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model=MODEL, prompt="x")
        assert caught.value.code == "too_many_requests"
        assert caught.value.response.headers["retry-after"]
        assert status_of(server, "/status") == 200  # only text is limited
        engine.release()
        for asking in (first, second):
            asking.join()
            assert asking.text == "Hello, world"
        assert _once_there_is_room(client) == "Hello"


def _once_there_is_room(client: openai.OpenAI) -> str:
    """Ask again while the server is still closing an answer whose last words the client has."""
    for _ in range(200):
        with contextlib.suppress(openai.RateLimitError):
            return str(client.completions.create(model=MODEL, prompt="x", max_tokens=5).choices[0].text)
        time.sleep(0.05)
    raise AssertionError("there is no room after all answers have ended")


@pytest.mark.parametrize("stream", [True, False])
def test_stopping_lets_running_requests_finish(stream: bool) -> None:  # noqa: FBT001
    engine = FakeEngine(hold_after=2)
    with http_server(engine) as server:
        asking = Asking(server, stream=stream)
        engine.wait_until_submitted(1)
        server.server.should_exit = True
        with engine.changed:
            assert engine.changed.wait_for(lambda: engine.closed_with is not None, 60)
        engine.release()
        server.thread.join()
        asking.join()
    assert (asking.text, asking.error) == ("Hello, world", None)
    assert engine.closed_with == 30.0


@pytest.mark.parametrize("stream", [True, False])
def test_what_does_not_finish_in_time_ends_with_an_error(stream: bool) -> None:  # noqa: FBT001
    engine = FakeEngine(hold_after=2)
    with http_server(engine, drain_s=0.05) as server:
        asking = Asking(server, stream=stream)
        engine.wait_until_submitted(1)
        server.stop()
        asking.join()
    assert asking.error is not None
    assert asking.error.code == "stopping"


async def forever() -> AsyncIterator[dict[str, object]]:
    yield {"level": "open", "words": ["a"]}
    yield {"level": "open", "words": ["b"]}
    await asyncio.Event().wait()


class View:
    """A view that tells two things and then nothing more, and never ends."""

    def __aiter__(self) -> AsyncIterator[dict[str, object]]:
        return forever()


def test_the_workers_view_is_streamed_and_does_not_keep_the_server_from_ending(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with http_server(FakeEngine(), view=View(), drain_s=0) as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        connection.request("GET", "/view")
        answer = connection.getresponse()
        assert answer.getheader("content-type", "").startswith("text/event-stream")
        lines = [answer.readline() for _ in range(4)]
        assert [json.loads(line[6:])["words"] for line in lines if line.startswith(b"data: ")] == [["a"], ["b"]]
        server.stop()
        connection.close()
    assert "running task" not in caplog.text  # uvicorn says so where it had to cut a stream off


def test_a_request_that_is_cut_off_leaves_the_server_as_it_was() -> None:
    engine = FakeEngine()
    with http_server(engine) as server, client_of(server) as client:
        with raw_request(server, "/v1/completions", b"{", length=1000):
            pass
        assert client.completions.create(model=MODEL, prompt="x", max_tokens=5).choices[0].text == "Hello"
        assert len(engine.submitted) == 1


@contextlib.contextmanager
def raw_request(server: Running, path: str, body: bytes, length: int | None = None) -> Iterator[socket.socket]:
    """Send a request over a socket, of a body that says to have another length; yield the socket."""
    host, port = server.url.removeprefix("http://").split(":")
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close")
    head = "\r\n".join((*lines, f"Content-Length: {len(body) if length is None else length}", "", ""))
    with socket.create_connection((host, int(port)), timeout=_PATIENCE_S) as raw:
        raw.sendall(head.encode() + body)
        yield raw


def test_a_body_that_comes_too_slowly_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_body, "__defaults__", (0.1,))
    engine = FakeEngine()
    with http_server(engine) as server, raw_request(server, "/v1/completions", b'{"model"', length=1000) as raw:
        answer = http.client.HTTPResponse(raw)
        answer.begin()
        assert answer.status == 408
        assert json.load(answer)["error"]["code"] == "timeout"
        assert raw.recv(1) == b""  # the rest of that body is no request
        assert status_of(server, "/readyz") == 200
    assert engine.submitted == []


def records_of(server: Running, path: str, body: dict[str, object]) -> list[bytes]:
    """Return a stream's chunks as they are on the socket: what one record of TLS would hold."""
    with raw_request(server, path, json.dumps({"model": MODEL, "stream": True, **body}).encode()) as raw:
        content = b"".join(iter(lambda: raw.recv(1 << 16), b""))
    head, _, rest = content.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    chunks = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    assert chunks.pop() == b""
    return chunks


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})],
)
@pytest.mark.parametrize("fails", [False, True])
def test_at_masked_every_record_of_a_stream_has_one_size_its_end_too(
    path: str,
    body: dict[str, object],
    fails: bool,  # noqa: FBT001
) -> None:
    engine = FakeEngine(fail_after=3 if fails else None, error=TransportClosedError("gone. " * 3))
    with http_server(engine, level="masked") as server:
        records = records_of(server, path, {**body, "stream_options": {"include_usage": True}})
    assert {len(record) for record in records} == {padding.EVENT_BYTES}
    assert len(records) > 3
    assert (b"worker_unavailable" in records[-1]) == fails
    assert (b"data: [DONE]" in records[-1]) != fails


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return own_certificate(tmp_path_factory.mktemp("tls"))


def test_tls_with_an_own_certificate(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    context = ssl.create_default_context(cafile=str(cert))
    with http_server(FakeEngine(), tls_cert=str(cert), tls_key=str(key)) as server:
        assert server.url.startswith("https://")
        connection = http.client.HTTPSConnection(server.url.removeprefix("https://"), context=context)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()


def test_settings_that_would_serve_strangers_are_refused(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = (str(path) for path in certificate)
    notices: list[str] = []
    with pytest.raises(ConfigError, match="no API keys"):
        check_exposure(ServeConfig(host="0.0.0.0"), notices.append)  # noqa: S104
    with pytest.raises(ConfigError, match="both a certificate and its key"):
        check_exposure(ServeConfig(tls_cert=cert), notices.append)
    with pytest.raises(ConfigError, match="no certificate and its key"):
        check_exposure(ServeConfig(tls_cert=key, tls_key=key), notices.append)
    check_exposure(ServeConfig(), notices.append)
    check_exposure(ServeConfig(host="192.0.2.1", api_keys="f", tls_cert=cert, tls_key=key), notices.append)
    assert notices == []
    certificate[1].chmod(0o640)
    check_exposure(ServeConfig(tls_cert=cert, tls_key=key), notices.append)
    certificate[1].chmod(0o604)
    with pytest.raises(ConfigError, match=rf"{key} can be read by everybody on this machine \(mode 0604\)"):
        check_exposure(ServeConfig(tls_cert=cert, tls_key=key), notices.append)
    certificate[1].chmod(0o600)
    check_exposure(ServeConfig(host="192.0.2.1", api_keys="f"), notices.append)
    assert len(notices) == 1
    monkeypatch.setattr("tsqp.serve.server.tee_name", lambda: "SGX")
    with pytest.raises(ConfigError, match="inside SGX"):
        check_exposure(ServeConfig(host="192.0.2.1", api_keys="f"), notices.append)


def test_an_address_that_is_taken_is_named() -> None:
    with bind(ServeConfig(port=0)) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: Address already in use"):
            bind(ServeConfig(port=port))
    with pytest.raises(ConfigError, match="cannot be resolved"):
        bind(ServeConfig(host="no.such.host.invalid"))
