"""Every kind of request that a server must refuse, how it must, and how to send one that no client library would."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_TIMEOUT_S = 60
_JSON = "application/json"


@dataclass(frozen=True)
class Bad:
    """A request and its answer.

    Attributes:
        name: what is wrong with it.
        body: as it is sent.
        status, code, param: of the answer.
        path: of the request.
        kind: of its body.
        key: instead of the client's own; None sends that.
    """

    name: str
    body: bytes
    status: int
    code: str | None = None
    param: str | None = None
    path: str = COMPLETIONS
    kind: str = _JSON
    key: str | None = None


@dataclass(frozen=True)
class Answered:
    """A status, a body, and headers by their names in small letters; ``content`` is strict JSON."""

    status: int
    content: Any
    headers: Mapping[str, str]

    @classmethod
    def read(cls, answer: http.client.HTTPResponse) -> Answered:
        """Read an answer to its end."""
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return cls(answer.status, strict(answer.read()), headers)


def bad_requests(model: str, context: int, body_limit: int, *, keys: bool) -> list[Bad]:
    """Return one of each kind.

    Args:
        model: what the server calls its model; it has a chat template, and less than a million tokens.
        context: how many tokens it takes, fewer than ``body_limit`` bytes hold.
        body_limit: bytes of a body.
        keys: whether the server asks for keys.
    """

    def asking(**changes: object) -> bytes:
        return json.dumps({"model": model, "prompt": "x", "max_tokens": 4, **changes}).encode()

    def chatting(**changes: object) -> bytes:
        return json.dumps({"model": model, "messages": [{"role": "user", "content": "x"}], **changes}).encode()

    long = [5] * context
    found = [
        Bad("prompt too long", asking(prompt=long, max_tokens=1), 400, "context_length_exceeded", "prompt"),
        Bad(
            "prompt and answer too long",
            asking(prompt=long[8:], max_tokens=9),
            400,
            "context_length_exceeded",
            "prompt",
        ),
        Bad("prompt empty", asking(prompt=""), 400, None, "prompt"),
        Bad("prompt of no tokens", asking(prompt=[]), 400, None, "prompt"),
        Bad("one of two prompts empty", asking(prompt=["x", ""]), 400, None, "prompt"),
        Bad("no messages", chatting(messages=[]), 400, None, "messages", CHAT),
        Bad("not UTF-8", asking(prompt="x\xe9").replace(b"\\u00e9", b"\xe9"), 400, "invalid_utf8"),
        Bad("half a character", asking(prompt="x").replace(b'"x"', b'"\\ud83d"'), 400, "invalid_json"),
        Bad("not UTF-8 in a chat", chatting().replace(b'"x"', b'"\xff"'), 400, "invalid_utf8", None, CHAT),
        Bad("unknown model", asking(model="gpt-9"), 404, "model_not_found", "model"),
        Bad("no model", b'{"prompt": "x"}', 400, None, "model"),
        Bad("temperature too high", asking(temperature=2.01), 400, None, "temperature"),
        Bad("temperature below 0", asking(temperature=-0.01), 400, None, "temperature"),
        Bad("temperature no number", asking().replace(b"4}", b'4, "temperature": NaN}'), 400, "invalid_json"),
        Bad("temperature infinite", asking().replace(b"4}", b'4, "temperature": 1e999}'), 400, "invalid_json"),
        Bad("malformed JSON", asking()[:-1], 400, "invalid_json"),
        Bad("no object", b"[1, 2]", 400, "invalid_json"),
        Bad("nothing", b"", 400, "invalid_json"),
        Bad("body too large", asking() + b" " * body_limit, 413, "body_too_large"),
        Bad("stop list too long", asking(stop=[str(i) for i in range(17)]), 400, None, "stop"),
        Bad("stop text empty", asking(stop=["a", ""]), 400, None, "stop"),
        Bad("stop text too long", asking(stop="a" * 257), 400, None, "stop"),
        Bad("token outside the vocabulary", asking(prompt=[1_000_000]), 400, None, "prompt"),
        Bad("token below 0", asking(prompt=[-1]), 400, None, "prompt"),
        Bad("too many choices", asking(n=1000), 400, None, "n"),
        Bad("too many tokens", asking(max_tokens=1 << 40), 400, None, "max_tokens"),
        Bad("too many log-probabilities", asking(logprobs=21), 400, None, "logprobs"),
        Bad("seed out of range", asking(seed=1 << 63), 400, None, "seed"),
        Bad("unknown parameter", asking(tempreature=1), 400, "unknown_parameter", "tempreature"),
        Bad("unsupported parameter", asking(logit_bias={"5": 1}), 400, "unsupported_parameter", "logit_bias"),
        Bad("tools", chatting(tools=[{"type": "function"}]), 400, "unsupported_parameter", "tools", CHAT),
        Bad("unknown role", chatting(messages=[{"role": "bird", "content": "x"}]), 400, None, "messages", CHAT),
        Bad("not sent as JSON", asking(), 415, "unsupported_media_type", kind="text/plain"),
        Bad("unknown path", asking(), 404, "not_found", path="/v1/embeddings"),
    ]
    if keys:
        found.append(Bad("unknown key", asking(), 401, "invalid_api_key", key="tsqp-guessed"))
    return found


def send(host: str, bad: Bad, key: str = "none") -> Answered:
    """Send a request as it is, and read its answer.

    Args:
        host: name and port.
        bad: the request.
        key: of the client.
    """
    headers = {"Content-Type": bad.kind, "Authorization": f"Bearer {bad.key or key}"}
    return post(host, bad.path, bad.body, headers)


def post(host: str, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Answered:
    """Post a body; return status and content, which must be strict JSON."""
    connection = http.client.HTTPConnection(host, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", path, body, headers or {"Content-Type": _JSON})
        return Answered.read(connection.getresponse())
    finally:
        connection.close()


def get(host: str, path: str, headers: Mapping[str, str] | None = None) -> Answered:
    """Get a path; return status and content, which must be strict JSON."""
    connection = http.client.HTTPConnection(host, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path, headers=headers or {})
        return Answered.read(connection.getresponse())
    finally:
        connection.close()


def streamed(host: str, path: str, body: dict[str, Any]) -> list[Any]:
    """Post a body that asks for a stream; return its events, which must be strict JSON, without the last [DONE].

    It must be there, unless the last event is an error.
    """
    connection = http.client.HTTPConnection(host, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", path, json.dumps({**body, "stream": True}), {"Content-Type": _JSON})
        answer = connection.getresponse()
        assert answer.status == http.HTTPStatus.OK, answer.read()
        lines = [line.removeprefix(b"data: ") for line in answer.read().splitlines() if line.startswith(b"data: ")]
    finally:
        connection.close()
    events = [strict(line) for line in lines if line != b"[DONE]"]
    assert (lines[-1] == b"[DONE]") == ("error" not in events[-1])
    return events


def strict(text: str | bytes) -> Any:
    """Parse JSON as its standard has it: without NaN and infinities, which Python would take."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def wrong(bad: Bad, answered: Answered) -> str:
    """Say what is wrong with an answer; nothing if it is as it should be."""
    if not isinstance(answered.content, dict) or answered.content.keys() != {"error"}:
        return f"{bad.name}: status {answered.status}, and no error object"
    error = answered.content["error"]
    if error.keys() != {"message", "type", "param", "code"} or not error["message"]:
        return f"{bad.name}: an error object of {sorted(error)}"
    expected, found = (bad.status, bad.code, bad.param), (answered.status, error["code"], error["param"])
    return "" if found == expected else f"{bad.name}: expected {expected}, got {found}"
