"""Who may talk to a worker with a key: clients that hold one of some keys of their own, and nobody else.

libzmq asks in each CURVE handshake, over ZAP (ZeroMQ RFC 27), before a frame of that client is taken in. A thread of
pyzmq's answers, and not the worker's loop: handshakes go on while a product is computed or the model loads.
"""

from __future__ import annotations

import zmq
from zmq.auth.thread import ThreadAuthenticator

_DOMAIN = "tsqp"


class AllowList:
    """Answers libzmq for the sockets of one context. With none that answers they let nobody in.

    Args:
        context: theirs.
        keys: the public keys of those who may enter, each 40 bytes of z85.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: frozenset[bytes]) -> None:
        self._keys = keys
        self._answering = ThreadAuthenticator(context)
        self._answering.configure_curve_callback(_DOMAIN, self)
        self._answering.start()

    def callback(self, _domain: str, key: bytes) -> bool:
        """Tell pyzmq whether a client that has proved to hold a key may enter."""
        return key in self._keys

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket that is not bound yet ask here."""
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN.encode())
        # Without this, libzmq takes it that all may enter where nobody answers.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def close(self) -> None:
        """Stop answering. May be called twice."""
        self._answering.stop()
