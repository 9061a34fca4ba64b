"""How long a message and its answer take over an endpoint, with no product between: a server that answers, a client.

Two ways are timed. Copied: both sides send from memory of their own, and the client takes the answer out. In place:
both sides have their words in a slot of the shared memory, send that, and release it; where there is none, this is the
first way. Making and using the words themselves is not timed. ``python -m tsqp.bench.echo serve URL`` answers until
its standard input ends; ``serving`` starts it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tsqp.errors import InputError, SetupError
from tsqp.transport.base import Buffer, ClientTransport, Incoming
from tsqp.transport.client import open_client
from tsqp.transport.server import Server
from tsqp.transport.urls import parse

MAX_MESSAGE_BYTES = 32 << 20
_TIMEOUT_S = 30.0
_WARM_UP = 10
_MARK = b"echo"
_COPIED, _IN_PLACE = b"copied", b"in place"
_READY = "ready\n"


def round_trip(endpoint: str, size: int, in_place: bool, repeats: int = 100) -> float:  # noqa: FBT001
    """Return the median seconds of a round trip with a frame of ``size`` bytes each way, over a link of its own.

    Args:
        endpoint: where ``serving`` or ``serve`` answers.
        size: of the frame beside the header.
        in_place: whether slots are used.
        repeats: how many are timed, after some to warm up.

    Raises:
        TsqpError: as connecting and receiving do.
    """
    with echo_client(endpoint) as client:
        for _ in range(_WARM_UP):
            client.seconds(size, in_place=in_place)
        return statistics.median(client.seconds(size, in_place=in_place) for _ in range(repeats))


@contextmanager
def echo_client(endpoint: str) -> Iterator[EchoClient]:
    """Open a link for the time of a ``with`` block; to compare endpoints, time them in turns."""
    link = open_client(parse(endpoint), MAX_MESSAGE_BYTES)
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

    def seconds(self, size: int, *, in_place: bool) -> float:
        """Time one round trip.

        Raises:
            InputError: the answer is not the server's.
        """
        if size < len(_MARK):
            raise InputError(f"an echo of {size} bytes: at least {len(_MARK)} are needed.")
        payload = self._payloads.setdefault(size, bytearray(_MARK.ljust(size, b"\1")))
        started = time.perf_counter()
        # What was written to a slot of this size before is still there, or was never: only its mark is.
        frame = (self._link.allocate(size) if in_place else None) or payload
        frame[: len(_MARK)] = _MARK
        self._link.send([_IN_PLACE if in_place else _COPIED, frame])
        delivery = self._link.receive(_TIMEOUT_S)
        frames = delivery.frames if in_place else delivery.private()
        answer, length = bytes(frames[1][: len(_MARK)]), len(frames[1])
        delivery.release()
        elapsed = time.perf_counter() - started
        if (answer, length) != (_MARK, size):
            raise InputError(f"expected an echo of {size} bytes, got {length} bytes of something else.")
        return elapsed


def serve(url: str) -> None:
    """Answer messages until standard input ends, each with as many bytes in the same way.

    Raises:
        SetupError: the address is in use or cannot be bound.
    """
    server = Server([parse(url)], MAX_MESSAGE_BYTES, sys.stdin.fileno())
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
    slot = incoming.allocate(size) if bytes(incoming.frames[0]) == _IN_PLACE else None
    frame: memoryview | bytearray = slot or payloads.setdefault(size, bytearray(size))
    frame[: len(mark)] = mark
    reply: list[Buffer] = [incoming.frames[0], frame]
    incoming.reply(reply)


@contextmanager
def serving(url: str) -> Iterator[None]:
    """Run an echo server in a process of its own for the time of a ``with`` block.

    Raises:
        SetupError: it does not come up.
    """
    words = [sys.executable, "-m", "tsqp.bench.echo", "serve", url]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if not process.stdin or not process.stdout or process.stdout.readline() != _READY:
            raise SetupError(f"the echo server at {url} did not start; it says above why.")
        try:
            yield
        finally:
            process.stdin.close()


if __name__ == "__main__":
    if sys.argv[1:2] != ["serve"] or len(sys.argv) != 3:  # noqa: PLR2004  the command and its address
        sys.exit("usage: python -m tsqp.bench.echo serve URL")
    serve(sys.argv[2])
