"""One connection over shared memory, as either side sees it: a region with two halves and two counters, and a doorbell.

A message is one small datagram through the doorbell: its short frames, and where in the sender's half its long ones
lie. A span belongs to the receiver from then until its counter has passed the message. docs/protocol.md has the layout.
"""

from __future__ import annotations

import itertools
import mmap
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from tsqp.errors import InputError, ProtocolError
from tsqp.transport import datagrams, spinning
from tsqp.transport.base import Buffer, Delivery
from tsqp.transport.spans import FullError, Spans, padded

PAGE = mmap.PAGESIZE
# Nearly every message; one that has fewer short frames and nothing else needs no bookkeeping.
_FEW = 8
# Indices of the counters, as 64-bit words: messages consumed by the client, and by the worker.
_CLIENT_CONSUMED, _WORKER_CONSUMED = 0, 8
# Likewise the core on which each sent its last message.
_CLIENT_CORE, _WORKER_CORE = 96, 104

_barrier = threading.Lock()


class Doorbell(Protocol):
    """What carries datagrams, in order, and tells of the peer's end."""

    def send(self, datagram: bytes) -> None:
        """Pass one datagram on.

        Raises:
            BlockingIOError: there is no room at the moment.
            OSError, EOFError: the peer is gone.
            ProtocolError: the peer breaks the rules.
        """

    def receive(self) -> bytearray:
        """Take the oldest datagram; a copy that the peer cannot change.

        Raises:
            BlockingIOError: there is none.
            OSError, EOFError: the peer is gone.
            ConnectionRefusedError: the worker refused the region.
            ProtocolError: the peer breaks the rules.
        """

    def wait(self, limit_s: float) -> bool:
        """Wait until a datagram is there; False if none came in time.

        Raises:
            OSError, EOFError, ProtocolError: as ``receive``.
        """

    def close(self) -> None:
        """Hang up. May be called twice."""


@dataclass(slots=True)
class _Part:
    """A frame of a message, until its room is free again.

    Attributes:
        frame: its bytes.
        room: what it takes of the half; 0 for one that travels in the datagram.
        offset: where in the half it lies; None before it is there.
        kept: its sender still holds it, a slot: it is not moved, nor free when the peer has consumed it.
        consumed: the peer has, or it will not be sent; free once it is not kept.
    """

    frame: Buffer
    room: int
    offset: int | None = None
    kept: bool = False
    consumed: bool = False


@dataclass(slots=True)
class _Outgoing:
    """A message that is not sent yet.

    Attributes:
        parts: its frames.
        consumes: the message received that is no longer needed once this is sent.
        datagram: what goes through the doorbell, once all long frames are in the region.
    """

    parts: list[_Part]
    consumes: int | None
    datagram: bytes | None = None


class Link:
    """Sends and receives messages.

    Args:
        bell: the doorbell.
        region: the shared memory: counters, perhaps more, and the two halves at its end.
        data_at: where the first half begins.
        client: whether this is the client's side.
    """

    def __init__(self, bell: Doorbell, region: mmap.mmap | memoryview, *, data_at: int = PAGE, client: bool) -> None:
        self.bell = bell
        self._memory = memoryview(region)
        # Each is stored and loaded as one aligned word, which the struct module does not promise: it clears first.
        self._counters = self._memory[:PAGE].cast("Q")
        self.half = (len(region) - data_at) // 2
        self._out, into = (data_at, data_at + self.half) if client else (data_at + self.half, data_at)
        ours, theirs = (_CLIENT_CONSUMED, _WORKER_CONSUMED) if client else (_WORKER_CONSUMED, _CLIENT_CONSUMED)
        self._own_counter, self._peer_counter = ours, theirs
        self._own_core, self._peer_core = (_CLIENT_CORE, _WORKER_CORE) if client else (_WORKER_CORE, _CLIENT_CORE)
        self._incoming = self._memory[into : into + self.half]
        self._spans = Spans(self.half)
        # Slots that are handed out, by the identity of their memoryview, which is kept so that it stays unique.
        self._slots: dict[int, _Part] = {}
        # Those that are sent and still kept, likewise.
        self._kept: dict[int, _Part] = {}
        self._unsent: deque[_Outgoing] = deque()
        # What the messages take that the peer has not consumed, oldest first, and the number of the first of them.
        self._flying: deque[list[_Part]] = deque()
        self._peer_consumed = 0
        self._received = self._consumed = 0
        self._released: set[int] = set()

    @property
    def has_unsent(self) -> bool:
        """Whether messages wait for room."""
        return bool(self._unsent)

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:
        """Return a writable slot; None where there is no room at the moment, or it is too short to be worth it.

        Args:
            size: in bytes.
            kept: its room is not free again before ``discard``, even if it is sent and consumed. A message that waits
                for this room waits for ``discard``: whoever keeps several gives them back in the order of sending.

        Raises:
            ProtocolError: the peer's counter is wrong.
        """
        if size <= datagrams.MAX_INLINE_BYTES or self._unsent:  # what waits for room comes first
            return None
        self._collect()
        try:
            offset = self._spans.take(size)
        except FullError:
            return None
        slot = self._memory[self._out + offset : self._out + offset + size]
        self._slots[id(slot)] = _Part(slot, size, offset, kept)
        return slot

    def discard(self, slot: memoryview) -> None:
        """Free a slot that is not sent, or give up one that was kept; anything else is let be."""
        part = self._slots.pop(id(slot), None)
        if part:
            part.consumed = True
        else:
            part = self._kept.pop(id(slot), None)
        if part:
            part.kept = False
            if part.consumed:
                self._free((part,))

    def send(self, frames: Sequence[Buffer], *, consumes: int | None = None) -> None:
        """Send, or keep for ``flush``.

        Args:
            frames: the message; they must not change until it is sent. Slots are not copied.
            consumes: number of a message received that is no longer needed once this is sent.

        Raises:
            InputError: the message can never fit. Its slots are free, but for those that are kept.
            ProtocolError, OSError, EOFError: as ``flush``.
        """
        if not self._slots and len(frames) < _FEW and sum(map(len, frames)) <= datagrams.MAX_INLINE_BYTES:
            datagram = datagrams.whole(frames)
            if not self._unsent and self._sent_at_once(datagram, consumes):
                return
            self._unsent.append(_Outgoing([], consumes, datagram))
        else:
            self._unsent.append(_Outgoing(self._parts(frames), consumes))
        self.flush()

    def _sent_at_once(self, datagram: bytes, consumes: int | None) -> bool:
        """Send a message that takes nothing of the region, unless it must wait; tell whether it did not."""
        self._counters[self._own_core] = spinning.core()
        try:
            self.bell.send(datagram)
        except BlockingIOError:
            return False
        self._flying.append([])
        if consumes is not None:
            self.release(consumes)
        self._collect()
        return True

    def _parts(self, frames: Sequence[Buffer]) -> list[_Part]:
        """Sort frames into slots, short ones and long ones.

        Raises:
            InputError: together they can never fit.
        """
        parts: list[_Part] = []
        inline = datagrams.MAX_INLINE_BYTES
        for frame in frames:
            part = self._slots.pop(id(frame), None)
            if part is not None:
                if part.kept:
                    self._kept[id(frame)] = part
            else:
                size = len(frame)
                part = _Part(frame, size if size > inline else 0)
                inline -= 0 if part.room else size
            parts.append(part)
        size = sum([padded(part.room) for part in parts])
        if size > self.half or len(parts) > datagrams.MAX_FRAMES:
            self._free(parts)
            raise InputError(
                f"a message of {size} bytes does not fit the shared region of {self.half}: shorten the prompt, lower "
                "--batch, or raise TSQP_MAX_MESSAGE_BYTES on both sides."
            )
        return parts

    def flush(self) -> None:
        """Send what there is room for, oldest first.

        Raises:
            ProtocolError: the peer's counter is wrong, or its doorbell.
            OSError, EOFError: the peer is gone.
        """
        while self._unsent:
            message = self._unsent[0]
            self._collect()
            try:
                message.datagram = message.datagram or self._written(message)
                self._counters[self._own_core] = spinning.core()
                self.bell.send(message.datagram)
            except (FullError, BlockingIOError):
                return
            self._unsent.popleft()
            long = [part for part in message.parts if part.room]
            for part in long:
                if not part.kept:  # else it keeps its identity
                    part.frame = b""  # it is no longer needed here
            self._flying.append(long)
            if message.consumes is not None:
                self.release(message.consumes)

    def _collect(self) -> None:
        """Free what the peer has consumed."""
        consumed = self._counters[self._peer_counter]
        if consumed == self._peer_consumed:
            return
        if not self._peer_consumed <= consumed <= self._peer_consumed + len(self._flying):
            raise ProtocolError("the shared region's counter of consumed messages is wrong.")
        for _ in range(consumed - self._peer_consumed):
            self._free(self._flying.popleft())
        self._peer_consumed = consumed

    def _free(self, parts: Iterable[_Part]) -> None:
        for part in parts:
            if part.kept:
                part.consumed = True
            elif part.offset is not None:
                self._spans.free(part.offset, part.room)
                part.offset = None

    def _written(self, message: _Outgoing) -> bytes:
        """Copy long frames into this side's half, but for slots; return the datagram that says where they lie.

        Raises:
            FullError: not all have room. None is copied.
        """
        copied = [part for part in message.parts if part.room and part.offset is None]
        try:
            self._place(copied)
        except FullError:
            if self._flying:
                raise
            self._evacuate()
            copied = [part for part in message.parts if part.room and part.offset is None]
            self._place(copied)
        for part in copied:
            start = self._out + (part.offset or 0)
            self._memory[start : start + part.room] = part.frame
        spans: list[int] = []
        for part in message.parts:
            spans += (datagrams.INLINE, len(part.frame)) if part.offset is None else (part.offset, part.room)
        return datagrams.write(spans, [part.frame for part in message.parts if part.offset is None])

    def _place(self, parts: Sequence[_Part]) -> None:
        try:
            for part in parts:
                part.offset = self._spans.take(part.room)
        except FullError:
            self._free(parts)
            raise

    def _evacuate(self) -> None:
        """Make slots of unsent messages ordinary frames: nothing that the peer gives back would make room for them.

        Slots that are kept stay where they are: their words may be asked for again.
        """
        for part in itertools.chain.from_iterable(message.parts for message in self._unsent):
            if part.offset is not None and not part.kept:
                part.frame = bytes(part.frame)
                self._free((part,))

    def receive(self) -> tuple[int, Delivery]:
        """Take the oldest message that is there; return its number and it. The number is for ``release``.

        Raises:
            BlockingIOError: there is none.
            OSError, EOFError: the peer is gone.
            ConnectionRefusedError: the worker refused the region.
            ProtocolError: it is malformed.
        """
        datagram = memoryview(self.bell.receive())
        number = self._received
        self._received += 1
        try:
            frames, shared = datagrams.read(datagram, self._incoming)
        except ProtocolError:
            self.release(number)  # it came, and what is counted must stay what the peer counts
            raise
        if frames:
            frames[0] = bytes(frames[0])  # what is decoded must not change while it is
        return number, Delivery(frames, shared, partial(self.release, number))

    def leave_core(self) -> None:
        """Move this thread to another core if the peer sent from this one: two that take turns should not share it.

        The kernel wakes who waits for a socket on its waker's core, and there the two would wait for each other to
        spin no longer.
        """
        theirs = self._counters[self._peer_core]
        if theirs and theirs == spinning.core():
            spinning.step_aside()

    def release(self, number: int) -> None:
        """Say that a message received is no longer needed. The peer learns of it once all before it are not either."""
        if number > self._consumed:
            self._released.add(number)
        if number != self._consumed:
            return
        self._consumed += 1
        while self._consumed in self._released:
            self._released.remove(self._consumed)
            self._consumed += 1
        fence()
        self._counters[self._own_counter] = self._consumed


def fence() -> None:
    """Order loads and stores before with those after: the memory models of some processors do not by themselves.

    A lock released and taken again does (release, then acquire of one word); the GIL may not be taken in between.
    """
    _barrier.acquire()
    _barrier.release()
    _barrier.acquire()
    _barrier.release()
