"""A worker's side of ZeroMQ: a ROUTER socket for all its clients, what it holds for each, and when it drops one."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import socket as unix
import time
import weakref
from collections import deque
from collections.abc import Container, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import zmq
import zmq.utils.monitor

from tsqp.errors import SetupError
from tsqp.transport.base import Buffer, Client, Incoming
from tsqp.transport.keys import KeyPair
from tsqp.transport.sockets import check_free, owner_only
from tsqp.transport.urls import Endpoint
from tsqp.transport.zeromq import CURVE_BYTES, deepen

if TYPE_CHECKING:
    from tsqp.transport.allowing import AllowList

# A client whose machine or network has gone without a word is asked after a minute without bytes, and then three times:
# else its connection, and what was sent on it, would stay for ever (tcp(7)).
_KEEPALIVE = {zmq.TCP_KEEPALIVE: 1, zmq.TCP_KEEPALIVE_IDLE: 60, zmq.TCP_KEEPALIVE_INTVL: 10, zmq.TCP_KEEPALIVE_CNT: 3}
# How many messages of a client libzmq takes in before the worker asks for them; the rest waits on the client's side.
_WAITING = 16
# How many frames of a message are kept: more than any valid one has. The others are received, as they must be, and
# dropped.
_KEPT_FRAMES = 16
# A connection that has not shaken hands by then is closed.
_HANDSHAKE_MS = 10_000
# How often libzmq asks a silent client whether it is there, and how long that may take: the longest frame, on a slow
# link.
_HEARTBEAT_MS, _ALIVE_MS = 60_000, 300_000
# How many short replies libzmq keeps for a client (shorter than zmq.COPY_THRESHOLD; longer ones are counted). A session
# has at most 1024 requests in flight, so none of its is lost.
UNREAD_REPLIES = 1024
# A client that has read nothing of a reply for so long is dropped, by us or, over tcp, by the kernel. Heartbeats end
# connections that show no life, but none is sent while the way is full.
PATIENCE_S = 60.0
_LOOK_S = 1.0

_log = logging.getLogger(__name__)


class ZmqListener:
    """A worker's ROUTER socket, bound to one or more endpoints.

    Args:
        endpoints: where to listen.
        max_message_bytes: a larger frame from a client ends that client's connection.
        poller: where to register the sockets.
        key: the worker's own; clients must know its public part then, on every endpoint.
        allowed: which clients may connect, by their public keys; it takes a key. None: any that knows the worker's,
            since libzmq accepts all keys where nothing answers for it.

    Raises:
        SetupError: an address is in use or cannot be bound.
    """

    has_unsent = False
    pause_s = math.inf
    # Another thread, libzmq's own, needs the core to receive the next message.
    spin_s = 0.0

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        max_message_bytes: int,
        poller: zmq.Poller,
        key: KeyPair | None = None,
        allowed: frozenset[bytes] | None = None,
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._allow_list = _answering(self._context, allowed) if allowed is not None else None
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, UNREAD_REPLIES)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.TCP_MAXRT, math.ceil(PATIENCE_S * 1000))
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes + (CURVE_BYTES if key else 0))
        self._socket.setsockopt(zmq.RCVHWM, _WAITING)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _ALIVE_MS)
        for option, value in _KEEPALIVE.items():
            self._socket.setsockopt(option, value)
        if key:
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, key.secret)
        if self._allow_list:
            self._allow_list.guard(self._socket)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_ACCEPTED)
        self._peers: weakref.WeakValueDictionary[bytes, ZmqPeer] = weakref.WeakValueDictionary()
        # Those that have not read all their replies, and when to look at them again.
        self._behind: set[ZmqPeer] = set()
        self._look_at = 0.0
        self._poller = poller
        self._paths: list[Path] = []
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        try:
            for endpoint in endpoints:
                _bind(self._socket, endpoint)
                if endpoint.scheme == "ipc":
                    self._paths.append(Path(endpoint.path))
        except BaseException:
            self.close()
            raise

    def take(self, ready: Container[object]) -> Incoming | None:
        """Return a message if the socket is among those ready."""
        if self._monitor in ready:
            deepen(zmq.utils.monitor.recv_monitor_message(self._monitor)["value"])
        if self._behind and time.monotonic() > self._look_at:
            self._drop_stuck()
        if self._socket not in ready:
            return None
        identity = self._socket.recv(copy=False)
        rest = self._rest()
        frames = tuple(frame.buffer for frame in rest)
        route = [identity.bytes]
        descriptor = _descriptor(rest[0]) if rest else None
        if descriptor is None:
            return None
        peer = self._peer(route[0], descriptor)
        legacy = bool(frames) and len(frames[0]) == 0
        if legacy:
            route, frames = [identity.bytes, b""], frames[1:]
        return Incoming(frames, legacy, partial(self._reply, peer, route), client=peer)

    def _rest(self) -> list[zmq.Frame]:
        """Receive a message's frames after the first, and keep so many that one has too many still has."""
        kept: list[zmq.Frame] = []
        more = True
        while more:
            frame = self._socket.recv(copy=False)
            if len(kept) < _KEPT_FRAMES:
                kept.append(frame)
            more = frame.more
        return kept

    def _peer(self, identity: bytes, descriptor: int) -> ZmqPeer:
        """Return who a message is of. The same identity over another connection is somebody else."""
        peer = self._peers.get(identity)
        if peer is None or peer.descriptor != descriptor:
            peer = self._peers[identity] = ZmqPeer(descriptor)
        return peer

    def _reply(self, peer: ZmqPeer, route: list[bytes], frames: Sequence[Buffer]) -> None:
        size = sum(map(len, frames))
        large = size >= zmq.COPY_THRESHOLD
        parts: list[Buffer | zmq.Frame] = [*route, *frames]
        if large and len(frames[-1]) < zmq.COPY_THRESHOLD:  # else it would be copied, and known to be gone at once
            parts[-1] = zmq.Frame(frames[-1], track=True, copy=False, copy_threshold=0)
        try:
            tracker = self._socket.send_multipart(parts, zmq.DONTWAIT, copy=False, track=large)
        except zmq.ZMQError as error:
            if error.errno == errno.EAGAIN:
                _log.warning("dropped a client: it has not read %d replies.", UNREAD_REPLIES)
                peer.drop()
            elif error.errno != errno.EHOSTUNREACH:  # it is gone
                raise
            return
        if large and tracker is not None:
            peer.sent(tracker, size)
            self._behind.add(peer)

    def _drop_stuck(self) -> None:
        """End the connections of clients that have read nothing for ``PATIENCE_S`` though something waits for them."""
        self._look_at = time.monotonic() + _LOOK_S
        for peer in list(self._behind):
            if not peer.unread_bytes:
                self._behind.remove(peer)
            elif time.monotonic() > peer.since + PATIENCE_S:
                self._behind.remove(peer)
                _log.warning("dropped a client: it read nothing of a reply for %g s.", PATIENCE_S)
                peer.drop()

    def close(self, linger_s: float = 0.0) -> None:
        """Close the sockets and the context, once replies have left or after ``linger_s``; remove sockets of ipc.

        libzmq leaves them. May be called twice.
        """
        if not self._socket.closed:
            for path in self._paths:
                path.unlink(missing_ok=True)
            self._poller.unregister(self._socket)
            self._poller.unregister(self._monitor)
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=math.ceil(linger_s * 1000))
        if self._allow_list:
            self._allow_list.close()
        self._context.term()


def _answering(context: zmq.Context[zmq.Socket[bytes]], allowed: frozenset[bytes]) -> AllowList:
    from tsqp.transport.allowing import AllowList  # noqa: PLC0415  asyncio comes with it, which an enclave does not need

    return AllowList(context, allowed)


class ZmqPeer(Client):
    """A client over ZeroMQ.

    Args:
        descriptor: of its connection, which is libzmq's.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self._inode = _inode(descriptor)
        self._unread: deque[tuple[zmq.MessageTracker, int]] = deque()
        self._unread_bytes = 0
        # When the oldest reply that is unread became that.
        self.since = 0.0

    @property
    def is_gone(self) -> bool:
        """See ``Client.is_gone``."""
        return self._inode is None or _inode(self.descriptor) != self._inode

    @property
    def unread_bytes(self) -> int:
        """See ``Client.unread_bytes``: of long replies. There are at most ``UNREAD_REPLIES`` others."""
        while self._unread and self._unread[0][0].done:
            self._unread_bytes -= self._unread.popleft()[1]
            self.since = time.monotonic()
        return self._unread_bytes

    def sent(self, tracker: zmq.MessageTracker, size: int) -> None:
        """Note a reply that libzmq holds until the kernel has taken it."""
        if not self._unread:
            self.since = time.monotonic()
        self._unread.append((tracker, size))
        self._unread_bytes += size

    def drop(self) -> None:
        """End the connection; libzmq frees what it held for it. It has no call for that."""
        if not self.is_gone:
            with contextlib.suppress(OSError), unix.socket(fileno=os.dup(self.descriptor)) as connection:
                connection.shutdown(unix.SHUT_RDWR)


def _descriptor(frame: zmq.Frame) -> int | None:
    """Return the connection that a frame came over; None where libzmq knows none.

    That is so of peers that do not speak ZMTP 3: whatever begins with another byte than its greeting is taken for one
    that speaks the first version. Nobody of ours does, and they are not answered.
    """
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return None


def _inode(descriptor: int) -> int | None:
    """Tell one connection from a later one that has its descriptor."""
    try:
        return os.fstat(descriptor).st_ino
    except OSError:
        return None


def _bind(socket: zmq.Socket[bytes], endpoint: Endpoint) -> None:
    if endpoint.scheme == "ipc":
        check_free(endpoint)
    socket.setsockopt(zmq.IPV6, int(":" in endpoint.host))
    try:
        with owner_only():
            socket.bind(endpoint.url)
    except zmq.ZMQError as error:
        if error.errno == errno.EADDRINUSE and endpoint.scheme == "tcp":
            raise SetupError(
                f"port {endpoint.port} is already in use on {endpoint.host}. "
                "Stop the process that listens there, or choose another port (--listen, LLAMA_GPU_PORT)."
            ) from error
        raise SetupError(f"cannot listen on {endpoint}: {error}.") from error
