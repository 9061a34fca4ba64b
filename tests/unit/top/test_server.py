"""A server is read by its /metrics; what is no server, or will not tell, is a sentence."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine
from http_server import http_server, own_certificate
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from typer.testing import CliRunner
from workers import free_port

from tsqp.cli import app
from tsqp.config import EngineConfig, load
from tsqp.errors import ConfigError, PeerKeyError, ProtocolError, SetupError, TransportError, TsqpError
from tsqp.serve.keys import new_key
from tsqp.top.server import ServerSource, reading_of

TIMEOUT_S = 60.0


def source(url: str, key: str | None = None, context: ssl.SSLContext | None = None) -> ServerSource:
    return ServerSource(url, key, context, TIMEOUT_S)


def test_a_server_tells_its_numbers() -> None:
    engine = FakeEngine()
    with http_server(engine, level="masked") as server, OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        before = source(server.url).read()
        client.completions.create(model=MODEL, prompt="abc", max_tokens=4)
        list(client.completions.create(model=MODEL, prompt="abc", max_tokens=4, stream=True))
        client._client.post(f"{server.url}/v1/completions", json={"model": "other", "prompt": "x"})
        client._client.post(f"{server.url}/v1/chat/completions", json={"model": MODEL, "messages": 1})
        client._client.get(f"{server.url}/favicon.ico")
        engine.wait_until_idle()
        found = source(f"{server.url}/v1").read()
    assert (found.kind, found.model, found.serves, found.ready) == ("server", MODEL, "masked", True)
    assert found.software.startswith("tsqp ")
    assert found.uptime_s > before.uptime_s > 0
    assert before.requests == {}
    assert found.requests == {"completions": 3, "chat/completions": 1}
    assert (found.errors, found.failed, found.integrity_failures) == (2, 0, 1)
    assert found.counters == {"tokens": 8, "prompt_tokens": 6, "bytes_in": 2000, "bytes_out": 1000}
    assert (found.waiting, found.running, found.batch, found.pool_held, found.pool_wanted) == (3, 0, 4, 100, 200)
    assert (found.workers, found.workers_usable) == (2, 1)
    assert found.cache_used == pytest.approx(54 / 64)
    assert found.parts == {"worker": 1.5, "wire": 0.5, "rest": 0.0, "sampling": 0.0}


def test_why_a_server_is_not_ready_is_asked() -> None:
    with http_server(FakeEngine(ready=False, reason="no worker is \x1b[31mleft.")) as server:
        found = source(server.url).read()
    assert (found.ready, found.reason) == (False, "no worker is ?[31mleft.")


PARTS = {"worker": 1.0, "wire": 2.0, "enclave": 10.0, "attention": 3.0, "check": 4.0, "sampling": 0.5, "mask_fill": 9.0}


def test_parts_of_the_enclave_are_not_counted_twice() -> None:
    text = "tsqp_engine_ready 1\n" + "".join(
        f'tsqp_engine_part_seconds_total{{part="{name}"}} {value}\n' for name, value in PARTS.items()
    )
    found = reading_of(text.encode(), "there")
    assert found.parts == {
        "worker": 1.0, "wire": 2.0, "attention": 3.0, "check": 4.0, "rest": 3.0, "sampling": 0.5, "mask_fill": 9.0,
    }  # fmt: skip


def test_a_server_with_keys_wants_one_from_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = new_key(file, "ada")
    with http_server(FakeEngine(), api_keys=str(file)) as server:
        assert source(server.url).read().ready  # of this machine
        assert source(server.url, key).read().ready
        with pytest.raises(ConfigError, match=r"give --api-key-file \(TSQP_API_KEY\). HTTP 401"):
            source(server.url, "wrong").read()


def test_a_key_is_not_sent_in_clear_over_a_network() -> None:
    with pytest.raises(ConfigError, match=r"would travel to http://192.0.2.7:8000 unencrypted"):
        source("http://192.0.2.7:8000", "secret")
    assert source("http://192.0.2.7:8000").url == "http://192.0.2.7:8000"
    for url in ("http://localhost:1", "http://127.0.0.1:1", "http://[::1]:1", "https://192.0.2.7"):
        source(url, "secret")


def test_over_tls_the_server_must_show_a_certificate_that_is_trusted(tmp_path: Path) -> None:
    cert, key = own_certificate(tmp_path)
    with http_server(FakeEngine(), tls_cert=str(cert), tls_key=str(key)) as server:
        assert source(server.url, "any", ssl.create_default_context(cafile=str(cert))).read().ready
        with pytest.raises(PeerKeyError, match="give --ca FILE, or --policy FILE"):
            source(server.url).read()
        with pytest.raises(TransportError, match="Is 'tsqp serve' running"):
            source(server.url.replace("https", "http")).read()
    with http_server(FakeEngine()) as server, pytest.raises(TransportError, match="does not speak TLS"):
        source(server.url.replace("http", "https")).read()


@pytest.mark.parametrize("url", ["http://", "http://:1", "http://h:x", "http://h:0", "ftp://h:1", "http://me:you@h:1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected http://HOST:PORT"):
        source(url)


def test_nobody_there_may_be_there_later() -> None:
    with pytest.raises(TransportError, match=r"no server answers at .*Connection refused"):
        source(f"http://127.0.0.1:{free_port()}").read()
    with pytest.raises(ConfigError, match="cannot be resolved"):
        source("http://nowhere.invalid:1").read()


@contextmanager
def answering(body: bytes, status: int = 200) -> Iterator[str]:
    """Answer anything with this."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        (b"up 1\n", 200, ConfigError, "is not that of a 'tsqp serve'"),
        (b"", 404, ConfigError, "HTTP 404; expected the address of a 'tsqp serve'"),
        (b"", 302, ConfigError, "HTTP 302"),
        (b"tsqp_engine_ready 1\n<html>\n", 200, ProtocolError, "not what a server tells"),
        (b"tsqp_engine_ready 1\ntsqp_engine_queued -1\n", 200, ProtocolError, "not what a server tells"),
        (b"tsqp_engine_ready 1\ntsqp_engine_queued NaN\n", 200, ProtocolError, "not what a server tells"),
        (b"tsqp_engine_ready 1\ntsqp_engine_queued +Inf\n", 200, ProtocolError, "not what a server tells"),
        (b"\xff", 200, ProtocolError, "not what a server tells"),
        (b"#" * (1 << 20) + b"##", 200, ProtocolError, "more than 1048576 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_who_answers_something_else_is_refused(body: bytes, status: int, kind: type[TsqpError], message: str) -> None:
    with answering(body, status) as url, pytest.raises(kind, match=message):
        source(url).read()


def test_histograms_are_no_mistake() -> None:
    text = b'tsqp_engine_ready 1\ntsqp_x_bucket{le="+Inf"} 3\ntsqp_http_requests_total{path="/v1/completions"} 3\n'
    with pytest.raises(ProtocolError):
        reading_of(text, "there")
    assert reading_of(text.replace(b"path=", b'status="200",path='), "there").requests == {"completions": 3}


@given(
    st.lists(st.sampled_from(["tsqp_engine_ready", "{", "}", 'a="b"', '"', "\\", " 1", "\n", "# ", "TYPE x y", "é"]))
)
def test_any_text_is_a_reading_or_an_error(parts: list[str]) -> None:
    with suppress(ProtocolError, ConfigError):
        assert reading_of("".join(parts).encode(), "there").kind == "server"


def top(*words: str, **environment: str) -> Any:
    return CliRunner().invoke(app, ["top", *words], env={"TSQP_API_KEY": None, **environment})


def test_the_command_shows_a_server_once(tmp_path: Path) -> None:
    file, private = tmp_path / "keys", tmp_path / "key"
    private.write_text(new_key(file, "ada") + "\n", encoding="ascii")
    with http_server(FakeEngine(), api_keys=str(file), level="verified") as server:
        done = top(server.url, "--once", "--json", "--interval", "0.1", "--api-key-file", str(private))
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert (found["kind"], found["serves"], found["waiting"]) == ("server", "verified", 3)
        assert found["interval_s"] >= 0.1
        done = top(server.url, "--once", "--interval", "0.1", TSQP_API_KEY=private.read_text(encoding="ascii").strip())
        assert done.exit_code == 0, done.output
        assert "tiny, level verified" in done.stdout
        done = top(server.url, "--once", "--json", TSQP_API_KEY="wrong")
        assert done.exit_code == 3
        assert json.loads(done.stdout)["error"]["type"] == "ConfigError"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--interval", "0"], "--interval 0: expected seconds, from 0.1 to 3600"),
        (["--interval", "nan"], "--interval nan: expected"),
        (["127.0.0.1:1", "--ca", "x"], "--api-key-file, --ca and --policy are for a server"),
        (["https://h:1", "--ca", "x", "--policy", "y"], "give --ca or --policy, not both"),
        (["https://h:1", "--ca", "/nothing"], "/nothing has no certificates in PEM form: No such file"),
        (["https://h:1", "--policy", "/nothing"], "cannot read the policy /nothing"),
        (["http://localhost:1", "--api-key-file", "/nothing"], "cannot read the API key in /nothing: No such file"),
        (["http://localhost:1", "--api-key-file", "/dev/null"], "/dev/null: expected one API key and nothing else"),
        (["nowhere"], "endpoint 'nowhere'"),
    ],
)
def test_what_cannot_be_watched_is_a_sentence(words: list[str], message: str) -> None:
    done = top(*words, "--once")
    assert done.exit_code == 3
    assert message in done.stderr


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tsqp.top.server", None)
    done = top("http://localhost:1")
    assert done.exit_code == SetupError.exit_code
    assert "is not installed: run 'pip install tsqp[metrics]'" in done.stderr


def test_the_keys_variable_does_not_trouble_other_commands() -> None:
    assert load(EngineConfig, env={"TSQP_API_KEY": "x"}) == EngineConfig()
