"""An enclave's side of ZeroMQ, a DEALER socket, over ``tcp://`` and ``ipc://``; zeromq_listener.py has the worker's.

Large frames are neither copied when sent nor when received (pyzmq ``copy=False``). With a key of the worker's, links
are encrypted and the worker proves that it holds the key (CURVE); clients prove theirs to a worker with an allow-list,
and are anonymous to others. libzmq copies frames then.
"""

from __future__ import annotations

import math
import os
import socket as unix
import time
from collections.abc import Sequence

import zmq
import zmq.utils.monitor

from tsqp.errors import (
    ConfigError,
    KeyRefusedError,
    PeerKeyError,
    SetupError,
    TransportClosedError,
    TransportTimeoutError,
)
from tsqp.transport.base import Buffer, Delivery
from tsqp.transport.keys import KeyPair, check_public, ephemeral
from tsqp.transport.sockets import check_own
from tsqp.transport.urls import Endpoint

_REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_CLIENT_EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | _REFUSALS
_OTHER_MECHANISM = (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)
# What CURVE adds to a frame on the wire: command name, nonce, authenticator, flags (ZeroMQ RFC 26). The limit on
# messages counts it.
CURVE_BYTES = 33
_PROBE_S = 1.0
# ZMTP's greeting (ZeroMQ RFC 23): a signature, the version, and then the mechanism, which who is greeted answers with.
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00"
_MECHANISM = slice(12, 32)
_GREETING_BYTES = 32
_CURVE = b"CURVE"
# What a UNIX socket may hold unread: the largest tensors of a 128-token prefill whole. The kernel caps it at
# net.core.wmem_max; at its default of 208 KB, both ends wake each other a dozen times per tensor.
_IPC_BUFFER_BYTES = 4 << 20


class ZmqClient:
    """An enclave's DEALER socket, connected to one worker.

    Args:
        endpoint: where the worker listens.
        max_message_bytes: a larger frame from the worker ends the connection.
        server_key: the public key that the worker must hold, 40 bytes of z85; the link is encrypted then. Nothing is
            sent before the worker has proved that it holds the key.
        own: this side's own pair, for a worker that lets only some in; else a key of this connection alone is made. Not
            used on a link in clear.

    Raises:
        SetupError: the address cannot be connected to, or the key is none.
    """

    def __init__(
        self, endpoint: Endpoint, max_message_bytes: int, server_key: bytes | None = None, own: KeyPair | None = None
    ) -> None:
        self.peer = str(endpoint)
        self._endpoint = endpoint
        own = (own or ephemeral()) if server_key is not None else None
        self._server_key = check_public(server_key) if server_key is not None else None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes + (CURVE_BYTES if own else 0))
        if own and self._server_key:
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, self._server_key)
        # The session bounds what is in flight; at a limit of its own, the socket would block for ever.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.IPV6, int(":" in endpoint.host))
        self._monitor = self._socket.get_monitor_socket(_CLIENT_EVENTS)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._is_connected = False
        # Whose socket answers is looked at before the first answer is believed, which is to a greeting without secrets:
        # before that nobody may listen yet. A peer with a key has proved who it is.
        self._unknown = bool(endpoint.path) and server_key is None
        try:
            self._socket.connect(endpoint.url)
        except zmq.ZMQError as error:
            self.close()
            raise SetupError(f"cannot connect to {self.peer}: {error}.") from error

    def send(self, frames: Sequence[Buffer]) -> None:
        """Queue one message without copying large frames."""
        self._socket.send_multipart(frames, copy=False)

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:  # noqa: ARG002
        """Return None: nothing is shared here."""
        return None

    def discard(self, slot: memoryview) -> None:
        """Do nothing: there are no slots."""

    def receive(self, timeout_s: float) -> Delivery:
        """Wait for one message; see ``ClientTransport.receive``. Its memory is libzmq's, and ours alone.

        Raises:
            SetupError: the socket it comes from, without a key, is not this user's alone.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            ready = dict(self._poller.poll(math.ceil(max(0.0, deadline - time.monotonic()) * 1000)))
            if self._socket in ready:
                if self._unknown:
                    check_own(self._endpoint)
                    self._unknown = False
                return Delivery([frame.buffer for frame in self._socket.recv_multipart(copy=False)])
            if self._monitor in ready:
                self._read_event()
            elif time.monotonic() >= deadline:
                raise TransportTimeoutError(f"{self.peer} did not answer within {timeout_s:g} s.")

    def _read_event(self) -> None:
        message = zmq.utils.monitor.recv_monitor_message(self._monitor)
        event = message["event"]
        if event == zmq.EVENT_CONNECTED:
            deepen(message["value"])
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._is_connected = True
        elif self._is_connected and event == zmq.EVENT_DISCONNECTED and not self._socket.poll(0):
            self._is_connected = False  # a peer that comes back and fails to shake hands disconnects once more
            raise TransportClosedError(f"the peer at {self.peer} closed the connection or died.")
        elif event & _REFUSALS:
            self._refused(event, message["value"])

    def _refused(self, event: int, reason: int) -> None:
        """Say why a handshake failed, where that is known. Otherwise libzmq tries again.

        A peer that speaks ZMTP and merely closes has no other way to refuse a key that is not its own. One that closes
        without a word is a tunnel or a proxy to a worker that is not there yet. One that wants a key may close before
        its greeting is read here, and again each time on a busy machine, so it is asked.
        """
        in_doubt = event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        if self._server_key is None:
            if (event, reason) == _OTHER_MECHANISM or (in_doubt and _mechanism(self._endpoint) == _CURVE):
                raise ConfigError(
                    f"the peer at {self.peer} wants an encrypted link: "
                    "give its public key (--worker-key or --dealer-key)."
                )
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise KeyRefusedError(
                f"the peer at {self.peer} lets only those in whose keys it was told (--allow), and not this process: "
                "give the key that it knows (--own-key), or have this one's NAME.key added there. Nothing was sent to "
                "it."
            )
        elif not in_doubt or _mechanism(self._endpoint):
            raise PeerKeyError(
                f"the peer at {self.peer} does not hold the key that was given, or speaks without encryption: check "
                "--worker-key or --dealer-key. Nothing was sent to it."
            )

    def close(self) -> None:
        """Close the sockets and the context."""
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)
        self._context.term()


def deepen(descriptor: int) -> None:
    """Let a new ipc connection hold a whole tensor. TCP sizes its own buffers; a connection already gone is let be."""
    try:
        with unix.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family == unix.AF_UNIX:
                connection.setsockopt(unix.SOL_SOCKET, unix.SO_SNDBUF, _IPC_BUFFER_BYTES)
    except OSError:
        return


def _mechanism(endpoint: Endpoint) -> bytes:
    """Ask who listens there how it wants links secured, as ZMTP greets (RFC 23); nothing if it does not speak ZMTP."""
    family = unix.AF_UNIX if endpoint.path else unix.AF_INET6 if ":" in endpoint.host else unix.AF_INET
    try:
        with unix.socket(family) as probe:
            probe.settimeout(_PROBE_S)
            probe.connect(endpoint.path or (endpoint.ip, endpoint.port))
            probe.sendall(_GREETING)
            theirs = probe.recv(_GREETING_BYTES, unix.MSG_WAITALL)
    except OSError:
        return b""
    return theirs[_MECHANISM].rstrip(b"\0") if theirs[:1] == _GREETING[:1] else b""
