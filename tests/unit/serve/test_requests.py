"""Wrong requests: each is refused with the right status and names what is wrong, and none is carried out."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import CONTEXT, MODEL, FakeEngine, tiny_served
from serving import Serve

from tsqp.engine.api import ClosingError, QueueFullError
from tsqp.errors import (
    AbsentPeerError,
    DeviceMemoryError,
    HostileError,
    IntegrityError,
    InternalError,
    ProtocolError,
    TransportClosedError,
    TsqpError,
)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
CANARY = "xyzzy-plugh"


def refusal(serve: Serve, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
    """Post a body; return the error object."""
    engine = FakeEngine()
    needed = {"prompt": "x"} if path == COMPLETIONS else {"messages": HI}
    answer = serve(engine).post(path, json={"model": MODEL, **needed, **body})
    assert answer.status_code == status, answer.text
    assert engine.submitted == []
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("path", "param", "value"),
    [
        (COMPLETIONS, "frequency_penalty", 0.5),
        (COMPLETIONS, "presence_penalty", -1),
        (COMPLETIONS, "logit_bias", {"5": 10}),
        (COMPLETIONS, "best_of", 3),
        (COMPLETIONS, "suffix", "end"),
        (COMPLETIONS, "user", "me"),
        (CHAT, "tools", [{"type": "function"}]),
        (CHAT, "tool_choice", "required"),
        (CHAT, "response_format", {"type": "json_object"}),
        (CHAT, "reasoning_effort", "low"),
        (CHAT, "store", True),
        (CHAT, "parallel_tool_calls", False),
        (CHAT, "modalities", ["audio"]),
        (COMPLETIONS, "frequency_penalty", False),
    ],
)
def test_what_is_not_carried_out_is_refused_by_name(path: str, param: str, value: Any, serve: Serve) -> None:
    error = refusal(serve, path, **{param: value})
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")
    assert param in error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_unknown_parameter_is_refused_by_name(path: str, serve: Serve) -> None:
    error = refusal(serve, path, tempreature=0.5)
    assert (error["param"], error["code"]) == ("tempreature", "unknown_parameter")


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        (COMPLETIONS, {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 2, "n": 2}),
        (COMPLETIONS, {"user": None, "suffix": None, "logprobs": None, "stop": None, "seed": None}),
        (CHAT, {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False}),
        (CHAT, {"messages": [{**HI[0], "refusal": None, "tool_calls": [], "annotations": []}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}),
    ],
)
def test_values_that_ask_for_nothing_pass(path: str, extra: dict[str, Any], serve: Serve) -> None:
    needed = {"prompt": "x"} if path == COMPLETIONS else {"messages": HI}
    answer = serve(FakeEngine()).post(path, json={"model": MODEL, **needed, **extra})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "param", "value"),
    [
        (COMPLETIONS, "temperature", 2.5),
        (COMPLETIONS, "temperature", -0.1),
        (COMPLETIONS, "temperature", "hot"),
        (COMPLETIONS, "top_p", 0),
        (COMPLETIONS, "top_k", -1),
        (COMPLETIONS, "min_p", 1.5),
        (COMPLETIONS, "repetition_penalty", 0),
        (COMPLETIONS, "seed", -1),
        (COMPLETIONS, "n", 0),
        (COMPLETIONS, "n", 129),
        (COMPLETIONS, "n", True),
        (COMPLETIONS, "max_tokens", -1),
        (COMPLETIONS, "logprobs", 21),
        (COMPLETIONS, "stop", ["a"] * 17),
        (COMPLETIONS, "stop", ""),
        (COMPLETIONS, "stop", "a" * 257),
        (COMPLETIONS, "stream", "yes"),
        (COMPLETIONS, "stream_options", {"include_usage": True}),
        (CHAT, "logprobs", 5),
        (CHAT, "top_logprobs", 2),
        (CHAT, "messages", []),
        (CHAT, "messages", [{"role": "tool", "content": "x"}]),
        (CHAT, "messages", [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]),
        (CHAT, "messages", [{"role": "user", "content": "x", "name": "Ada"}]),
        (CHAT, "messages", [{"role": "user"}]),
        (CHAT, "messages", "x"),
    ],
)
def test_a_value_out_of_range_or_of_the_wrong_type_names_its_parameter(
    path: str, param: str, value: Any, serve: Serve
) -> None:
    assert refusal(serve, path, **{param: value})["param"] in (param, "content")


@pytest.mark.parametrize(
    "prompt",
    ["", [], [""], [[]], [["a"]], ["a", 1], [1, "a"], [True], [-1], [258], [1.5], {"a": 1}, 5, None, ["a", [1]]],
)
def test_a_prompt_that_is_none_is_refused(prompt: object, serve: Serve) -> None:
    assert refusal(serve, COMPLETIONS, prompt=prompt)["param"] == "prompt"


def test_a_prompt_that_does_not_fit_is_refused(serve: Serve) -> None:
    error = refusal(serve, COMPLETIONS, prompt="x" * CONTEXT, max_tokens=1)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert str(CONTEXT) in error["message"]
    refusal(serve, COMPLETIONS, prompt="x" * 10, max_tokens=CONTEXT - 9)
    refusal(serve, CHAT, messages=[{"role": "user", "content": "x" * CONTEXT}])


def test_too_many_prompts_are_refused(serve: Serve) -> None:
    refusal(serve, COMPLETIONS, prompt=["x"] * 129)
    assert refusal(serve, COMPLETIONS, prompt=["x"] * 65, n=2)["param"] == "n"


def test_an_unknown_model_is_not_found(serve: Serve) -> None:
    error = refusal(serve, COMPLETIONS, 404, model="gpt-9")
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"model": "tiny", "prompt": "\xff"}', "invalid_utf8"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "invalid_json"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "invalid_json"),
        (b"[" * 100000, "invalid_json"),
        (b"", "invalid_json"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes, code: str, serve: Serve) -> None:
    answer = serve(FakeEngine()).post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_what_a_browser_may_send_for_any_web_page_is_refused(serve: Serve) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = serve(FakeEngine()).post(COMPLETIONS, content=b"{}", headers={"content-type": kind})
        assert answer.status_code == 415


def test_a_body_that_is_too_large_is_refused_whether_or_not_it_says_so(serve: Serve) -> None:
    client = serve(FakeEngine(), max_body_bytes=2048)
    headers = {"content-type": "application/json"}
    assert client.post(COMPLETIONS, content=b"x" * 2049, headers=headers).status_code == 413
    assert client.post(COMPLETIONS, content=iter([b"x" * 1025] * 2), headers=headers).status_code == 413
    body = b'{"model": "tiny", "prompt": "x"}'
    assert client.post(COMPLETIONS, content=body + b" " * (2048 - len(body)), headers=headers).status_code == 200


def test_errors_do_not_repeat_values(serve: Serve) -> None:
    for body in ({"prompt": {"a": CANARY}}, {"stop": {"a": CANARY}}, {"temperature": CANARY}, {"stop": [1, CANARY]}):
        assert CANARY not in refusal(serve, COMPLETIONS, **body)["message"]
    for messages in ([{"role": CANARY, "content": "x"}], [{"role": "user", "content": {"a": CANARY}}], CANARY):
        assert CANARY not in refusal(serve, CHAT, messages=messages)["message"]


def test_a_model_without_a_chat_template_says_so(serve: Serve) -> None:
    client = serve(FakeEngine(), model=tiny_served(template=None))
    answer = client.post(CHAT, json={"model": MODEL, "messages": HI})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")
    assert "has no chat template" in answer.json()["error"]["message"]


def test_a_chat_that_the_template_refuses_is_a_400(serve: Serve) -> None:
    client = serve(FakeEngine(), model=tiny_served(template="{{ raise_exception('roles must alternate') }}"))
    answer = client.post(CHAT, json={"model": MODEL, "messages": HI})
    assert answer.status_code == 400
    assert "roles must alternate" in answer.json()["error"]["message"]


def test_a_full_queue_is_a_429_with_a_time_to_come_back_and_nothing_of_the_request_stays(serve: Serve) -> None:
    engine = FakeEngine(queue_limit=2, hold_after=0)
    answer = serve(engine).post(COMPLETIONS, json={"model": MODEL, "prompt": ["a", "b", "c"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    engine.wait_until_idle()
    assert sorted(engine.cancelled) == [0, 1]


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (QueueFullError("too many requests wait."), 429, "rate_limit_error", "queue_full"),
        (ClosingError("closing."), 503, "server_error", "stopping"),
        (TransportClosedError("the worker is gone."), 503, "worker_error", "not_ready"),
        (AbsentPeerError("nobody is there."), 503, "worker_error", "not_ready"),
        (IntegrityError("a product was wrong."), 503, "integrity_error", "not_ready"),
        (ProtocolError("no message."), 503, "protocol_error", "not_ready"),
        (DeviceMemoryError("out of memory."), 503, "server_error", "out_of_memory"),
        (InternalError("a bug."), 500, "server_error", "internal_error"),
        (TsqpError("not now."), 503, "server_error", "not_ready"),
    ],
)
def test_what_the_engine_refuses_is_no_stream(
    error: TsqpError, status: int, kind: str, code: str, serve: Serve
) -> None:
    answer = serve(FakeEngine(refusal=error)).post(COMPLETIONS, json={"model": MODEL, "prompt": "x", "stream": True})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert (answer.json()["error"]["type"], answer.json()["error"]["code"]) == (kind, code)
    hopeless = isinstance(error, (HostileError, InternalError))
    assert answer.headers.get("x-should-retry") == ("false" if hopeless else None)
    assert ("retry-after" in answer.headers) == (not hopeless)


def test_paths_and_methods_that_are_not_there(serve: Serve) -> None:
    client = serve(FakeEngine())
    for method, path in (("POST", "/v1/embeddings"), ("GET", "/v1/completions"), ("GET", "/docs"), ("GET", "/view")):
        answer = client.request(method, path)
        assert answer.status_code == 404, path
        assert answer.json()["error"]["type"] == "invalid_request_error"
