"""The interface every transport implements. Frames are bytes-like; the first frame of a message is its header."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message as a server receives it.

    Attributes:
        frames: the message itself. Over shared memory they are views that end with the reply.
        legacy: the message came in the envelope of the first published protocol.
        reply: queues the one reply this message has; a client that is gone loses it silently.
    """

    frames: tuple[Buffer, ...]
    legacy: bool
    reply: Callable[[Sequence[Buffer]], None]


class ClientTransport(Protocol):
    """One enclave's link to one worker. Not thread-safe."""

    @property
    def peer(self) -> str:
        """The worker's address, for messages."""

    def send(self, frames: Sequence[Buffer]) -> None:
        """Queue one message. Buffers must not change until the reply has come."""

    def receive(self, timeout_s: float) -> list[Buffer]:
        """Wait for one message.

        Raises:
            TransportTimeoutError: nothing came within ``timeout_s`` seconds.
            TransportClosedError: the worker is gone.
        """

    def close(self) -> None:
        """Close at once; queued messages are dropped. May be called twice."""


class ServerTransport(Protocol):
    """A worker's side of all its links."""

    @property
    def hung_up(self) -> bool:
        """Whether the process that started this worker is gone."""

    def receive(self, timeout_s: float) -> Incoming | None:
        """Wait for one message; None when none came within ``timeout_s`` seconds."""

    def close(self) -> None:
        """Close at once. May be called twice."""
