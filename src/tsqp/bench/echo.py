"""How long a message and its answer take over an endpoint, with no product between: a server that answers, a client.

Three ways are timed. Copied: both sides send from memory of their own, and the client takes the answer out. In place:
both sides have their words in a slot of the shared memory, send that, and release it; where there is none, in memory of
their own. Making and using the words themselves is not timed. Used: the same, and it is timed: each side writes every
word that it sends and adds up every word that it gets, where they lie, in one thread.

``python -m tsqp.bench.echo serve URL [KEY]`` answers until its standard input ends, with the secret key in a file where
one is named; ``serving`` starts it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from tsqp.errors import InputError, SetupError
from tsqp.threads import using_threads
from tsqp.transport.base import Buffer, ClientTransport, Incoming
from tsqp.transport.client import open_client
from tsqp.transport.keys import load_secret
from tsqp.transport.server import Server
from tsqp.transport.urls import parse
from tsqp.wire.codec import tensor_of
from tsqp.wire.messages import TensorSpec

MAX_MESSAGE_BYTES = 32 << 20
_TIMEOUT_S = 30.0
_WARM_UP = 10
_MARK = b"echo"
_COPIED, _USED = b"copied", b"used"
_READY = "ready\n"
# Words are whole numbers up to this and one more, so that sums of 8 MB are exact in float32.
_LARGEST = 4

Way = Literal["copied", "in place", "used"]


def round_trip(endpoint: str, size: int, way: Way, repeats: int = 100) -> float:
    """Return the median seconds of a round trip with a frame of ``size`` bytes each way, over a link of its own.

    Args:
        endpoint: where ``serving`` or ``serve`` answers.
        size: of the frame beside the header.
        way: one of the three.
        repeats: how many are timed, after some to warm up.

    Raises:
        TsqpError: as connecting and receiving do.
    """
    with echo_client(endpoint) as client:
        for _ in range(_WARM_UP):
            client.seconds(size, way)
        return statistics.median(client.seconds(size, way) for _ in range(repeats))


@contextmanager
def echo_client(endpoint: str, server_key: bytes | None = None) -> Iterator[EchoClient]:
    """Open a link for the time of a ``with`` block; to compare endpoints, time them in turns.

    Args:
        endpoint: where it leads.
        server_key: the server's public key; the link is encrypted then.
    """
    link = open_client(parse(endpoint), MAX_MESSAGE_BYTES, server_key)
    try:
        yield EchoClient(link)
    finally:
        link.close()


class EchoClient:
    """Times single round trips.

    Args:
        link: to an echo server; the caller closes it.
    """

    def __init__(self, link: ClientTransport) -> None:
        self._link = link
        self._payloads: dict[int, bytearray] = {}
        self._value = 0

    def seconds(self, size: int, way: Way) -> float:
        """Time one round trip.

        Raises:
            InputError: the answer is not the server's.
        """
        if size < len(_MARK):
            raise InputError(f"an echo of {size} bytes: at least {len(_MARK)} are needed.")
        if way == "used":
            return self._used(size)
        payload = self._payloads.setdefault(size, bytearray(_MARK.ljust(size, b"\1")))
        started = time.perf_counter()
        # What was written to a slot of this size before is still there, or was never: only its mark is.
        frame = (self._link.allocate(size) if way == "in place" else None) or payload
        frame[: len(_MARK)] = _MARK
        self._link.send([way.encode(), frame])
        delivery = self._link.receive(_TIMEOUT_S)
        frames = delivery.frames if way == "in place" else delivery.private()
        answer, length = bytes(frames[1][: len(_MARK)]), len(frames[1])
        delivery.release()
        elapsed = time.perf_counter() - started
        if (answer, length) != (_MARK, size):
            raise InputError(f"expected an echo of {size} bytes, got {length} bytes of something else.")
        return elapsed

    @using_threads(1)
    def _used(self, size: int) -> float:
        """Send one number over and over; each word of the answer must be the next."""
        self._value = self._value % _LARGEST + 1
        payload = self._payloads.setdefault(size, bytearray(size))
        started = time.perf_counter()
        frame = self._link.allocate(size) or payload
        _words(frame).fill_(self._value)
        self._link.send([_USED, frame])
        delivery = self._link.receive(_TIMEOUT_S)
        words = _words(delivery.frames[1])
        count, total = len(words), float(words.sum())
        delivery.release()
        elapsed = time.perf_counter() - started
        if (count, total) != (size // 4, (self._value + 1) * count):
            raise InputError(f"expected an echo of {size} bytes, got {4 * count} bytes of other numbers.")
        return elapsed


def _words(frame: Buffer) -> torch.Tensor:
    """View a frame as numbers."""
    return tensor_of(TensorSpec("float32", (len(frame) // 4,)), frame)


def serve(url: str, key: str | None = None) -> None:
    """Answer messages until standard input ends, each with as many bytes in the same way.

    Args:
        url: where to listen.
        key: file of the server's secret key.

    Raises:
        SetupError: the address is in use or cannot be bound, or the key cannot be read.
    """
    torch.set_num_threads(1)
    pair = load_secret(key) if key is not None else None
    server = Server([parse(url)], MAX_MESSAGE_BYTES, sys.stdin.fileno(), pair)
    payloads: dict[int, bytearray] = {}
    try:
        sys.stdout.write(_READY)
        sys.stdout.flush()
        while not server.hung_up:
            incoming = server.receive(0.5)
            if incoming is not None and len(incoming.frames) > 1:
                _answer(incoming, payloads)
    finally:
        server.close()


def _answer(incoming: Incoming, payloads: dict[int, bytearray]) -> None:
    asked = incoming.frames[1]
    size, mark = len(asked), bytes(asked[: len(_MARK)])
    way = bytes(incoming.frames[0])
    value = float(_words(asked).sum()) / (size // 4) + 1 if way == _USED else None
    slot = incoming.allocate(size) if way != _COPIED else None
    frame: memoryview | bytearray = slot or payloads.setdefault(size, bytearray(size))
    if value is None:
        frame[: len(mark)] = mark
    else:
        _words(frame).fill_(value)
    reply: list[Buffer] = [incoming.frames[0], frame]
    incoming.reply(reply)


@contextmanager
def serving(url: str, key: Path | None = None) -> Iterator[None]:
    """Run an echo server in a process of its own for the time of a ``with`` block.

    Args:
        url: where it listens.
        key: file of its secret key.

    Raises:
        SetupError: it does not come up.
    """
    words = [sys.executable, "-m", "tsqp.bench.echo", "serve", url, *([str(key)] if key else [])]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if not process.stdin or not process.stdout or process.stdout.readline() != _READY:
            raise SetupError(f"the echo server at {url} did not start; it says above why.")
        try:
            yield
        finally:
            process.stdin.close()


if __name__ == "__main__":
    if sys.argv[1:2] != ["serve"] or len(sys.argv) not in (3, 4):
        sys.exit("usage: python -m tsqp.bench.echo serve URL [KEY]")
    serve(*sys.argv[2:])
