"""What a demonstration worker saw, on its way to the page: whole snapshots, so that any of them may be lost.

The demonstration worker publishes over a socket in a private directory; every reader of ``ViewSource`` has a queue of
one, in which a newer snapshot replaces an older one. Only ``tsqp demo`` makes a ``ViewSource``; a production server has
none. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
import zmq
import zmq.asyncio
from msgspec import Meta, Struct

from tsqp.wire.messages import Service

BINS = 64
MAX_SNAPSHOT_BYTES = 1 << 20
MAX_REQUESTS_SHOWN = 8
MAX_WORDS = 48
MAX_TEXT = 1 << 16

Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Short = Annotated[str, Meta(max_length=256)]
Words = Annotated[tuple[Short, ...], Meta(max_length=MAX_WORDS)]


class Histogram(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How often values were seen: equal bins over [-limit, limit]; the limit is a power of two."""

    counts: Annotated[tuple[Count, ...], Meta(min_length=BINS, max_length=BINS)]
    limit: Annotated[float, Meta(gt=0)]


class SeenRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One request as the worker got it, with a sample of its values."""

    operation: Short
    group: Short
    rows: Count
    dtype: Short
    size_bytes: Count
    words: Words
    histogram: Histogram | None = None


class Reading(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the worker makes of it as text.

    Attributes:
        by: ``ids``, it was sent token ids; ``nearest``, it looked for the nearest row of the public embedding table.
        prompt, answer: text.
        sure: the share of tokens of which it could be sure.
    """

    by: Short
    prompt: Text
    answer: Text
    sure: Annotated[float, Meta(ge=0, le=1)]


class Snapshot(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that the page shows of the worker's side, since the last prompt began.

    Attributes:
        run: how many prompts have begun.
        serves: what the worker computes.
        requests, size_bytes: received since the prompt began.
        reading: what it makes of it; None where it has no tokenizer or has not been asked for anything.
        words: of the newest row that it was sent for the first linear layer.
        histogram: of all values that it was sent for the first linear layer.
        last: the latest requests, newest first.
    """

    run: Count
    serves: Service
    requests: Count
    size_bytes: Count
    words: Words = ()
    reading: Reading | None = None
    histogram: Histogram | None = None
    last: Annotated[tuple[SeenRequest, ...], Meta(max_length=MAX_REQUESTS_SHOWN)] = ()


encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Snapshot)


class ViewSource:
    """An asynchronous iterable of JSON-able events; each iteration is a reader of its own and begins with the newest.

    A reader that is slow misses snapshots and gets the newest next. What is no ``Snapshot`` is left out, since the
    publisher is the untrusted side; readers hear no more of a publisher that sends ``MAX_SNAPSHOT_BYTES`` or more.

    Args:
        endpoint: where a demonstration worker publishes, ``ipc:///path``.
        level: at which the server runs; part of each event, since a worker cannot tell `verified` from `masked`.
    """

    def __init__(self, endpoint: str, level: str) -> None:
        self._endpoint = endpoint
        self._level = level
        self._context = zmq.asyncio.Context()

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self._events()

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        socket = self._context.socket(zmq.SUB)
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.CONFLATE, 1)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_SNAPSHOT_BYTES)
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.connect(self._endpoint)
            while True:
                event = event_of(await socket.recv(), self._level)
                if event is not None:
                    yield event
        finally:
            socket.close()

    def close(self) -> None:
        """End all readers and release the sockets."""
        self._context.destroy(linger=0)


def event_of(message: bytes, level: str) -> dict[str, Any] | None:
    """Return what the page is told of a published message; None if it is no snapshot."""
    try:
        snapshot = _decoder.decode(message)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return {"level": level, **msgspec.to_builtins(snapshot)}
