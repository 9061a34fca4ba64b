"""What leader and followers say to each other beside tensors, over two stream sockets for each follower.

Commands wait in a socket and not in a collective, which has a time-out: an idle worker may be so for weeks. The other
socket tells that a follower lives, while the first is silent.
"""

from __future__ import annotations

import secrets
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Literal

import msgspec
from msgspec import Struct

from tsqp import errors
from tsqp.errors import TsqpError

TOKEN_BYTES: Final = 16
Purpose = Literal[0, 1]
COMMANDS: Final = 0
BEATS: Final = 1
# A follower says that it lives every BEAT_S; one that was silent for so many times is lost.
BEAT_S: Final = 1.0
SILENT_BEATS: Final = 10
# What is known of a rank whose socket ends.
CLOSED: Final = "its connection closed"

_HELLO = struct.Struct(f"<{TOKEN_BYTES}sBI")
_LENGTH = struct.Struct("<I")
_MAX_BYTES = 1 << 20
_LOOK_S = 0.25
_HELLO_S = 5.0


class Load(Struct, frozen=True, kw_only=True, tag=True):
    """Load your rows. Settings are the leader's; ``digest`` is of the model that it found at ``model``."""

    model: str
    digest: str
    exact: bool
    dtype: str
    device: str
    threads: int | None
    log_level: str
    log_format: str


class Connect(Struct, frozen=True, tag=True):
    """Form the process group."""


class Multiply(Struct, frozen=True, tag=True):
    """Take part in the broadcast of so many rows, multiply them by your rows of a group, and send the result."""

    group: str
    rows: int


class SendCodes(Struct, frozen=True, tag=True):
    """Send some of your rows of a group's codes, counted among your own."""

    group: str
    first: int
    rows: int


class Stop(Struct, frozen=True, tag=True):
    """End."""


class Done(Struct, frozen=True, tag=True):
    """It is done; what was asked for follows in the process group."""


class Failed(Struct, frozen=True, tag=True):
    """It failed, and nothing follows. ``kind`` is the error's name in ``tsqp.errors``."""

    kind: str
    message: str

    def error(self, rank: int) -> TsqpError:
        """Return the error again, of the rank that had it."""
        kind = getattr(errors, self.kind, TsqpError)
        return (kind if issubclass(kind, TsqpError) else TsqpError)(f"rank {rank}: {self.message}")


Command = Load | Connect | Multiply | SendCodes | Stop
Reply = Done | Failed
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_encoder = msgspec.msgpack.Encoder()


class Channel:
    """Messages over a stream socket, each with its length before it.

    Args:
        connection: connected.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._socket.fileno()

    def send(self, message: Command | Reply) -> None:
        """Send a message.

        Raises:
            OSError: the other side is gone.
        """
        content = _encoder.encode(message)
        self._socket.sendall(_LENGTH.pack(len(content)) + content)

    def command(self) -> Command:
        """Wait for a command, however long.

        Raises:
            EOFError: the leader is gone.
        """
        return _commands.decode(self._content())

    def reply(self) -> Reply:
        """Wait for a reply.

        Raises:
            EOFError: the follower is gone.
        """
        return _replies.decode(self._content())

    def _content(self) -> bytes:
        (length,) = _LENGTH.unpack(_exactly(self._socket, _LENGTH.size))
        if length > _MAX_BYTES:
            raise EOFError
        return _exactly(self._socket, length)

    def await_end(self, timeout_s: float) -> None:
        """Wait until the other side closes, or for so long."""
        self._socket.settimeout(timeout_s)
        with suppress(OSError):
            while timeout_s and self._socket.recv(_LENGTH.size):
                pass

    def close(self) -> None:
        """Close the socket. May be called twice."""
        self._socket.close()


def _exactly(connection: socket.socket, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        try:
            part = connection.recv(size - len(content))
        except ConnectionError as error:
            raise EOFError from error
        if not part:
            raise EOFError
        content += part
    return bytes(content)


class Welcoming:
    """Where the leader takes followers in: those that know its token.

    Args:
        listener: listens.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.found: dict[tuple[int, int], socket.socket] = {}

    def take(self, ranks: int, timeout_s: float, check: Callable[[], None]) -> None:
        """Wait until both sockets of ranks 1 to ``ranks - 1`` are there, or for so long.

        Args:
            ranks: how many there are, the leader included.
            timeout_s: in seconds.
            check: called some times a second; it may raise.
        """
        self._listener.settimeout(_LOOK_S)
        looks = 0
        while len(self.found) < 2 * (ranks - 1) and looks * _LOOK_S < timeout_s:
            check()
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                looks += 1
                continue
            connection.settimeout(_HELLO_S)
            try:
                token, purpose, rank = _HELLO.unpack(_exactly(connection, _HELLO.size))
            except (EOFError, OSError):
                connection.close()
                continue
            if not secrets.compare_digest(token, self.token) or not 0 < rank < ranks:
                connection.close()
                continue
            connection.settimeout(None)
            self.found[rank, purpose] = connection

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()


def introduce(connection: socket.socket, token: bytes, purpose: Purpose, rank: int) -> None:
    """Tell the leader who connects, and what for."""
    connection.sendall(_HELLO.pack(token, purpose, rank))
