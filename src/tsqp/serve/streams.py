"""Answers while their client is there: a client that goes away ends its request at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Value = TypeVar("Value")

# A client that reads nothing for so long is gone, whatever its connection says.
SEND_TIMEOUT_S = 60.0


class ClientGoneError(Exception):
    """The client closed its connection before the answer was complete."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Value]) -> Value:
    """Return what ``work`` returns, unless the client goes away before: then it is cancelled.

    Args:
        receive: of ASGI, after the body has been read.
        work: what the answer needs.

    Raises:
        ClientGoneError: the client has gone; ``work`` has ended.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events.

    Args:
        events: each complete.
        on_end: called once, however the stream ends, also if it never began.
        timeout_s: for the client to take one event.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], on_end: Callable[[], None], timeout_s: float = SEND_TIMEOUT_S
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end, self._timeout_s = events, on_end, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until they end or the client goes."""
        del scope
        try:
            await while_connected(receive, self._write(send))
        except (ClientGoneError, asyncio.TimeoutError, OSError):
            return
        finally:
            self._on_end()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            message = {"type": "http.response.body", "body": event, "more_body": True}
            await _within(self._timeout_s, send(message))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _within(timeout_s: float, sending: Awaitable[None]) -> None:
    """Send something in time. ``asyncio.wait_for`` may forget before Python 3.12 that its caller was cancelled.

    That happens where what it waits for ends in the same round of the loop: a client that closes its connection just
    when an event has been sent would have its request run on for ever.

    Raises:
        TimeoutError: it took longer.
    """
    task = asyncio.ensure_future(sending)
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        if not task.done():
            raise asyncio.TimeoutError
        task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
