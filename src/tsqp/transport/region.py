"""One connection over shared memory, as either side sees it: a region, its two halves and a socket beside it.

The first page of the region holds two counters, the rest is one half for each direction. A message is one small
datagram: its short frames, and where in the sender's half its long ones lie. docs/protocol.md has the layout.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence

from tsqp.errors import InputError, ProtocolError
from tsqp.transport.base import Buffer

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_GREETING = b"tsqp region 1"
REFUSAL = b"\xff\xff\xff\xff"
_PAGE = mmap.PAGESIZE
_ALIGNMENT = 64
# Frames travel in the datagram itself while they are this short together.
_INLINE_BYTES = 4096
_MAX_FRAMES = 1 << 12
_MAX_DATAGRAM = 1 << 17
_INLINE = (1 << 64) - 1
_COUNT = struct.Struct("<I")
_SPAN = struct.Struct("<QQ")
# Indices of the counters, as 64-bit words: messages consumed by the client, and by the worker.
_CLIENT_CONSUMED, _WORKER_CONSUMED = 0, 8


class FullError(Exception):
    """There is no room at the moment."""


class Room:
    """Where in the sender's half its messages lie until the receiver has consumed them, oldest first.

    Starts again at the front whenever it is empty: few pages are touched, and they stay in the cache.

    Args:
        size: of the half, in bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._spans: deque[tuple[int, int]] = deque()
        self._consumed = 0

    def release(self, consumed: int) -> None:
        """Free the messages before number ``consumed``, as the receiver counts them.

        Raises:
            ProtocolError: the count goes backwards or beyond what was sent.
        """
        if not self._consumed <= consumed <= self._consumed + len(self._spans):
            raise ProtocolError("the shared region's counter of consumed messages is wrong.")
        for _ in range(consumed - self._consumed):
            self._spans.popleft()
        self._consumed = consumed

    def reserve(self, size: int) -> int:
        """Return the offset of ``size`` free bytes.

        Raises:
            FullError: not before more is released.
        """
        first, last = (self._spans[0][0], self._spans[-1][1]) if self._spans else (0, 0)
        wrapped = last < first
        if not wrapped and last + size <= self.size:
            start = last
        elif not wrapped and size < first:
            start = 0
        elif wrapped and last + size < first:
            start = last
        else:
            raise FullError
        self._spans.append((start, start + size))
        return start


class Link:
    """Sends and receives messages.

    Args:
        connection: the socket beside the region.
        region: the shared memory.
        client: whether this is the client's side.
    """

    def __init__(self, connection: socket.socket, region: mmap.mmap, *, client: bool) -> None:
        connection.setblocking(False)
        self.connection = connection
        self._memory = memoryview(region)
        # Each is stored and loaded as one aligned word, which the struct module does not promise: it clears first.
        self._counters = self._memory[:_PAGE].cast("Q")
        self._half = (len(region) - _PAGE) // 2
        self._out, self._in = (_PAGE, _PAGE + self._half) if client else (_PAGE + self._half, _PAGE)
        ours, theirs = (_CLIENT_CONSUMED, _WORKER_CONSUMED) if client else (_WORKER_CONSUMED, _CLIENT_CONSUMED)
        self._own_counter, self._peer_counter = ours, theirs
        self._room = Room(self._half)
        self._consumed = 0
        self._unsent: deque[tuple[Sequence[Buffer], bool]] = deque()
        # The oldest unsent message's datagram, once its long frames are in the region.
        self._datagram: bytes | None = None

    @property
    def has_unsent(self) -> bool:
        """Whether messages wait for room."""
        return bool(self._unsent)

    def send(self, frames: Sequence[Buffer], *, consumes: bool = False) -> None:
        """Send, or keep for ``flush``.

        Args:
            frames: the message; they must not change until it is sent.
            consumes: the oldest message received is no longer needed once this is sent.

        Raises:
            InputError: the message can never fit.
            ProtocolError, OSError: as ``flush``.
        """
        size = sum(_padded(frames))
        if size > self._half or len(frames) > _MAX_FRAMES:
            raise InputError(
                f"a message of {size} bytes does not fit the shared region of {self._half}: shorten the prompt, lower "
                "--batch, or raise TSQP_MAX_MESSAGE_BYTES on both sides."
            )
        self._unsent.append((frames, consumes))
        self.flush()

    def flush(self) -> None:
        """Send what there is room for.

        Raises:
            ProtocolError: the peer's counter is wrong.
            OSError: the peer is gone.
        """
        while self._unsent:
            frames, consumes = self._unsent[0]
            try:
                self._room.release(self._counters[self._peer_counter])
                self._datagram = self._datagram or self._written(frames)
                self.connection.send(self._datagram)
            except (FullError, BlockingIOError):
                return
            self._datagram = None
            self._unsent.popleft()
            if consumes:
                self.consume()

    def _written(self, frames: Sequence[Buffer]) -> bytes:
        """Copy long frames into this side's half; return the datagram that says where."""
        rooms = _padded(frames)
        offset = self._room.reserve(sum(rooms))
        parts: list[Buffer] = [_COUNT.pack(len(frames))]
        for frame, room in zip(frames, rooms, strict=True):
            if room:
                start = self._out + offset
                self._memory[start : start + len(frame)] = frame
                parts.append(_SPAN.pack(offset, len(frame)))
            else:
                parts += (_SPAN.pack(_INLINE, len(frame)), frame)
            offset += room
        return b"".join(parts)

    def receive(self) -> list[Buffer]:
        """Take the message whose datagram is here. Long frames are views of the region until ``consume``.

        Raises:
            BlockingIOError: there is none.
            OSError, EOFError: the peer is gone.
            ConnectionRefusedError: the worker refused the region.
            ProtocolError: it is malformed.
        """
        try:
            datagram = self.connection.recv(_MAX_DATAGRAM)
        except ConnectionResetError:  # told once where the peer left something unread; its last words come after
            datagram = self.connection.recv(_MAX_DATAGRAM)
        if not datagram:
            raise EOFError
        if datagram == REFUSAL:
            raise ConnectionRefusedError
        try:
            return self._frames(memoryview(datagram))
        except struct.error as error:
            raise ProtocolError("a datagram beside the shared region is cut short.") from error

    def _frames(self, datagram: memoryview) -> list[Buffer]:
        (count,) = _COUNT.unpack_from(datagram)
        if count > _MAX_FRAMES:
            raise ProtocolError(f"a message of {count} frames; at most {_MAX_FRAMES} are allowed.")
        at = _COUNT.size
        room = self._half  # frames that overlap could otherwise be larger together than the region is
        frames: list[Buffer] = []
        for _ in range(count):
            offset, length = _SPAN.unpack_from(datagram, at)
            at += _SPAN.size
            if offset == _INLINE:
                frame = datagram[at : at + length]
                at += length
            else:
                frame = self._memory[self._in : self._in + self._half][offset : offset + length]
                room -= length
            if len(frame) != length or room < 0:
                raise ProtocolError("a frame beside the shared region lies outside it.")
            frames.append(frame)
        return frames

    def consume(self) -> None:
        """Tell the peer that the oldest message received is no longer needed."""
        self._consumed += 1
        self._counters[self._own_counter] = self._consumed


def _padded(frames: Sequence[Buffer]) -> list[int]:
    """Return the room that each frame takes in the region: none while it goes into the datagram."""
    totals = itertools.accumulate(map(len, frames))
    return [
        0 if total <= _INLINE_BYTES else -(-len(frame) // _ALIGNMENT) * _ALIGNMENT
        for frame, total in zip(frames, totals, strict=True)
    ]


def region_bytes(max_message_bytes: int) -> int:
    """Return the size of a region whose halves hold messages of ``max_message_bytes``."""
    return _PAGE + 2 * (-(-max_message_bytes // _PAGE) * _PAGE)


def make_region(max_message_bytes: int) -> tuple[mmap.mmap, int]:
    """Make a sealed region; return it and its descriptor, which the caller closes.

    Raises:
        OSError: there is no memory or no descriptor left.
    """
    size = region_bytes(max_message_bytes)
    descriptor = os.memfd_create("tsqp", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return mmap.mmap(descriptor, size), descriptor
    except OSError:
        os.close(descriptor)
        raise


def hand_over(connection: socket.socket, descriptor: int) -> None:
    """Give the worker a region's descriptor."""
    socket.send_fds(connection, [_GREETING], [descriptor])


def accept_region(connection: socket.socket, max_message_bytes: int) -> mmap.mmap:
    """Receive a client's region.

    Raises:
        BlockingIOError: it has not come yet.
        EOFError: the client closed.
        ProtocolError: not exactly one sealed region of an acceptable size.
    """
    greeting, descriptors, _, _ = socket.recv_fds(connection, len(_GREETING) + 1, 4)
    try:
        if not greeting:
            raise EOFError
        if greeting != _GREETING or len(descriptors) != 1:
            raise ProtocolError(f"expected one shared region, got {len(descriptors)}.")
        try:
            sealed = fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & _SEALS == _SEALS
        except OSError:
            sealed = False
        size, limit = os.fstat(descriptors[0]).st_size, region_bytes(max_message_bytes)
        if not sealed or not region_bytes(1) <= size <= limit or size % _PAGE:
            raise ProtocolError(
                f"a shared region of {size} bytes, {'' if sealed else 'not '}sealed: expected a sealed one of whole "
                f"pages and at most {limit} bytes (TSQP_MAX_MESSAGE_BYTES)."
            )
        return mmap.mmap(descriptors[0], size)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
