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
from tsqp.transport.urls import Endpoint
from tsqp.transport.zeromq import ZmqListener

# How soon to try again where a reply waits for room.
_RETRY_S = 0.001


class Listener(Protocol):
    """One way in. Registers what is to be polled with the poller it is made with.

    Attributes:
        spin_s: how long to spin for the next message after one of this listener, before going to sleep.
    """

    spin_s: float

    @property
    def has_unsent(self) -> bool:
        """Whether ``take`` should be called again soon though nothing is ready."""

    def take(self, ready: Container[object]) -> Incoming | None:
        """Return a message if there is one among what is ready."""

    def close(self) -> None:
        """Close at once. May be called twice."""


class Server:
    """Receives over every endpoint.

    Args:
        endpoints: where to listen.
        max_message_bytes: a client that sends a larger frame (over shared memory: message) loses its connection.
        hangup_fd: a file descriptor to watch beside them, such as a pipe from the parent process; ``hung_up`` tells
            when it closes.
        key: the worker's own; every link is encrypted then, and clients need its public part.

    Raises:
        ConfigError: a key and an endpoint of shared memory.
        SetupError: an address is in use or cannot be bound.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        max_message_bytes: int,
        hangup_fd: int | None = None,
        key: KeyPair | None = None,
    ) -> None:
        for endpoint in endpoints:
            if key is not None and endpoint.scheme == "shm":
                raise ConfigError(f"{endpoint}: shared memory carries no encryption; with a key use tcp or ipc.")
        self._poller = zmq.Poller()
        self._hangup_fd = hangup_fd
        self.hung_up = False
        self._spin_s = 0.0
        self._listeners: list[Listener] = []
        if hangup_fd is not None:
            self._poller.register(hangup_fd, zmq.POLLIN)
        sockets = [endpoint for endpoint in endpoints if endpoint.scheme != "shm"]
        try:
            for endpoint in endpoints:
                if endpoint.scheme == "shm":
                    from tsqp.transport.shm import ShmListener  # noqa: PLC0415  Linux only

                    self._listeners.append(ShmListener(endpoint, max_message_bytes, self._poller))
            if sockets:
                self._listeners.append(ZmqListener(sockets, max_message_bytes, self._poller, key))
        except BaseException:
            self.close()
            raise

    def receive(self, timeout_s: float) -> Incoming | None:
        """Wait for one message; None when none came within ``timeout_s`` seconds, or the parent hung up."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            wait_s = min(left, _RETRY_S) if any(listener.has_unsent for listener in self._listeners) else left
            ready = self._spin(min(wait_s, self._spin_s)) or dict(self._poller.poll(math.ceil(wait_s * 1000)))
            if self._hangup_fd in ready:
                self.hung_up = True
                return None
            for listener in self._listeners:
                incoming = listener.take(ready)
                if incoming:
                    self._spin_s = listener.spin_s
                    self._listeners.remove(listener)
                    self._listeners.append(listener)
                    return incoming
            self._spin_s = 0.0
            if left == 0.0:
                return None

    def _spin(self, limit_s: float) -> dict[object, int]:
        """Poll without sleeping, but let whoever wants the core have it; return what is ready."""
        ready: dict[object, int] = {}
        end = time.perf_counter() + limit_s
        while not ready and time.perf_counter() < end:
            os.sched_yield()
            ready = dict(self._poller.poll(0))
        return ready

    def close(self) -> None:
        """Close every link at once. May be called twice."""
        for listener in self._listeners:
            listener.close()
