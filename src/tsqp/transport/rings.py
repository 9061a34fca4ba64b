"""Doorbell rings inside a region: datagrams where there is no socket to carry them.

One producer and one consumer each. Heads and tails are 64-bit words that only grow; each side writes one of them, keeps
its own in private memory, and believes the other's only within bounds. A record is its number, its length and the
datagram, padded to 8 bytes; it is copied out before it is looked at.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable

from tsqp.errors import ProtocolError
from tsqp.threads import available_cores
from tsqp.transport.datagrams import MAX_DATAGRAM
from tsqp.transport.link import fence

RING_BYTES = 1 << 17
_RECORD = struct.Struct("<QQ")
_WORD = 8
# How long a client spins, yielding its core, before it sleeps: a round trip without a product takes less. On a single
# core it does not.
_SPIN_S = 0.0001
MAX_SLEEP_S = 0.001
_MIN_SLEEP_S = 0.00002
# A sleep is this part of what has been waited so far: a wait is overslept by about as much.
_SLEEP_SHARE = 0.125


class Ring:
    """One direction.

    Args:
        words: of the region, 64 bits each, where head and tail are.
        data: the ring's bytes.
        head: index of the word that the producer writes: bytes written so far.
        tail: index of the word that the consumer writes: bytes read so far.
    """

    def __init__(self, words: memoryview, data: memoryview, head: int, tail: int) -> None:
        self._words = words
        self._data = data
        self._head, self._tail = head, tail
        self._written = self._read = self._number = 0

    def put(self, datagram: bytes) -> None:
        """Write one datagram.

        Raises:
            BlockingIOError: there is no room at the moment.
            ProtocolError: the consumer's word is wrong.
        """
        record = _RECORD.pack(self._number, len(datagram)) + datagram
        record += bytes(-len(record) % _WORD)
        read = self._words[self._tail]
        if not self._written - len(self._data) <= read <= self._written or read % _WORD:
            raise ProtocolError("the tail of a ring in the shared region is wrong.")
        if self._written + len(record) - read > len(self._data):
            raise BlockingIOError
        at = self._written % len(self._data)
        first = min(len(record), len(self._data) - at)
        self._data[at : at + first] = record[:first]
        self._data[: len(record) - first] = record[first:]
        self._number += 1
        self._written += len(record)
        fence()
        self._words[self._head] = self._written

    def __bool__(self) -> bool:
        """Tell whether there is something to take, or something wrong."""
        return bool(self._words[self._head] != self._read)

    def take(self) -> bytearray:
        """Copy one datagram out.

        Raises:
            BlockingIOError: there is none.
            ProtocolError: the producer's word or its record is wrong.
        """
        written = self._words[self._head]
        fence()
        there = written - self._read
        if there == 0:
            raise BlockingIOError
        if not _RECORD.size <= there <= len(self._data) or there % _WORD:
            raise ProtocolError("the head of a ring in the shared region is wrong.")
        number, length = _RECORD.unpack(self._copied(self._read, _RECORD.size))
        size = _RECORD.size + length + -length % _WORD
        if number != self._number or length > MAX_DATAGRAM or size > there:
            raise ProtocolError("a record in a ring of the shared region is wrong.")
        datagram = self._copied(self._read + _RECORD.size, length)
        self._number += 1
        self._read += size
        fence()
        self._words[self._tail] = self._read
        return datagram

    def _copied(self, position: int, size: int) -> bytearray:
        at = position % len(self._data)
        first = min(size, len(self._data) - at)
        return bytearray(self._data[at : at + first]) + self._data[: size - first]


class RingBell:
    """Two rings as ``Doorbell``.

    Args:
        outgoing: what this side writes.
        incoming: what the peer writes.
        check_peer: raises EOFError once the peer is gone; called often.
        on_close: hangs up.
    """

    def __init__(
        self, outgoing: Ring, incoming: Ring, check_peer: Callable[[], None], on_close: Callable[[], None]
    ) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._check_peer = check_peer
        self._on_close = on_close
        self._spin_s = _SPIN_S if available_cores() > 1 else 0.0

    @property
    def is_ready(self) -> bool:
        """Whether there is something to receive."""
        return bool(self._incoming)

    def send(self, datagram: bytes) -> None:
        """See ``Doorbell.send``."""
        self._check_peer()
        self._outgoing.put(datagram)

    def receive(self) -> bytearray:
        """See ``Doorbell.receive``. What looks wrong may be the next client's, where the peer took the seat back."""
        try:
            return self._incoming.take()
        except ProtocolError:
            self._check_peer()
            raise

    def wait(self, limit_s: float) -> bool:
        """See ``Doorbell.wait``: spin, then sleep longer and longer."""
        started = time.perf_counter()
        while not self._incoming:
            waited = time.perf_counter() - started
            if waited >= limit_s:
                self._check_peer()
                return bool(self._incoming)
            if waited < self._spin_s:
                os.sched_yield()
            else:
                self._check_peer()
                time.sleep(min(pause_after(waited), limit_s - waited))
        return True

    def close(self) -> None:
        """See ``Doorbell.close``."""
        self._on_close()


def pause_after(waited_s: float) -> float:
    """Return how long to sleep after having waited in vain for so long."""
    return min(MAX_SLEEP_S, max(_MIN_SLEEP_S, waited_s * _SLEEP_SHARE))
