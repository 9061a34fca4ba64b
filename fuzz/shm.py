"""Shared memory: datagrams, rings, links and spans against a peer that writes anything, and a named region's header."""

from __future__ import annotations

import contextlib
import random
import struct
from collections import deque
from functools import cache
from pathlib import Path

from fuzz import framing
from fuzz.models import scratch
from tsqp.errors import InputError, ProtocolError, SetupError
from tsqp.transport import datagrams
from tsqp.transport.link import PAGE, Link
from tsqp.transport.named import NamedRegion, OpenedRegion, Shape
from tsqp.transport.rings import Ring
from tsqp.transport.spans import FullError, Spans, padded
from tsqp.transport.urls import Endpoint

_DATAGRAM, _RING, _LINK, _REGION, _SPANS = range(5)
_HALF = 4 * PAGE
_MOST = 64
_REGION_LIMIT = 1 << 20


def run(data: bytes) -> None:
    """Do what the first byte says with the rest."""
    kind, rest = (data[0] % 5 if data else 0), data[1:]
    (_datagram, _ring, _link, _region, _span)[kind](rest)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a 64-bit word with a number that is near a bound."""
    raw = bytearray(data)
    words = (
        0,
        1,
        8,
        16,
        PAGE,
        _HALF,
        _HALF - 64,
        1 << 31,
        1 << 63,
        (1 << 64) - 1,
        (1 << 64) - 8,
        rng.randrange(1 << 14),
    )
    at = 1 + 8 * rng.randrange(max(1, len(raw) // 8))
    raw[at : at + 8] = struct.pack("<Q", rng.choice(words))
    return bytes(raw)


def _datagram(raw: bytes) -> None:
    half = memoryview(bytearray(_HALF))
    with contextlib.suppress(ProtocolError):
        frames, _ = datagrams.read(memoryview(raw), half)
        if sum(map(len, frames)) > len(half) + len(raw):
            raise AssertionError("frames are longer together than all that there is.")


def _ring(raw: bytes) -> None:
    """Read a ring of which the producer's word and all bytes are the input's."""
    words = memoryview(bytearray(32)).cast("Q")
    memory = memoryview(bytearray(1024))
    words[0] = int.from_bytes(raw[:8].ljust(8, b"\0"), "little")
    words[1] = int.from_bytes(raw[8:16].ljust(8, b"\0"), "little")
    content = raw[16 : 16 + len(memory)]
    memory[: len(content)] = content
    reader, writer = Ring(words, memory, 0, 2), Ring(words, memory, 3, 1)
    with contextlib.suppress(ProtocolError, BlockingIOError):
        writer.put(b"x" * 9)
    with contextlib.suppress(ProtocolError, BlockingIOError):
        for _ in range(_MOST):
            if len(reader.take()) > len(memory):
                raise AssertionError("a datagram is longer than its ring.")


class _Bell:
    """A doorbell through which the input's datagrams come."""

    def __init__(self) -> None:
        self.incoming: deque[bytes] = deque()
        self.sent = 0

    def send(self, datagram: bytes) -> None:
        """Take a datagram, or refuse every fifth."""
        self.sent += 1
        if self.sent % 5 == 0 or not datagram:
            raise BlockingIOError

    def receive(self) -> bytearray:
        """Give the next."""
        if not self.incoming:
            raise BlockingIOError
        return bytearray(self.incoming.popleft())

    def wait(self, limit_s: float) -> bool:
        """Never wait."""
        return bool(self.incoming) and limit_s >= 0

    def close(self) -> None:
        """Nothing is open."""


def _link(raw: bytes) -> None:
    """Talk over a region whose counters and datagrams are the input's, until the peer is found to break the rules."""
    region = memoryview(bytearray(PAGE + 2 * _HALF))
    bell = _Bell()
    link = Link(bell, region, client=bool(raw[:1] > b"\x7f"))
    counters = region[:PAGE].cast("Q")
    slots: list[memoryview] = []
    numbers: list[int] = []
    with contextlib.suppress(ProtocolError, InputError):
        for frames in framing.unpack(raw)[1][:_MOST]:
            _step(link, bell, counters, frames, slots, numbers)


def _step(
    link: Link, bell: _Bell, counters: memoryview, frames: list[bytes], slots: list[memoryview], numbers: list[int]
) -> None:
    head = frames[0] if frames else b""
    choice, value = (head[0] % 7 if head else 0), int.from_bytes(head[1:9], "little")
    if choice == 0:
        counters[0] = counters[8] = value
    elif choice == 1:
        bell.incoming.extend(frames[1:])
        with contextlib.suppress(BlockingIOError):
            number, delivery = link.receive()
            numbers.append(number)
            if sum(map(len, delivery.frames)) > _HALF + datagrams.MAX_DATAGRAM:
                raise AssertionError("frames are longer together than all that there is.")
    elif choice == 2:
        link.send([bytes(value % (2 * _HALF)), *frames[1:]])
    elif choice == 3:
        slot = link.allocate(value % (2 * _HALF), kept=bool(value & 1))
        slots += [slot] if slot is not None else []
    elif choice == 4 and slots:
        link.send([b"h", slots.pop()])
    elif choice == 5 and slots:
        link.discard(slots.pop(0))
    elif numbers:
        link.release(numbers.pop())


@cache
def _file() -> Path:
    return scratch() / "region"


def _region(raw: bytes) -> None:
    """Open a file whose first page is the input's; its size fits what that page says, where it can."""
    page = raw[:PAGE].ljust(PAGE, b"\0")
    seats, half = struct.unpack_from("<QQ", page, 16)
    path = _file()
    path.write_bytes(page)
    path.chmod(0o600)
    total = Shape(seats, half).total
    if total <= _REGION_LIMIT:
        with path.open("r+b") as file:
            file.truncate(max(total, PAGE))
    with contextlib.suppress(SetupError):
        opened = OpenedRegion(Endpoint("shm", path=str(path)), _HALF)
        for seat in range(min(opened.shape.seats, 2)):
            opened.front(seat)
            opened.seat(seat).rings()
        opened.close()


def _span(raw: bytes) -> None:
    """Take and free as the input says, and see that no two spans touch the same bytes."""
    spans, taken = Spans(_HALF), list[tuple[int, int]]()
    for place in range(0, min(len(raw), 3 * _MOST), 3):
        choice, size = raw[place], int.from_bytes(raw[place + 1 : place + 3], "little")
        if choice % 2 and taken:
            spans.free(*taken.pop(choice % len(taken)))
            continue
        with contextlib.suppress(FullError):
            start, end = (at := spans.take(size)), at + padded(size)
            if size and (end > _HALF or any(start < at + padded(long) and at < end for at, long in taken if long)):
                raise AssertionError("a span that is in use is handed out again, or one outside.")
            taken.append((at if not size else start, size))
    if spans.used != sum(padded(size) for _, size in taken):
        raise AssertionError("the bytes in use are miscounted.")


def _first_page() -> bytes:
    path = scratch() / "made"
    region = NamedRegion(Endpoint("shm", path=str(path)), PAGE)
    page = path.read_bytes()[:PAGE]
    region.close()
    # Who made it has ended by the time that this is read.
    return page.rstrip(b"\0")


def seeds() -> dict[str, bytes]:
    """Return what an honest peer would write."""
    whole = datagrams.whole([b"header", b"frame"])
    spans = datagrams.write([datagrams.INLINE, 6, 64, 128, 4096, 64], [b"header"])
    records = b"".join(struct.pack("<QQ", number, 8) + b"datagram" for number in range(3))
    steps = [
        [bytes([3]) + struct.pack("<Q", 9000)],
        [bytes([4])],
        [bytes([0]) + struct.pack("<Q", 1)],
        [bytes([1]), spans],
        [bytes([6])],
        [bytes([2]) + struct.pack("<Q", 10000), b"more"],
        [bytes([1]), whole],
        [bytes([2]) + struct.pack("<Q", 16000), b"more"],
    ]
    return {
        "datagram-whole": bytes([_DATAGRAM]) + whole,
        "datagram-spans": bytes([_DATAGRAM]) + spans,
        "ring": bytes([_RING]) + struct.pack("<QQ", len(records), 0) + records,
        "link": bytes([_LINK]) + framing.pack(1, steps),
        "region": bytes([_REGION]) + _first_page(),
        "spans": bytes([_SPANS]) + bytes([0, 0, 4, 0, 100, 1, 3, 0, 0, 0, 0, 16, 1, 0, 0, 0, 255, 63]),
    }
