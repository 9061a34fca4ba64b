"""The region of a connection through a UNIX socket: an anonymous sealed file, handed over as a descriptor."""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import time
from collections.abc import Callable

from tsqp.errors import ProtocolError
from tsqp.transport.datagrams import MAX_DATAGRAM
from tsqp.transport.link import PAGE
from tsqp.transport.spinning import spin

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_GREETING = b"tsqp region 2"
REFUSAL = b"\xff\xff\xff\xff"
# How long to wait awake: a product of a few rows takes less. A core that goes to sleep in a virtual machine takes
# 0.05 ms and more to wake; a longer product would have to wait for the core of its second thread, so there is none
# after a wait that was longer.
_SPIN_S = 0.001


class SocketBell:
    """The socket beside the region as ``Doorbell``: it wakes the peer, and its end tells of the peer's end at once.

    Args:
        connection: of type ``SOCK_SEQPACKET``, connected; the bell owns it.
        may_spin: tells whether to wait without going to sleep, while whoever wants the core has it.
    """

    def __init__(self, connection: socket.socket, may_spin: Callable[[], bool] = lambda: False) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._may_spin = may_spin
        self._waited_s = 0.0
        self._watched = (connection.fileno(),)
        self._received = memoryview(bytearray(MAX_DATAGRAM))
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def send(self, datagram: bytes) -> None:
        """See ``Doorbell.send``."""
        self._connection.send(datagram)

    def receive(self) -> bytearray:
        """See ``Doorbell.receive``."""
        try:
            size = self._connection.recv_into(self._received)
        except ConnectionResetError:  # told once where the peer left something unread; its last words come after
            size = self._connection.recv_into(self._received)
        if not size:
            raise EOFError
        if size == len(REFUSAL) and self._received[:size] == REFUSAL:
            raise ConnectionRefusedError
        return bytearray(self._received[:size])

    def wait(self, limit_s: float) -> bool:
        """See ``Doorbell.wait``. The end of the connection counts as a datagram, which ``receive`` then raises."""
        started = time.perf_counter()
        spin_s = min(limit_s, _SPIN_S) if self._waited_s < _SPIN_S and self._may_spin() else 0.0
        ready = bool(spin_s and spin(self._watched, spin_s)) or bool(self._poll.poll(1000 * (limit_s - spin_s)))
        self._waited_s = time.perf_counter() - started
        return ready

    def close(self) -> None:
        """See ``Doorbell.close``."""
        self._connection.close()


def region_bytes(max_message_bytes: int) -> int:
    """Return the size of a region whose halves hold messages of ``max_message_bytes``."""
    return PAGE + 2 * (-(-max_message_bytes // PAGE) * PAGE)


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
        if not sealed or not region_bytes(1) <= size <= limit or size % PAGE:
            raise ProtocolError(
                f"a shared region of {size} bytes, {'' if sealed else 'not '}sealed: expected a sealed one of whole "
                f"pages and at most {limit} bytes (TSQP_MAX_MESSAGE_BYTES)."
            )
        return mmap.mmap(descriptors[0], size)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
