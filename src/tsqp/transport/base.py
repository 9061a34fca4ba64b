"""The interface every transport implements. Frames are bytes-like; the first frame of a message is its header.

A tensor is written once by its producer and computed on in place by its consumer where a transport allows it:
``allocate`` gives a span of memory that the peer sees too, a slot; to send that slot copies nothing. Where there are no
slots, or none free, it gives None, and the caller uses memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct, field

if TYPE_CHECKING:  # it needs torch, and accounts of clients do not
    from tsqp.transport.spinning import Ahead

Buffer = bytes | bytearray | memoryview


def _nothing() -> None:
    pass


def _no_slot(_size: int) -> memoryview | None:
    return None


class Delivery(Struct, frozen=True):
    """A message as a client receives it. The header is always a copy of its own.

    Attributes:
        frames: the message. Frames after the header may be views of memory that the peer can still change: read every
            word of them once, and none after ``release``.
        shared: whether some are.
        release: gives the peer its memory back. May be called twice, and in another order than messages came.
    """

    frames: Sequence[Buffer]
    shared: bool = False
    release: Callable[[], None] = _nothing

    def private(self) -> list[Buffer]:
        """Return frames that nobody else can change, copied where need be, and release the message."""
        frames: list[Buffer] = [bytearray(frame) for frame in self.frames] if self.shared else list(self.frames)
        self.release()
        return frames


class Client:
    """Who sends messages over one connection, known by identity.

    Attributes:
        is_full: set by who serves it, while it holds as much as it may. A transport that can leaves its messages unread
            then.
    """

    def __init__(self) -> None:
        self.is_full = False
        self._is_gone = False

    @property
    def is_gone(self) -> bool:
        """Whether the connection has ended, as far as is known."""
        return self._is_gone

    @property
    def unread_bytes(self) -> int:
        """Of replies that it has not read, and that this process holds."""
        return 0

    def end(self) -> None:
        """Note that the connection has ended."""
        self._is_gone = True


class Incoming(Struct, frozen=True):
    """A message as a server receives it.

    Attributes:
        frames: the message itself. Over shared memory they are views that end with the reply.
        legacy: the message came in the envelope of the first published protocol.
        reply: queues the one reply this message has; a client that is gone loses it silently.
        allocate: returns a writable slot of that many bytes for a frame of the reply, or None: no shared memory, no
            room at the moment, a short frame, or the client is gone. Slots that are not in the reply are free again
            once it is given.
        client: who sent it.
    """

    frames: Sequence[Buffer]
    legacy: bool
    reply: Callable[[Sequence[Buffer]], None]
    allocate: Callable[[int], memoryview | None] = _no_slot
    client: Client = field(default_factory=Client)


class ClientTransport(Protocol):
    """One enclave's link to one worker. Not thread-safe."""

    @property
    def peer(self) -> str:
        """The worker's address, for messages."""

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:
        """Return a writable slot of ``size`` bytes, or None: no shared memory, no room at the moment, or a short frame.

        The peer sees what is written there at once, so only words that may leave are written. A slot ends with ``send``
        of this very memoryview, and must not be touched from then on, or with ``discard``.

        Args:
            size: in bytes.
            kept: the slot ends with ``discard`` alone: until then nothing else is written there by this side, and it
                may be read, also after the link has failed and was closed. The peer can still write there. None where
                that cannot be promised.
        """

    def discard(self, slot: memoryview) -> None:
        """Give back a slot that is not sent, or was kept. Anything else, such as one already sent, is let be."""

    def send(self, frames: Sequence[Buffer]) -> None:
        """Queue one message. Buffers must not change until the reply has come."""

    def receive(self, timeout_s: float) -> Delivery:
        """Wait for one message.

        Raises:
            TransportTimeoutError: nothing came within ``timeout_s`` seconds.
            TransportClosedError: the worker is gone.
        """

    def close(self) -> None:
        """Close at once; queued messages are dropped. May be called twice."""


class ServerTransport(Protocol):
    """A worker's side of all its links.

    Attributes:
        ahead: memory to read while nothing comes, or None.
    """

    ahead: Ahead | None

    @property
    def hung_up(self) -> bool:
        """Whether the process that started this worker is gone."""

    def receive(self, timeout_s: float) -> Incoming | None:
        """Wait for one message; None when none came within ``timeout_s`` seconds."""

    def close(self, linger_s: float = 0.0) -> None:
        """Close, but let replies that are on their way leave for at most so long. May be called twice."""
