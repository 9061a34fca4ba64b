"""The worker's view as the application streams it: whoever goes away leaves nothing behind that waits for more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, MutableMapping
from typing import Any

from fake_engine import FakeEngine, tiny_served
from fastapi import FastAPI

from tsqp.config import ServeConfig
from tsqp.serve.app import create_app

_PATIENCE_S = 20


class OneEvent:
    """A view that tells one thing and then waits for ever; ``reading`` counts who still reads it."""

    def __init__(self) -> None:
        self.reading = 0

    async def __aiter__(self) -> AsyncIterator[Mapping[str, object]]:
        self.reading += 1
        try:
            yield {"level": "open"}
            await asyncio.Event().wait()
        finally:
            self.reading -= 1


class Client:
    """Asks for a path; spoken to as ASGI does."""

    def __init__(self, app: FastAPI, path: str = "/view") -> None:
        self.got_one, self.gone, self.body = asyncio.Event(), asyncio.Event(), b""
        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 50000),
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> MutableMapping[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        self.body += message.get("body", b"")
        if b"data: " in self.body:
            self.got_one.set()


def test_a_reader_that_goes_away_leaves_no_task_behind() -> None:
    async def come_and_go() -> tuple[int, int, set[asyncio.Task[Any]]]:
        view = OneEvent()
        before = asyncio.all_tasks()
        reader = Client(create_app(FakeEngine(), tiny_served(), ServeConfig(), view=view))
        await asyncio.wait_for(reader.got_one.wait(), _PATIENCE_S)
        for _ in range(10):  # it waits for the second event by now
            await asyncio.sleep(0)
        reading = view.reading
        reader.gone.set()
        await asyncio.wait_for(reader.task, _PATIENCE_S)
        return reading, view.reading, asyncio.all_tasks() - before

    assert asyncio.run(come_and_go()) == (1, 0, set())


def test_a_server_that_stops_ends_its_readers() -> None:
    async def stop() -> tuple[int, set[asyncio.Task[Any]]]:
        view = OneEvent()
        before = asyncio.all_tasks()
        app = create_app(FakeEngine(), tiny_served(), ServeConfig(), view=view)
        reader = Client(app)
        await asyncio.wait_for(reader.got_one.wait(), _PATIENCE_S)
        app.state.stopping.set()
        await asyncio.wait_for(reader.task, _PATIENCE_S)
        return view.reading, asyncio.all_tasks() - before

    assert asyncio.run(stop()) == (0, set())


def test_the_status_says_whether_there_is_a_view() -> None:
    async def asked(view: OneEvent | None) -> object:
        client = Client(create_app(FakeEngine(), tiny_served(), ServeConfig(), view=view), "/status")
        await asyncio.wait_for(client.task, _PATIENCE_S)
        return json.loads(client.body)["view"]

    assert asyncio.run(asked(OneEvent())) is True
    assert asyncio.run(asked(None)) is False
