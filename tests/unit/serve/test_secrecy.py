"""Who may ask, and what must not be told: keys, names of hosts, logs, sizes of records, core dumps."""

from __future__ import annotations

import base64
import ctypes
import errno
import json
import logging
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine
from fastapi.testclient import TestClient
from http_server import http_server
from openai import OpenAI
from serving import Serve

from tsqp.errors import ConfigError, SetupError
from tsqp.serve import padding, process
from tsqp.serve.keys import new_key, read_keys

ASK = {"model": MODEL, "prompt": "x", "max_tokens": 1}
OWN = ("/", "/metrics", "/status")
HEALTH = ("/healthz", "/readyz")
CANARY = "xyzzy-plugh-secret"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_key_file_holds_no_key_and_is_private(key_file: Path) -> None:
    key = new_key(key_file, "ada")
    assert key not in key_file.read_text(encoding="ascii")
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    other = new_key(key_file, "bob")
    keys = read_keys(key_file)
    assert (keys.owner(key), keys.owner(other)) == ("ada", "bob")
    assert keys.owner(key[:-1]) is None
    assert keys.owner(key + "x") is None
    assert keys.owner("") is None
    assert key not in repr(keys)
    with pytest.raises(ConfigError, match="has a key named ada"):
        new_key(key_file, "ada")
    with pytest.raises(ConfigError, match="expected letters"):
        new_key(key_file, "a:b")


@pytest.mark.parametrize("text", ["ada", "ada:00:11", "", "# nothing\n", f"a:{'0' * 32}:{'0' * 64}\n" * 2])
def test_a_key_file_that_is_none_is_refused(text: str, key_file: Path) -> None:
    key_file.write_text(text, encoding="ascii")
    with pytest.raises(SetupError):
        read_keys(key_file)


def test_a_key_file_that_others_can_change_is_refused(key_file: Path) -> None:
    new_key(key_file, "ada")
    key_file.chmod(0o660)
    with pytest.raises(SetupError, match="written by others"):
        read_keys(key_file)
    with pytest.raises(SetupError, match="No such file"):
        read_keys(key_file.with_name("missing"))


def test_the_api_wants_a_key_where_there_are_keys_and_tells_the_engine_whose_it_was(
    key_file: Path, serve: Serve
) -> None:
    key, engine = new_key(key_file, "ada"), FakeEngine()
    client = serve(engine, api_keys=str(key_file))
    for headers in ({}, bearer("wrong"), {"authorization": key}, {"authorization": "Basic !"}):
        answer = client.post("/v1/completions", json=ASK, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get("/v1/models", headers=headers).status_code == 401
    assert engine.submitted == []
    assert client.post("/v1/completions", json=ASK, headers=bearer(key)).status_code == 200
    basic = {"authorization": "Basic " + base64.b64encode(f"me:{key}".encode()).decode()}
    assert client.post("/v1/completions", json=ASK, headers=basic).status_code == 200
    assert [generation.owner for generation in engine.submitted] == ["ada", "ada"]


def test_without_keys_requests_belong_to_nobody(serve: Serve) -> None:
    engine = FakeEngine()
    serve(engine).post("/v1/completions", json=ASK)
    assert [generation.owner for generation in engine.submitted] == [""]


@pytest.mark.parametrize("path", OWN)
def test_the_page_and_the_numbers_are_for_this_machine_or_a_key(path: str, key_file: Path, serve: Serve) -> None:
    key, engine = new_key(key_file, "ada"), FakeEngine()
    assert serve(engine, api_keys=str(key_file)).get(path).status_code == 200
    far = serve(engine, api_keys=str(key_file), client="192.0.2.7", host="enclave.example")
    answer = far.get(path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic")
    assert far.get(path, headers=bearer(key)).status_code == 200
    for header in ("x-forwarded-for", "forwarded", "x-real-ip"):
        proxied = serve(engine, api_keys=str(key_file)).get(path, headers={header: "192.0.2.7"})
        assert proxied.status_code == 401


@pytest.mark.parametrize("path", [*OWN, "/v1/models"])
def test_without_keys_only_who_names_this_machine_is_answered(path: str, serve: Serve) -> None:
    engine = FakeEngine()
    for host in ("127.0.0.1", "localhost", "localhost:8000", "[::1]:8000"):
        assert serve(engine, host=host).get(path).status_code == 200
    assert serve(engine, host="evil.example").get(path).status_code == 403  # DNS rebinding
    assert serve(engine, client="192.0.2.7").get(path).status_code == 403


@pytest.mark.parametrize("path", HEALTH)
def test_health_is_for_everybody(path: str, key_file: Path, serve: Serve) -> None:
    new_key(key_file, "ada")
    far = serve(FakeEngine(), api_keys=str(key_file), client="192.0.2.7", host="enclave.example")
    assert far.get(path).status_code == 200


def test_ready_says_how_many_workers_can_be_used(serve: Serve) -> None:
    answer = serve(FakeEngine()).get("/readyz")
    assert answer.json() == {"status": "ready", "workers": 2, "workers_usable": 1}


def test_not_ready_says_why(serve: Serve) -> None:
    answer = serve(FakeEngine(ready=False, reason="no worker is left.")).get("/readyz")
    assert (answer.status_code, answer.json()["reason"]) == (503, "no worker is left.")


def test_answers_are_not_kept_by_browsers_and_the_page_loads_nothing_else(serve: Serve) -> None:
    answer = serve(FakeEngine()).get("/")
    assert answer.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def records(client: TestClient, body: dict[str, object], path: str = "/v1/completions") -> list[bytes]:
    """Return the events of a stream as they were sent, each with what pads it."""
    with client.stream("POST", path, json={"model": MODEL, "stream": True, **body}) as answer:
        content = answer.read()
    assert content.endswith(b"\n\n")
    return [part + b"\n\n" for part in content.split(b"\n\n")[:-1]]


def test_at_masked_every_event_has_one_of_few_sizes(serve: Serve) -> None:
    client = serve(FakeEngine(reply="a" + "\u00e9" * 3 + "\u3042"), level="masked")
    events = records(client, {"prompt": "x", "stream_options": {"include_usage": True}})
    assert {len(event) for event in events} == {padding.EVENT_BYTES}
    scored = records(client, {"prompt": "x" * 100, "echo": True, "logprobs": 2})
    assert all(len(event) in {512 << power for power in range(8)} for event in scored)
    chat = records(client, {"messages": [{"role": "user", "content": "Hi"}]}, "/v1/chat/completions")
    assert {len(event) for event in chat} == {padding.EVENT_BYTES}


def test_padding_follows_the_level_the_setting_and_the_client(serve: Serve) -> None:
    def padded(level: str, wish: bool | None = None, **settings: Any) -> bool:  # noqa: FBT001
        client = serve(FakeEngine(), level=level, **settings)
        extra = {} if wish is None else {"stream_options": {"include_obfuscation": wish}}
        events = records(client, {"prompt": "x", **extra})
        return all(event.startswith(b":") for event in events)

    assert [padded(level) for level in ("masked", "open", "verified", "local")] == [True, False, False, False]
    assert padded("open", padding="on")
    assert not padded("masked", padding="off")
    assert padded("open", wish=True)
    assert not padded("masked", wish=False)


def test_whole_answers_are_padded_too(serve: Serve) -> None:
    client = serve(FakeEngine(), level="masked")
    sizes = {len(client.post("/v1/completions", json={**ASK, "max_tokens": count}).content) for count in (1, 5, 12)}
    assert sizes == {padding.BODY_BYTES}
    assert client.post("/v1/completions", json=ASK).json()["choices"][0]["text"] == "H"


@pytest.mark.parametrize("size", [0, 1, 505, 506, 507, 511, 5000])
def test_padding_keeps_what_is_said(size: int) -> None:
    event = padding.event(b"x" * size, padded=True)
    assert len(event) in {512 << power for power in range(8)}
    assert event.partition(b"\n")[2] == b"data: " + b"x" * size + b"\n\n"


def test_no_prompt_and_no_answer_is_logged_at_any_level(
    debug_logs: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "fastapi", "asyncio", "starlette", "tsqp"):
        caplog.set_level(logging.DEBUG, logger=name)
    engine = FakeEngine(reply=CANARY)
    with http_server(engine) as server, OpenAI(base_url=f"{server.url}/v1", api_key=CANARY, max_retries=0) as client:
        raw = client._client
        logging.getLogger("openai").setLevel(logging.WARNING)  # the client is another process's business
        logging.getLogger("httpcore2").setLevel(logging.WARNING)
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        client.completions.create(model=MODEL, prompt=CANARY)
        list(client.completions.create(model=MODEL, prompt=CANARY, stream=True))
        headers = {"content-type": "application/json", "authorization": f"Bearer {CANARY}"}
        for body in (
            {"model": CANARY, "prompt": CANARY},
            {"model": MODEL, "prompt": {"a": CANARY}},
            {"model": MODEL, "prompt": CANARY, CANARY: 1},
            {"model": MODEL, "prompt": CANARY, "temperature": 9},
            {"model": MODEL, "prompt": CANARY * 100},
        ):
            answer = raw.post(f"{server.url}/v1/completions?q={CANARY}", content=json.dumps(body), headers=headers)
            assert answer.status_code in (400, 404)
        raw.post(f"{server.url}/v1/completions", content=CANARY, headers=headers)
        raw.get(f"{server.url}/{CANARY}")
        engine.refusal = ValueError(CANARY)  # type: ignore[assignment]  # a bug whose message quotes the prompt
        answer = raw.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": CANARY}, headers=headers)
        assert answer.status_code == 500
        assert CANARY not in answer.text
    assert "unexpected ValueError at" in caplog.text
    assert CANARY not in caplog.text
    assert all(CANARY not in repr(record.args) and record.exc_info is None for record in caplog.records)
    out, err = capfd.readouterr()
    assert CANARY not in out + err
    lines = [line for line in err.splitlines() if "/v1/completions" in line]
    assert len(lines) == 9
    assert "unexpected ValueError at" in err
    if debug_logs == "json":
        assert all(json.loads(line)["request_id"] for line in lines)


def test_each_request_has_an_id_that_its_answer_and_its_log_line_tell(
    debug_logs: str, serve: Serve, capfd: pytest.CaptureFixture[str]
) -> None:
    client = serve(FakeEngine(fail_after=2))
    answers = [client.post("/v1/completions", json={**ASK, "max_tokens": 9}, headers={"x-request-id": CANARY})]
    answers += [client.get(path) for path in ("/healthz", "/no/such/page", "/v1/models")]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == len(ids)
    assert CANARY not in ids
    err = capfd.readouterr().err
    for identity, answer, path in zip(
        ids, answers, ("/v1/completions", "/healthz", "other", "/v1/models"), strict=True
    ):
        said = [line for line in err.splitlines() if identity in line]
        assert len(said) == (2 if path == "/v1/completions" else 1)  # and that it failed
        assert f"{path} {answer.status_code}" in said[-1]
        if debug_logs == "json":
            entry = json.loads(said[-1])
            assert entry["request_id"] == identity
            assert entry["duration_s"] >= 0
            assert entry["level"] == ("info" if path.startswith("/v1/") else "debug")
    assert "generations ended with the error worker_unavailable" in err
    assert CANARY not in err


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_server_leaves_no_core_dump() -> None:
    code = (
        "import ctypes, resource; from tsqp.serve.process import forbid_core_dumps; forbid_core_dumps();"
        "print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(0, 0) 0\n"


class WithoutPrctl:
    """A C library whose kernel has no prctl."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def prctl(self, *_: int) -> int:
        ctypes.set_errno(errno.ENOSYS)
        return -1


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_only_gramine_may_lack_the_call_that_hides_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.serve.process.resource.setrlimit", lambda *_: None)
    monkeypatch.setattr("tsqp.serve.process.ctypes.CDLL", WithoutPrctl)
    with pytest.raises(SetupError, match=r"core dumps cannot be turned off \(prctl: errno 38\)"):
        process.forbid_core_dumps()
    monkeypatch.setattr("tsqp.serve.process._GRAMINE", tmp_path)
    process.forbid_core_dumps()
    monkeypatch.setattr("tsqp.serve.process.ctypes.get_errno", lambda: errno.EPERM)
    with pytest.raises(SetupError, match="errno 1"):
        process.forbid_core_dumps()


def test_the_server_does_not_need_transformers_or_torch() -> None:
    code = "import sys, tsqp.serve.app; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
