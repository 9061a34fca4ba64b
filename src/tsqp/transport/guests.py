"""The clients of a shared-memory listener, whatever their doorbell: who is heard, what waits for room, who is dropped.

A client is not heard while a reply to it waits for room, nor while it holds as much as it may (``Client.is_full``):
what it can make the worker hold is that, one message more, and its region.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tsqp.errors import InputError, ProtocolError
from tsqp.transport.base import Buffer, Client, Incoming
from tsqp.transport.link import Link

# How soon to try again where a message waits for room.
RETRY_S = 0.001
# A client that takes no reply, or hands no region over, for this long is dropped.
PATIENCE_S = 30.0

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Guest:
    """A client as the worker sees it.

    Attributes:
        key: what its listener knows it by.
        link: to it, once it has a region.
        since: when it came, or when its oldest reply began to wait.
        answering: messages of its that have no reply yet: their frames and slots may be in use.
        waits: it is not heard.
        client: who it is to the worker.
    """

    key: int
    link: Link | None = None
    since: float = field(default_factory=time.monotonic)
    answering: int = 0
    waits: bool = False
    client: Client = field(default_factory=Client)


class OnWait(Protocol):
    """Told that a client is no longer heard, since it waits for ``room``, and that it is heard again."""

    def __call__(self, guest: Guest, *, room: bool) -> None:
        """React."""


class Guests:
    """All clients of one listener.

    Args:
        on_wait: told when a client is not heard for a while.
        on_drop: told when one is gone; ends its doorbell.
    """

    def __init__(self, on_wait: OnWait, on_drop: Callable[[Guest], None]) -> None:
        self._guests: dict[int, Guest] = {}
        self._on_wait = on_wait
        self._on_drop = on_drop

    def __contains__(self, guest: Guest) -> bool:
        return self._guests.get(guest.key) is guest

    def __iter__(self) -> Iterator[Guest]:
        return iter(list(self._guests.values()))

    @property
    def has_unsent(self) -> bool:
        """Whether a client waits for room."""
        return any(guest.waits for guest in self._guests.values())

    def add(self, guest: Guest) -> None:
        """Take a client in."""
        self._guests[guest.key] = guest

    def take(self, is_ready: Callable[[Guest], bool]) -> Incoming | None:
        """Send what waits, and return the next message of a client that is ready, if there is one.

        Args:
            is_ready: tells whether a client has sent something; its errors drop the client.
        """
        for guest in list(self._guests.values()):
            try:
                incoming = self._heard(guest, is_ready)
            except BlockingIOError:
                continue
            except (OSError, EOFError, ProtocolError) as error:
                self.drop(guest, error)
                continue
            if incoming:
                if len(self._guests) > 1:  # last in line next time, so that a busy client does not starve the others
                    self._guests[guest.key] = self._guests.pop(guest.key)
                return incoming
        return None

    def _heard(self, guest: Guest, is_ready: Callable[[Guest], bool]) -> Incoming | None:
        link = guest.link
        if link and guest.waits:
            link.flush()
            if link.has_unsent and time.monotonic() > guest.since + PATIENCE_S:
                raise ProtocolError("it took no reply.")
        if link and self._must_wait(guest, link):
            return None
        if not is_ready(guest) or link is None:
            return None
        number, delivery = link.receive()
        if len(self._guests) == 1:
            link.leave_core()
        guest.answering += 1
        exchange = _Exchange(self, guest, link, number)
        return Incoming(delivery.frames or (b"",), False, exchange.reply, exchange.allocate, guest.client)

    def _must_wait(self, guest: Guest, link: Link) -> bool:
        """Tell whether a client is not heard now; who polls is told of changes."""
        waits = link.has_unsent or guest.client.is_full
        if waits != guest.waits:
            guest.waits = waits
            self._on_wait(guest, room=waits)
        return waits

    def reply(self, guest: Guest, link: Link, frames: Sequence[Buffer], number: int) -> None:
        """Send a client the reply to its message of a number."""
        if guest not in self:
            return
        waited = link.has_unsent
        try:
            link.send(frames, consumes=number)
        except (OSError, EOFError, ProtocolError, InputError) as error:
            self.drop(guest, error)
            return
        if link.has_unsent and not waited:
            guest.since = time.monotonic()
        self._must_wait(guest, link)

    def drain(self, limit_s: float) -> None:
        """Let replies that wait for room leave, for at most so long; nobody is heard."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            unsent = [(guest, guest.link) for guest in self if guest.link and guest.link.has_unsent]
            for guest, link in unsent:
                try:
                    link.flush()
                except (OSError, EOFError, ProtocolError) as error:  # noqa: PERF203  each client's own
                    self.drop(guest, error)
            if not unsent:
                return
            time.sleep(RETRY_S)

    def drop(self, guest: Guest, error: Exception) -> None:
        """End a client's link."""
        if isinstance(error, (ProtocolError, InputError)):
            _log.warning("dropped a client of shared memory: %s", error)
        del self._guests[guest.key]
        guest.client.end()
        self._on_drop(guest)

    def drop_all(self) -> None:
        """End every link."""
        for guest in self:
            self.drop(guest, EOFError())


class _Exchange:
    """One message and its reply: what ``Incoming`` needs of them."""

    __slots__ = ("_answered", "_guest", "_guests", "_link", "_number", "_slots")

    def __init__(self, guests: Guests, guest: Guest, link: Link, number: int) -> None:
        self._guests = guests
        self._guest = guest
        self._link = link
        self._number = number
        self._slots: list[memoryview] = []
        self._answered = False

    def allocate(self, size: int) -> memoryview | None:
        if self._guest not in self._guests:
            return None
        try:
            slot = self._link.allocate(size)
        except ProtocolError as error:
            self._guests.drop(self._guest, error)
            return None
        if slot is not None:
            self._slots.append(slot)
        return slot

    def reply(self, frames: Sequence[Buffer]) -> None:
        self._guests.reply(self._guest, self._link, frames, self._number)
        for slot in self._slots:
            self._link.discard(slot)  # those that were not sent
        self._guest.answering -= not self._answered
        self._answered = True
