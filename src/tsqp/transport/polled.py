"""Shared memory without sockets, ``shm:///dev/shm/NAME``: for where those do not reach, as from a Gramine enclave.

Both sides look at words of a named region (named.py) until there is something to do: for a moment spinning, then with
sleeps of at most a millisecond. Seats are handed out by the worker alone, since no process can compare and swap here.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Container

from tsqp.errors import AbsentPeerError, SetupError
from tsqp.threads import available_cores
from tsqp.transport.base import Incoming
from tsqp.transport.guests import Guest, Guests
from tsqp.transport.link import Link, fence
from tsqp.transport.liveness import Pulse, Watch
from tsqp.transport.named import (
    BEAT,
    CLAIM,
    GENERATION,
    GRANT,
    IDENTITY,
    READY,
    SEAT_BEAT,
    SEAT_IDENTITY,
    NamedRegion,
    OpenedRegion,
    Seat,
    read_identity,
    write_identity,
)
from tsqp.transport.rings import RingBell, pause_after
from tsqp.transport.shm import ShmClient
from tsqp.transport.urls import Endpoint

_CONNECT_S = 5.0
_RETRY_S = 0.001
# How long the worker spins after a message, as over sockets (shm.py).
_SPIN_S = 0.001
# How many messages may come in a row before the seats are looked after all the same.
_LOOK_EVERY = 64
# In place of a ticket, which is odd: the seat's client is dropped, and not all it asked for is answered.
_NOBODY = 2


def connect_named(endpoint: Endpoint, max_message_bytes: int) -> ShmClient:
    """Take a seat in a worker's region.

    Args:
        endpoint: the region.
        max_message_bytes: the longest message that either side may send.

    Raises:
        AbsentPeerError: there is no such region, or nobody who gives a seat.
        SetupError: all seats are taken, or the region is refused.
    """
    region = OpenedRegion(endpoint, max_message_bytes)
    try:
        seat, ticket = _seated(region, endpoint)
    finally:
        region.close()
    occupant = _Occupant(region, seat, ticket)
    requests, replies = seat.rings()
    bell = RingBell(requests, replies, occupant.check_worker, occupant.leave)
    link = Link(bell, seat.memory, data_at=region.shape.data_at, client=True)
    # Once the seat is lost, another client's words lie there.
    return ShmClient(str(endpoint), link, own_region=False)


def _seated(region: OpenedRegion, endpoint: Endpoint) -> tuple[Seat, int]:
    """Ask for each seat that looks free until one is granted."""
    ticket = secrets.randbits(63) | 1
    deadline = time.monotonic() + _CONNECT_S
    fronts = [region.front(number) for number in range(region.shape.seats)]
    while time.monotonic() < deadline:
        for number, words in enumerate(fronts):
            if _granted(words, ticket, deadline):
                return region.seat(number), ticket
        time.sleep(_RETRY_S)
    if all(words[GRANT] for words in fronts):
        raise SetupError(
            f"cannot connect to {endpoint}: all {len(fronts)} seats of the region are taken. End another client, or "
            "start another worker."
        )
    raise AbsentPeerError(
        f"cannot connect to {endpoint}: the worker there gave no seat within {_CONNECT_S:g} s. If it has died, "
        "start it again; it replaces the region."
    )


def _granted(words: memoryview, ticket: int, deadline: float) -> bool:
    """Ask for one seat; tell whether it was granted."""
    if words[CLAIM] or words[GRANT]:
        return False
    words[CLAIM] = ticket
    while not words[GRANT] and time.monotonic() < deadline:
        time.sleep(_RETRY_S)
    if words[GRANT] == ticket:
        write_identity(words, SEAT_IDENTITY)
        fence()
        words[READY] = ticket
        return True
    if words[CLAIM] == ticket:
        words[CLAIM] = 0
    return False


class _Occupant:
    """A client in its seat: shows that it lives, and looks whether the worker does."""

    def __init__(self, region: OpenedRegion, seat: Seat, ticket: int) -> None:
        self._words = region.words
        self._generation = region.generation
        self._seat = seat
        self._ticket = ticket
        self._watch = Watch(read_identity(self._words, IDENTITY), lambda: int(self._words[BEAT]))
        self._pulse = Pulse(self._beat)

    def _beat(self, number: int) -> None:
        if self._seat.words[GRANT] == self._ticket:
            self._seat.words[SEAT_BEAT] = number

    def check_worker(self) -> None:
        if (
            self._words[GENERATION] != self._generation
            or self._seat.words[GRANT] != self._ticket
            or self._watch.is_dead
        ):
            raise EOFError

    def leave(self) -> None:
        self._pulse.stop()
        if self._seat.words[GRANT] == self._ticket:
            self._seat.words[READY] = 0


class PolledListener:
    """A worker's side of all links through one named region.

    Args:
        endpoint: the region's name.
        max_message_bytes: size of each half.

    Raises:
        SetupError: the name is in use, or /dev/shm has no room.
    """

    spin_s = 0.0  # pause_s has it

    def __init__(self, endpoint: Endpoint, max_message_bytes: int) -> None:
        self._region = NamedRegion(endpoint, max_message_bytes)
        self._granting = threading.Lock()
        self._since = [0.0] * len(self._region.seats)
        self._watches: dict[int, Watch] = {}
        self._bells: dict[int, RingBell] = {}
        self._in_a_row = 0
        self._guests = Guests(on_wait=_ignored, on_drop=self._leave)
        self._leaving: list[Guest] = []
        self._spin_s = _SPIN_S if available_cores() > 1 else 0.0
        self._heard = time.monotonic()
        self._pulse = Pulse(self._beat)

    def _beat(self, number: int) -> None:
        self._region.words[BEAT] = number
        self._grant()

    def _grant(self) -> None:
        """Give free seats to who asks. Also done while the worker is not listening, so that clients can wait."""
        with self._granting:
            for number, seat in enumerate(self._region.seats):
                if not seat.words[GRANT] and seat.words[CLAIM]:
                    self._since[number] = time.monotonic()
                    seat.give(seat.words[CLAIM])

    @property
    def has_unsent(self) -> bool:
        """Whether a client waits for room."""
        return self._guests.has_unsent

    @property
    def pause_s(self) -> float:
        """See ``Listener.pause_s``: none for a moment after a message, then longer and longer."""
        waited = time.monotonic() - self._heard
        return 0.0 if waited < self._spin_s else pause_after(waited)

    def take(self, _ready: Container[object]) -> Incoming | None:
        """Send what waits, and return a message if there is one; look after the seats where there is none."""
        incoming = self._guests.take(self._is_ready)
        self._in_a_row = self._in_a_row + 1 if incoming else 0
        if self._in_a_row % _LOOK_EVERY == 0:
            self._look_after_seats()
        if incoming:
            self._heard = time.monotonic()
        return incoming

    def _look_after_seats(self) -> None:
        """Seat who comes, and clear the seats of those who are gone."""
        self._grant()
        for guest in [guest for guest in self._leaving if not guest.answering]:
            # Only now does nothing of ours write to its half any more.
            self._leaving.remove(guest)
            self._region.seats[guest.key].free()
            del self._watches[guest.key]
        for number, seat in enumerate(self._region.seats):
            if seat.words[GRANT] and number not in self._watches:
                self._welcome(number, seat)

    def _welcome(self, number: int, seat: Seat) -> None:
        """Take a client in that was granted a seat, or the seat back if nobody came."""
        if seat.words[READY] == seat.words[GRANT]:
            self._watches[number] = Watch(read_identity(seat.words, SEAT_IDENTITY), lambda: int(seat.words[SEAT_BEAT]))
            requests, replies = seat.rings()
            bell = self._bells[number] = RingBell(replies, requests, lambda: None, lambda: None)
            link = Link(bell, seat.memory, data_at=self._region.shape.data_at, client=False)
            self._guests.add(Guest(number, link))
        elif time.monotonic() > self._since[number] + _CONNECT_S:
            seat.free()

    def _is_ready(self, guest: Guest) -> bool:
        words = self._region.seats[guest.key].words
        if words[READY] != words[GRANT] or self._watches[guest.key].is_dead:
            raise EOFError
        return self._bells[guest.key].is_ready

    def _leave(self, guest: Guest) -> None:
        self._region.seats[guest.key].words[GRANT] = _NOBODY
        self._leaving.append(guest)

    def close(self, linger_s: float = 0.0) -> None:
        """Tell every client, once replies have left or after ``linger_s``, and remove the region's name.

        May be called twice.
        """
        self._guests.drain(linger_s)
        self._pulse.stop()
        self._region.close()


def _ignored(guest: Guest, *, room: bool) -> None:
    """Do nothing: rings need not be told whom to hear."""
