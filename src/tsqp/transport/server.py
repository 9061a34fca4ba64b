"""A worker's side of all its links, whatever they travel over: one poll, one message at a time."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Container, Sequence
from typing import Protocol

import zmq

from tsqp.errors import ConfigError
from tsqp.transport.base import Incoming
from tsqp.transport.keys import KeyPair
from tsqp.transport.spinning import Ahead, spin
from tsqp.transport.urls import Endpoint
from tsqp.transport.zeromq_listener import ZmqListener

# A poll counts milliseconds; what is to take less is slept.
_POLL_TICK_S = 0.001


class Listener(Protocol):
    """One way in. Registers what is to be polled with the poller it is made with.

    Attributes:
        spin_s: how long to spin for the next message after one of this listener, before going to sleep.
    """

    spin_s: float

    @property
    def pause_s(self) -> float:
        """In how many seconds ``take`` should be called again though nothing is ready: 0 at once, infinity never."""

    @property
    def has_unsent(self) -> bool:
        """Whether ``take`` should be called again soon though nothing is ready."""

    def take(self, ready: Container[object]) -> Incoming | None:
        """Return a message if there is one among what is ready."""

    def close(self, linger_s: float = 0.0) -> None:
        """Close, but let replies leave for at most so long. May be called twice."""


class Server:
    """Receives over every endpoint.

    Args:
        endpoints: where to listen.
        max_message_bytes: a client that sends a larger frame (over shared memory: message) loses its connection.
        hangup_fd: a file descriptor to watch beside them, such as a pipe from the parent process; ``hung_up`` tells
            when it closes.
        key: the worker's own; every link is encrypted then, and clients need its public part.
        allowed: the public keys of the clients that may connect, all others are refused in the handshake; None lets
            any in.

    Attributes:
        ahead: memory to read while nothing comes, or None.

    Raises:
        ConfigError: a key and an endpoint of shared memory, or an allow-list without a key.
        SetupError: an address is in use or cannot be bound.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        max_message_bytes: int,
        hangup_fd: int | None = None,
        key: KeyPair | None = None,
        allowed: frozenset[bytes] | None = None,
    ) -> None:
        if allowed is not None and key is None:
            raise ConfigError(
                "an allow-list is checked where links are encrypted: give this process a key of its own too (--key)."
            )
        for endpoint in endpoints:
            if key is not None and endpoint.scheme == "shm":
                raise ConfigError(f"{endpoint}: shared memory carries no encryption; with a key use tcp or ipc.")
        self._poller = zmq.Poller()
        self._hangup_fd = hangup_fd
        self.hung_up = False
        self._spin_s = 0.0
        self.ahead: Ahead | None = None
        self._listeners: list[Listener] = []
        if hangup_fd is not None:
            self._poller.register(hangup_fd, zmq.POLLIN)
        sockets = [endpoint for endpoint in endpoints if endpoint.scheme != "shm"]
        try:
            for endpoint in endpoints:
                if endpoint.scheme == "shm":
                    self._listeners.append(_shared_memory(endpoint, max_message_bytes, self._poller))
            if sockets:
                self._listeners.append(ZmqListener(sockets, max_message_bytes, self._poller, key, allowed))
        except BaseException:
            self.close()
            raise

    def receive(self, timeout_s: float) -> Incoming | None:
        """Wait for one message; None when none came within ``timeout_s`` seconds, or the parent hung up."""
        deadline = time.monotonic() + timeout_s
        left, looked = timeout_s, False
        while True:
            pause_s = min([listener.pause_s for listener in self._listeners])
            # What is polled is looked at once before anything is waited for.
            wait_s = min(left, pause_s) if looked or pause_s == math.inf else 0.0
            ready = self._spin(min(wait_s, self._spin_s)) or self._poll(wait_s, yielding=looked)
            if self._hangup_fd in ready:
                self.hung_up = True
                return None
            for listener in self._listeners:
                incoming = listener.take(ready)
                if incoming:
                    self._spin_s = listener.spin_s
                    if len(self._listeners) > 1:
                        self._listeners.remove(listener)
                        self._listeners.append(listener)
                    return incoming
            self._spin_s = 0.0
            if left == 0.0:
                return None
            left, looked = max(0.0, deadline - time.monotonic()), True

    def _poll(self, limit_s: float, *, yielding: bool) -> dict[object, int]:
        """Wait until something is ready, or for so long; return what is."""
        if limit_s >= _POLL_TICK_S:
            return dict(self._poller.poll(math.ceil(limit_s * 1000)))
        if limit_s:
            time.sleep(limit_s)
        elif yielding:
            os.sched_yield()
        return dict(self._poller.poll(0))

    def _spin(self, limit_s: float) -> dict[object, int]:
        """Poll without sleeping, but let whoever wants the core have it; return what is ready."""
        end = time.perf_counter() + limit_s
        left = limit_s
        while left > 0:
            sockets = [each for each, _ in self._poller.sockets if not isinstance(each, int)]
            # The descriptor of a socket of ZeroMQ tells of news once; those that came before are found by its own poll.
            ready = dict(self._poller.poll(0)) if sockets else {}
            if ready:
                return ready
            plain = [each for each, _ in self._poller.sockets if isinstance(each, int)]
            found = spin((*plain, *[each.FD for each in sockets]), left, self.ahead)
            if found and (not sockets or all(each in plain for each in found)):
                return dict.fromkeys(found, zmq.POLLIN)
            left = end - time.perf_counter()
        return {}

    def close(self, linger_s: float = 0.0) -> None:
        """Close every link, but let replies that are on their way leave for at most so long. May be called twice."""
        deadline = time.monotonic() + linger_s
        for listener in self._listeners:
            listener.close(max(0.0, deadline - time.monotonic()))


def _shared_memory(endpoint: Endpoint, max_message_bytes: int, poller: zmq.Poller) -> Listener:
    from tsqp.transport.polled import PolledListener  # noqa: PLC0415  Linux only
    from tsqp.transport.shm import ShmListener  # noqa: PLC0415

    if endpoint.is_named_region:
        return PolledListener(endpoint, max_message_bytes)
    return ShmListener(endpoint, max_message_bytes, poller)
