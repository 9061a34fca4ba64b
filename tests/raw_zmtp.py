"""A peer that speaks ZMTP 3.0 (ZeroMQ RFC 23) by hand over a plain socket, without a library that keeps it honest."""

from __future__ import annotations

import contextlib
import socket
import struct
from types import TracebackType

MORE, LONG, COMMAND = 1, 2, 4
_SHORTEST_LONG = 256
_PATIENCE_S = 60.0


def greeting(mechanism: bytes = b"NULL") -> bytes:
    """Return how a peer begins: a signature, version 3.0, the mechanism, and that it is no server."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)


def frame(body: bytes, flags: int = 0) -> bytes:
    """Return one frame of a message, or a command."""
    return header(len(body), flags) + body


def header(size: int, flags: int = 0) -> bytes:
    """Return what comes before a frame's body of so many bytes."""
    if size < _SHORTEST_LONG:
        return struct.pack(">BB", flags, size)
    return struct.pack(">BQ", flags | LONG, size)


def ready() -> bytes:
    """Return the command that ends a handshake without encryption."""
    properties = b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    return frame(b"\x05READY" + properties, COMMAND)


class RawPeer(contextlib.AbstractContextManager["RawPeer"]):
    """A connection to a tcp address of this machine, for the time of a ``with`` block."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), _PATIENCE_S)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()

    def send(self, *parts: bytes) -> None:
        """Send bytes as they are.

        Raises:
            ConnectionError: the other side has closed.
        """
        self._socket.sendall(b"".join(parts))

    def wait_at_most(self, seconds: float) -> None:
        """From now on raise TimeoutError where the other side lets this one wait for longer."""
        self._socket.settimeout(seconds)

    def shake_hands(self) -> RawPeer:
        """Greet and say to be a DEALER, and wait for the same from the other side."""
        self.send(greeting())
        assert len(self.receive(64)) == 64
        self.send(ready())
        flags, size = self.receive(2)
        assert flags == COMMAND
        assert self.receive(size).startswith(b"\x05READY")
        return self

    def receive(self, size: int) -> bytes:
        """Return as many bytes, or fewer where the other side closes before."""
        data = b""
        with contextlib.suppress(ConnectionError):
            while len(data) < size and (part := self._socket.recv(size - len(data))):
                data += part
        return data

    def receive_until(self, mark: bytes) -> bytes:
        """Return all bytes up to those that end with a mark, or the end."""
        data = b""
        while mark not in data and (part := self._socket.recv(1 << 16)):
            data += part
        return data

    def cut(self) -> None:
        """End the connection, also for a thread that sends."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def is_closed(self) -> bool:
        """Wait for the other side to close; what it sends before is dropped. It takes 60 s to find that it does not."""
        try:
            while self._socket.recv(1 << 16):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True
