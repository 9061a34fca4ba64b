"""The HTTP API: bodies through the parsers and through the application, and paths and headers. No socket is opened."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import random
from functools import cache
from typing import Any

from fake_engine import FakeEngine, tiny_served
from fastapi import FastAPI

from fuzz import framing
from fuzz.files import changed_json
from tsqp.config import ServeConfig
from tsqp.serve.app import create_app
from tsqp.serve.errors import ApiError
from tsqp.serve.schemas import parse_chat, parse_completion

_COMPLETION, _CHAT, _OTHER = range(3)
_PATHS = ("/v1/completions", "/v1/chat/completions")
_FAILED = 500
_Headers = list[tuple[bytes, bytes]]


def run(data: bytes) -> None:
    """Post a body to one of the two paths, or ask for any path with any header."""
    kind, rest = (data[0] % 3 if data else 0), data[1:]
    if kind == _OTHER:
        frames = [frame for message in framing.unpack(data)[1] for frame in message]
        path, name, value, body = (frames + [b""] * 4)[:4]
        _ask("GET" if not body else "POST", path.decode("latin-1"), [(name.lower(), value)], body)
        return
    with contextlib.suppress(ApiError):
        (parse_completion if kind == _COMPLETION else parse_chat)(rest)
    _ask("POST", _PATHS[kind], [], rest)


@cache
def _application() -> tuple[FastAPI, FakeEngine, asyncio.AbstractEventLoop]:
    engine, loop = FakeEngine(reply="Hello"), asyncio.new_event_loop()
    atexit.register(loop.close)
    return create_app(engine, tiny_served("open"), ServeConfig()), engine, loop


def _ask(method: str, path: str, headers: _Headers, body: bytes) -> None:
    app, engine, loop = _application()
    if status := loop.run_until_complete(_status(app, method, path, headers, body)):
        engine.submitted.clear()
        if status >= _FAILED:
            raise AssertionError(f"{method} was answered with {status}.")


async def _status(app: FastAPI, method: str, path: str, headers: _Headers, body: bytes) -> int:
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    status = 0

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:  # noqa: ANN401  what ASGI sends
        nonlocal status
        status = message.get("status", status)

    given: _Headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), *headers]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("latin-1", "replace"),
        "query_string": b"",
        "root_path": "",
        "headers": given,
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    await app(scope, receive, send)
    return status


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change one place of a body."""
    if data and data[0] % 3 == _OTHER:
        return framing.mutated(data, rng)
    return data[:1] + changed_json(data[1:], rng)


def seeds() -> dict[str, bytes]:
    """Return valid requests."""
    completion = (
        b'{"model": "tiny", "prompt": ["Hi", "Ho"], "max_tokens": 4, "n": 2, "stop": ["a", "b"], "seed": 7, '
        b'"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "logprobs": 2, '
        b'"echo": true, "user": null}'
    )
    ids = b'{"model": "tiny", "prompt": [[1, 2], [3]], "stream": true, "stream_options": {"include_usage": true}}'
    chat = (
        b'{"model": "tiny", "messages": [{"role": "system", "content": "Be"}, {"role": "user", "content": [{"type": '
        b'"text", "text": "Hi"}], "tool_calls": []}], "max_completion_tokens": 4, "logprobs": true, "top_logprobs": 2, '
        b'"tools": [], "response_format": {"type": "text"}}'
    )
    return {
        "completion": bytes([_COMPLETION]) + completion,
        "completion-ids": bytes([_COMPLETION]) + ids,
        "chat": bytes([_CHAT]) + chat,
        "models": framing.pack(_OTHER, [[b"/v1/models/tiny", b"authorization", b"Basic eDp5", b""]]),
        "status": framing.pack(_OTHER, [[b"/status", b"x-forwarded-for", b"10.0.0.1", b""]]),
        "page": framing.pack(_OTHER, [[b"/index.html", b"range", b"bytes=0-9", b""]]),
    }
