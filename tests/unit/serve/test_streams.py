"""Streams whose client goes away, at every moment: what was asked for it must not run on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.types import Message

from tsqp.serve.streams import EventStream

_PATIENCE_S = 20


class Client:
    """Takes events, and goes away so many rounds of the loop after it has been sent its first one.

    Attributes:
        rounds: from when the event has been sent; below 0 it goes before that.
        ended: how often the stream was told to end what it is of.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds, self.ended, self.received = rounds, 0, 0
        self._gone = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] != "http.response.body":
            return
        self.received += 1
        self._tasks.append(asyncio.ensure_future(self._leave(max(self.rounds, 0))))
        for _ in range(max(0, -self.rounds)):
            await asyncio.sleep(0)

    async def _leave(self, rounds: int) -> None:
        for _ in range(rounds):
            await asyncio.sleep(0)
        self._gone.set()

    def end(self) -> None:
        self.ended += 1


async def one_and_then_nothing() -> AsyncIterator[bytes]:
    yield b"data: 1\n\n"
    await asyncio.Event().wait()


@pytest.mark.parametrize("rounds", range(-8, 8))
def test_a_client_that_goes_just_when_an_event_was_sent_ends_its_request(rounds: int) -> None:
    async def serve() -> Client:
        client = Client(rounds)
        stream = EventStream(one_and_then_nothing(), client.end)
        await asyncio.wait_for(stream({"type": "http"}, client.receive, client.send), _PATIENCE_S)
        return client

    client = asyncio.run(serve())
    assert (client.ended, client.received) == (1, 1)


def test_a_client_that_takes_nothing_is_gone_after_a_while() -> None:
    async def stuck(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def serve() -> Client:
        client = Client(0)
        stream = EventStream(one_and_then_nothing(), client.end, timeout_s=0.01)
        await asyncio.wait_for(stream({"type": "http"}, client.receive, stuck), _PATIENCE_S)
        return client

    assert asyncio.run(serve()).ended == 1


def test_an_error_of_the_connection_ends_its_request() -> None:
    async def broken(message: Message) -> None:
        if message["type"] == "http.response.body":
            raise ConnectionResetError

    async def serve() -> Client:
        client = Client(0)
        await asyncio.wait_for(
            EventStream(one_and_then_nothing(), client.end)({"type": "http"}, client.receive, broken), _PATIENCE_S
        )
        return client

    assert asyncio.run(serve()).ended == 1
