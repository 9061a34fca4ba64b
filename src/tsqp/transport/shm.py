"""Shared-memory transport, ``shm:///path``: tensors in a region that both processes map, and a doorbell beside it.

A path under /dev/shm names a region there, whose doorbells are polled (polled.py). At any other path a UNIX socket is
the doorbell: the client makes the region, an anonymous file sealed against resizing, and hands its descriptor over when
it connects, so that nothing stale is left behind and neither side can shrink it under the other. Both compute on
tensors in place. What is decoded, or checked before it is used, is copied first: the peer could change it in between.
docs/decisions/0007 says why it is built so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import weakref
from collections.abc import Container, Sequence
from pathlib import Path

from zmq import POLLIN, Poller

from tsqp.errors import (
    AbsentPeerError,
    ProtocolError,
    SetupError,
    TransportClosedError,
    TransportTimeoutError,
    TsqpError,
)
from tsqp.threads import available_cores
from tsqp.transport.base import Buffer, Delivery, Incoming
from tsqp.transport.guests import PATIENCE_S, RETRY_S, Guest, Guests
from tsqp.transport.link import Link
from tsqp.transport.region import REFUSAL, SocketBell, accept_region, hand_over, make_region
from tsqp.transport.sockets import check_free, check_own, owner_only
from tsqp.transport.urls import Endpoint

_CONNECT_S = 5.0
_PAUSE_S = 1.0
_CORES = available_cores()
_LINK_ERRORS = (EOFError, OSError, ProtocolError)

_log = logging.getLogger(__name__)

# The links of this process on which answers are awaited.
_awaited: weakref.WeakSet[ShmClient] = weakref.WeakSet()


class ShmClient:
    """An enclave's link to a worker on the same machine.

    Args:
        peer: the worker's address, for messages.
        link: to it.
        own_region: the region is this link's alone, also after its end, so that slots may be kept.
    """

    def __init__(self, peer: str, link: Link, *, own_region: bool) -> None:
        self.peer = peer
        self._link = link
        self._unanswered = 0
        self._own_region = own_region

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:
        """Return a slot in this side's half; see ``ClientTransport.allocate``."""
        if kept and not self._own_region:
            return None
        try:
            return self._link.allocate(size, kept=kept)
        except _LINK_ERRORS as error:
            raise self._named(error) from error

    def discard(self, slot: memoryview) -> None:
        """Give back a slot that is not sent, or that was kept."""
        self._link.discard(slot)

    def send(self, frames: Sequence[Buffer]) -> None:
        """Write one message into the region, but for slots, or queue it until there is room.

        Raises:
            InputError: it is larger than the region.
        """
        try:
            self._link.send(frames)
        except _LINK_ERRORS as error:
            raise self._named(error) from error
        self._unanswered += 1
        if self._unanswered == 1:
            _awaited.add(self)

    def receive(self, timeout_s: float) -> Delivery:
        """Wait for one message; see ``ClientTransport.receive``."""
        deadline = time.monotonic() + timeout_s
        left = timeout_s
        while True:
            try:
                ready = self._link.bell.wait(min(left, RETRY_S) if self._link.has_unsent else left)
                self._link.flush()
                if ready:
                    if len(_awaited) == 1:
                        self._link.leave_core()
                    delivery = self._link.receive()[1]
                    self._answered()
                    return delivery
            except _LINK_ERRORS as error:
                raise self._named(error) from error
            if left == 0.0:
                raise TransportTimeoutError(f"{self.peer} did not answer within {timeout_s:g} s.")
            left = max(0.0, deadline - time.monotonic())

    def _answered(self) -> None:
        """Count an answer: each message that is sent has one."""
        self._unanswered -= 1
        if not self._unanswered:
            _awaited.discard(self)

    def _named(self, error: Exception) -> TsqpError:
        """Say who broke the link, and how."""
        if isinstance(error, ConnectionRefusedError):
            return SetupError(
                f"the worker at {self.peer} refused the shared region: give both sides the same TSQP_MAX_MESSAGE_BYTES."
            )
        if isinstance(error, ProtocolError):
            return ProtocolError(f"{self.peer}: {error}")
        return TransportClosedError(f"the peer at {self.peer} closed the connection or died.")

    def close(self) -> None:
        """Close at once. May be called twice."""
        self._link.bell.close()
        _awaited.discard(self)


def connect_socket(endpoint: Endpoint, max_message_bytes: int) -> ShmClient:
    """Connect to a worker through a UNIX socket.

    Args:
        endpoint: where the worker listens.
        max_message_bytes: of one direction's half of the region. Pages cost memory only once they are used.

    Raises:
        AbsentPeerError: nothing listens there.
        SetupError: the socket is not this user's alone, it cannot be connected to, or there is no room for the region.
    """
    check_own(endpoint)
    try:
        region, descriptor = make_region(max_message_bytes)
    except OSError as error:
        raise SetupError(f"cannot make a shared region of {2 * max_message_bytes} bytes: {error}.") from error
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(_CONNECT_S)
    try:
        connection.connect(endpoint.path)
        hand_over(connection, descriptor)
    except OSError as error:
        connection.close()
        kind = AbsentPeerError if isinstance(error, (FileNotFoundError, ConnectionError)) else SetupError
        raise kind(
            f"cannot connect to {endpoint}: {error.strerror or error}. Is the worker running? "
            f"Start one with 'tsqp worker --listen {endpoint}'."
        ) from error
    finally:
        os.close(descriptor)
    return ShmClient(str(endpoint), Link(SocketBell(connection, _may_spin), region, client=True), own_region=True)


def _may_spin() -> bool:
    """Tell whether a client spins for a reply.

    On a single core spinning would only delay the worker. Where answers are awaited on other links too, one of those
    comes soon enough, and the cores have work.
    """
    return _CORES > 1 and len(_awaited) == 1


class ShmListener:
    """A worker's side of all links through one socket.

    Args:
        endpoint: where to listen; the socket gets mode 0600.
        max_message_bytes: a client with a larger region is refused.
        poller: where to register connections.

    Raises:
        SetupError: the address is in use or cannot be bound.
    """

    def __init__(self, endpoint: Endpoint, max_message_bytes: int, poller: Poller) -> None:
        # The enclave computes for less than this between two requests of a short prefill; going to sleep and being
        # woken costs 0.1 ms of it. On a single core it would only delay the enclave.
        self.spin_s = 0.001 if available_cores() > 1 else 0.0
        self._path = Path(endpoint.path)
        self._limit_bytes = max_message_bytes
        self._poller = poller
        self._connections: dict[int, socket.socket] = {}
        self._guests = Guests(on_wait=self._wait_for, on_drop=self._hang_up)
        self._accept_after = 0.0
        check_free(endpoint)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        try:
            self._path.unlink(missing_ok=True)
            with owner_only():
                self._socket.bind(endpoint.path)
            self._socket.listen()
        except OSError as error:
            self._socket.close()
            raise SetupError(f"cannot listen on {endpoint}: {error.strerror}.") from error
        poller.register(self._socket.fileno(), POLLIN)

    @property
    def has_unsent(self) -> bool:
        """Whether a client waits for room, so that ``take`` should be called again soon."""
        return self._guests.has_unsent

    @property
    def pause_s(self) -> float:
        """See ``Listener.pause_s``."""
        return RETRY_S if self.has_unsent else float("inf")

    def take(self, ready: Container[object]) -> Incoming | None:
        """Accept, send what waits, and return a message of one of the ready connections."""
        if self._accept_after or self._socket.fileno() in ready:
            self._accept(ready)
        return self._guests.take(lambda guest: self._is_ready(guest, ready))

    def _accept(self, ready: Container[object]) -> None:
        if self._accept_after and time.monotonic() > self._accept_after:
            self._accept_after = 0.0
            self._poller.register(self._socket.fileno(), POLLIN)
        if self._socket.fileno() not in ready:
            return
        try:
            connection, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # No descriptor left. The socket stays ready, so polling it on would only spin.
            _log.warning("cannot accept a client of shared memory: %s", error)
            self._poller.unregister(self._socket.fileno())
            self._accept_after = time.monotonic() + _PAUSE_S
            return
        connection.setblocking(False)
        self._connections[connection.fileno()] = connection
        self._guests.add(Guest(connection.fileno()))
        self._poller.register(connection.fileno(), POLLIN)

    def _is_ready(self, guest: Guest, ready: Container[object]) -> bool:
        """Tell whether a client sent something; take its region first."""
        if guest.link is None:
            if guest.key in ready:
                guest.link = self._linked(self._connections[guest.key])
            elif time.monotonic() > guest.since + PATIENCE_S:
                raise ProtocolError("it handed no region over.")
            return False
        return guest.key in ready

    def _linked(self, connection: socket.socket) -> Link:
        try:
            region = accept_region(connection, self._limit_bytes)
        except ProtocolError:
            connection.send(REFUSAL)
            raise
        return Link(SocketBell(connection), region, client=False)

    def _wait_for(self, guest: Guest, *, room: bool) -> None:
        """Stop hearing a client while it waits for room."""
        if room:
            self._poller.unregister(guest.key)
        else:
            self._poller.register(guest.key, POLLIN)

    def _hang_up(self, guest: Guest) -> None:
        if guest.key in self._poller:
            self._poller.unregister(guest.key)
        connection = self._connections.pop(guest.key)
        # With messages unread the kernel would reset the connection, and the client lose replies that it has not read.
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RD)
            while connection.recv(1):
                pass
        connection.close()

    def close(self, linger_s: float = 0.0) -> None:
        """Close every link, after replies have left or ``linger_s``, and remove the socket. May be called twice."""
        self._guests.drain(linger_s)
        self._guests.drop_all()
        if self._socket.fileno() >= 0:
            if not self._accept_after:
                self._poller.unregister(self._socket.fileno())
            self._socket.close()
            self._path.unlink(missing_ok=True)
