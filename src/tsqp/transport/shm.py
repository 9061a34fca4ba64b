"""Shared-memory transport, ``shm:///path``: tensors in a region that both processes map, a UNIX socket as doorbell.

The client makes the region, an anonymous file sealed against resizing, and hands its descriptor over when it connects:
no name under /dev/shm, so nothing stale is left behind, and neither side can shrink it under the other. The worker
computes on tensors in place; what is decoded or checked before it is used is copied out first, since the peer could
change it in between: headers by the worker, everything by the enclave. docs/decisions/0007 says why it is built so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from zmq import POLLIN, Poller

from tsqp.errors import InputError, ProtocolError, SetupError, TransportClosedError, TransportTimeoutError
from tsqp.threads import available_cores
from tsqp.transport.base import Buffer, Incoming
from tsqp.transport.region import REFUSAL, Link, accept_region, hand_over, make_region
from tsqp.transport.sockets import check_free, owner_only
from tsqp.transport.urls import Endpoint

_RETRY_S = 0.001
_CONNECT_S = 5.0
# A client that takes no reply, or hands no region over, for this long is dropped.
_PATIENCE_S = 30.0
_PAUSE_S = 1.0

_log = logging.getLogger(__name__)


class ShmClient:
    """An enclave's link to a worker on the same machine.

    Args:
        endpoint: where the worker listens.
        max_message_bytes: of one direction's half of the region. Pages cost memory only once they are used.

    Raises:
        SetupError: nothing listens there, or this machine has no room for the region.
    """

    def __init__(self, endpoint: Endpoint, max_message_bytes: int) -> None:
        self.peer = str(endpoint)
        try:
            region, descriptor = make_region(max_message_bytes)
        except OSError as error:
            raise SetupError(f"cannot make a shared region of {2 * max_message_bytes} bytes: {error}.") from error
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.settimeout(_CONNECT_S)
        try:
            self._connection.connect(endpoint.path)
            hand_over(self._connection, descriptor)
        except OSError as error:
            self._connection.close()
            raise SetupError(
                f"cannot connect to {self.peer}: {error.strerror or error}. Is the worker running? "
                f"Start one with 'tsqp worker --listen {self.peer}'."
            ) from error
        finally:
            os.close(descriptor)
        self._link = Link(self._connection, region, client=True)
        self._poll = select.poll()
        self._poll.register(self._connection, select.POLLIN)

    def send(self, frames: Sequence[Buffer]) -> None:
        """Write one message into the region, or queue it until there is room.

        Raises:
            InputError: it is larger than the region.
        """
        with self._naming_the_peer():
            self._link.send(frames)

    def receive(self, timeout_s: float) -> list[Buffer]:
        """Wait for one message and copy it out; see ``ClientTransport.receive``."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            ready = self._poll.poll(1000 * (min(left, _RETRY_S) if self._link.has_unsent else left))
            with self._naming_the_peer():
                self._link.flush()
                if ready:
                    frames: list[Buffer] = [bytearray(frame) for frame in self._link.receive()]
                    self._link.consume()
                    return frames
            if left == 0.0:
                raise TransportTimeoutError(f"{self.peer} did not answer within {timeout_s:g} s.")

    @contextlib.contextmanager
    def _naming_the_peer(self) -> Iterator[None]:
        try:
            yield
        except ConnectionRefusedError as error:
            raise SetupError(
                f"the worker at {self.peer} refused the shared region: give both sides the same TSQP_MAX_MESSAGE_BYTES."
            ) from error
        except (EOFError, OSError) as error:
            raise TransportClosedError(f"the peer at {self.peer} closed the connection or died.") from error
        except ProtocolError as error:
            raise ProtocolError(f"{self.peer}: {error}") from error

    def close(self) -> None:
        """Close at once. May be called twice."""
        self._connection.close()


@dataclass(slots=True)
class _Client:
    """A connection as the worker sees it. ``since``: when it connected, or when its oldest reply began to wait."""

    connection: socket.socket
    link: Link | None = None
    since: float = field(default_factory=time.monotonic)


class ShmListener:
    """A worker's side of all links through one socket.

    A client is not heard while a reply to it waits for room: what it can make the worker hold is one message.

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
        self._clients: dict[int, _Client] = {}
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
        """Whether a reply waits for room, so that ``take`` should be called again soon."""
        return any(client.link and client.link.has_unsent for client in self._clients.values())

    def take(self, ready: Container[object]) -> Incoming | None:
        """Accept, send what waits, and return a message of one of the ready connections."""
        self._accept(ready)
        for descriptor, client in list(self._clients.items()):
            try:
                frames = self._heard(descriptor, client, ready)
            except BlockingIOError:
                continue
            except (OSError, EOFError, ProtocolError) as error:
                self._drop(descriptor, error)
                continue
            if frames:
                # Last in line next time, so that one busy client does not starve the others.
                self._clients[descriptor] = self._clients.pop(descriptor)
                return Incoming(frames, legacy=False, reply=partial(self._reply, descriptor, client))
        return None

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
        self._clients[connection.fileno()] = _Client(connection)
        self._poller.register(connection.fileno(), POLLIN)

    def _heard(self, descriptor: int, client: _Client, ready: Container[object]) -> tuple[Buffer, ...]:
        """Take a client's region, send what waits for it, or return its next message."""
        if client.link is None:
            if descriptor in ready:
                client.link = self._linked(client.connection)
            elif time.monotonic() > client.since + _PATIENCE_S:
                raise ProtocolError("it handed no region over.")
            return ()
        if client.link.has_unsent:
            client.link.flush()
            if not client.link.has_unsent:
                self._poller.register(descriptor, POLLIN)
            elif time.monotonic() > client.since + _PATIENCE_S:
                raise ProtocolError("it took no reply.")
            return ()
        if descriptor not in ready:
            return ()
        header, *tensors = client.link.receive() or [b""]
        return bytes(header), *tensors

    def _linked(self, connection: socket.socket) -> Link:
        try:
            return Link(connection, accept_region(connection, self._limit_bytes), client=False)
        except ProtocolError:
            connection.send(REFUSAL)
            raise

    def _reply(self, descriptor: int, client: _Client, frames: Sequence[Buffer]) -> None:
        if client.link is None or self._clients.get(descriptor) is not client:
            return
        try:
            client.link.send(frames, consumes=True)
        except (OSError, ProtocolError, InputError) as error:
            self._drop(descriptor, error)
            return
        if client.link.has_unsent:
            client.since = time.monotonic()
            self._poller.unregister(descriptor)

    def _drop(self, descriptor: int, error: Exception) -> None:
        if isinstance(error, (ProtocolError, InputError)):
            _log.warning("dropped a client of shared memory: %s", error)
        client = self._clients.pop(descriptor)
        if descriptor in self._poller:
            self._poller.unregister(descriptor)
        client.connection.close()

    def close(self) -> None:
        """Close every link and remove the socket. May be called twice."""
        for descriptor in list(self._clients):
            self._drop(descriptor, EOFError())
        if self._socket.fileno() >= 0:
            if not self._accept_after:
                self._poller.unregister(self._socket.fileno())
            self._socket.close()
            self._path.unlink(missing_ok=True)
