"""A link between an enclave and a worker that can be cut, silenced, torn within a message, or made to lie.

It passes ZMTP frames on (ZeroMQ RFC 23, in clear), and hands masked words to whoever keeps them.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Coroutine
from typing import Any

import msgspec
from faults.masked_words import MaskedWords

_GREETING_BYTES = 64
_MORE, _LONG, _COMMAND = 1, 2, 4
_TEAR_S = 0.5
_CLOSE_S = 0.1


class Proxy:
    """Listens on a port and passes on to another.

    Args:
        target: the worker's port on 127.0.0.1.
        words: is given all masked words that pass.
        chance: where in a message it tears or lies.

    Attributes:
        port: where it listens.
        used: when something passed last, by ``time.monotonic``.
        lied: set once a bit of a result has been turned.
    """

    def __init__(self, target: int, words: MaskedWords, chance: random.Random) -> None:
        self._target, self._words, self._chance = target, words, chance
        self.port, self.used, self.lied = 0, 0.0, threading.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._passing: set[asyncio.Task[None]] = set()
        self._tearing = self._lying = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._thread.start()
        self._flows = asyncio.Event()
        self._flows.set()
        self._server: asyncio.Server | None = None
        self._do(self._listen())

    def cut(self, *, torn: bool = False) -> None:
        """Close every connection and take none, at once or in the middle of the next message."""
        if torn:
            self._tearing = True
            deadline = time.monotonic() + _TEAR_S
            while self._tearing and time.monotonic() < deadline:
                time.sleep(0.005)
            self._tearing = False
        self._do(self._close())

    def silence(self) -> None:
        """Pass nothing on, the end of a connection neither, and close nothing."""
        self._do(self._set(flows=False))

    def lie(self) -> None:
        """Turn a bit of the next result of a product."""
        self.lied.clear()
        self._lying = True

    def restore(self, *, drop: bool = False) -> None:
        """Pass everything on again, what was held back too, unless those connections are dropped."""
        self._lying = False
        if drop:
            self._do(self._close())
        self._do(self._set(flows=True))
        if self._server is None:
            self._do(self._listen())

    def close(self) -> None:
        """End all connections and the thread."""
        self._do(self._close())
        self._do(asyncio.sleep(_CLOSE_S))  # the loop closes what was aborted in its next turns
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _set(self, *, flows: bool) -> None:
        if flows:
            self._flows.set()
        else:
            self._flows.clear()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._joined, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._passing):
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass a client's bytes on, and the worker's back, until either ends."""
        task = asyncio.current_task()
        assert task is not None
        self._passing.add(task)
        writers = [writer]
        try:
            await self._flows.wait()
            theirs, worker = await asyncio.open_connection("127.0.0.1", self._target)
            writers.append(worker)
            ways = [self._pass(reader, worker, _Asked(self)), self._pass(theirs, writer, _Answered(self))]
            both = [asyncio.create_task(way) for way in ways]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in both:
                    way.cancel()
                await asyncio.gather(*both, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._passing.discard(task)
            for each in writers:
                each.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: _Message) -> None:
        try:
            left = _GREETING_BYTES  # each side waits for the other's first bytes before it sends its last
            while left:
                some = await reader.read(left)
                if not some:
                    break
                left -= len(some)
                await self._flows.wait()
                writer.write(some)
            while True:
                head, body, flags = await _frame(reader)
                await self._flows.wait()
                self.used = time.monotonic()
                if not flags & _COMMAND:
                    message.add(body, last=not flags & _MORE)
                if self._tearing:
                    writer.write((head + body)[: self._chance.randrange(1, len(head + body))])
                    await writer.drain()
                    self._tearing = False
                    return
                writer.write(head + bytes(body))
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            await self._flows.wait()  # the end of a connection does not pass either


async def _frame(reader: asyncio.StreamReader) -> tuple[bytes, bytearray, int]:
    """Read one frame; return its head, its body and its flags."""
    head = await reader.readexactly(1)
    head += await reader.readexactly(8 if head[0] & _LONG else 1)
    body = await reader.readexactly(int.from_bytes(head[1:], "big"))
    return head, bytearray(body), head[0]


class _Message:
    """Sees the frames of one direction; may change them before they are passed on."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._header: dict[str, Any] | None = None

    def add(self, body: bytearray, *, last: bool) -> None:
        if self._header is None:
            self._header = msgspec.msgpack.decode(body)
        else:
            self.tensor(self._header, body)
        if last:
            self._header = None

    def tensor(self, header: dict[str, Any], body: bytearray) -> None:
        raise NotImplementedError


class _Asked(_Message):
    def tensor(self, header: dict[str, Any], body: bytearray) -> None:
        if header["op"] == "linear_exact":
            self._proxy._words.add(header["group"], bytes(body), header["x"]["shape"][1])


class _Answered(_Message):
    def tensor(self, header: dict[str, Any], body: bytearray) -> None:
        proxy = self._proxy
        if proxy._lying and header["kind"] == "result" and header["y"]["dtype"] == "int32":
            proxy._lying = False
            body[proxy._chance.randrange(len(body))] ^= 1 << proxy._chance.randrange(8)
            proxy.lied.set()
