"""The way from the demonstration worker to the page: what is let through, and what a slow reader misses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from tsqp.serve.view import BINS, Histogram, Reading, Snapshot, ViewSource, encode, event_of

SNAPSHOT = Snapshot(
    run=3,
    serves="exact",
    requests=7,
    size_bytes=1234,
    words=("00c0ffee",),
    reading=Reading(by="nearest", prompt="a", answer="b", sure=0.5),
    histogram=Histogram(counts=(1,) * BINS, limit=2.0),
)


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(encode(SNAPSHOT)), **fields}).encode()


def test_an_event_is_the_snapshot_and_the_level() -> None:
    event = event_of(encode(SNAPSHOT), "masked")
    assert event is not None
    assert event["level"] == "masked"
    assert event["reading"] == {"by": "nearest", "prompt": "a", "answer": "b", "sure": 0.5}
    assert json.loads(json.dumps(event)) == json.loads(changed(level="masked"))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b"null",
        changed(run=-1),
        changed(serves="anything"),
        changed(level="open"),
        changed(histogram={"counts": [1] * (BINS - 1), "limit": 1.0}),
        changed(histogram={"counts": [1] * BINS, "limit": 0.0}),
        changed(reading={"by": "ids", "prompt": "x" * (1 << 17), "answer": "", "sure": 1.0}),
        changed(reading={"by": "ids", "prompt": "", "answer": "", "sure": 2.0}),
        changed(words=["x" * 300]),
    ],
)
def test_what_is_no_snapshot_is_left_out(message: bytes) -> None:
    assert event_of(message, "masked") is None


@contextmanager
def publisher(endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    context = zmq.Context()
    socket = context.socket(zmq.PUB)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(endpoint)
        yield socket
    finally:
        socket.close()
        context.term()


def snapshot_of(run: int) -> bytes:
    return encode(Snapshot(run=run, serves="open", requests=0, size_bytes=0))


async def next_of(events: AsyncIterator[dict[str, Any]], socket: zmq.Socket[bytes], run: int = 0) -> dict[str, Any]:
    """Publish until a reader, who may not be connected, gets something."""
    waiting = asyncio.ensure_future(anext(events))
    while not waiting.done():
        socket.send(snapshot_of(run))
        await asyncio.sleep(0.01)
    return await waiting


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/view"


def test_a_slow_reader_gets_the_newest(endpoint: str) -> None:
    async def read(source: ViewSource, socket: zmq.Socket[bytes]) -> int:
        events = aiter(source)
        await next_of(events, socket)
        for run in range(1, 500):
            socket.send(snapshot_of(run))
        event: dict[str, Any] = {"run": 0}
        seen = 0
        while event["run"] != 499:
            event = await anext(events)
            seen += 1
            await asyncio.sleep(0.05)
        await events.aclose()  # type: ignore[attr-defined]
        return seen

    with publisher(endpoint) as socket:
        source = ViewSource(endpoint, "open")
        try:
            assert asyncio.run(read(source, socket)) < 250
        finally:
            source.close()


def test_each_iteration_is_a_reader_of_its_own_and_outlives_bad_messages(endpoint: str) -> None:
    async def read(source: ViewSource, socket: zmq.Socket[bytes]) -> list[int]:
        readers = [aiter(source), aiter(source)]
        for events in readers:
            await next_of(events, socket)
        socket.send(b"no snapshot")
        await asyncio.sleep(0.05)
        runs = []
        for events in readers:
            event = {"run": 0}
            while event["run"] != 5:
                event = await next_of(events, socket, 5)
            runs.append(event["run"])
            await events.aclose()  # type: ignore[attr-defined]
        return runs

    with publisher(endpoint) as socket:
        source = ViewSource(endpoint, "open")
        try:
            assert asyncio.run(read(source, socket)) == [5, 5]
        finally:
            source.close()
