"""What goes through a doorbell: a message's short frames, and where in its sender's half of the region long ones lie.

The number of frames, then for each where it lies and how long it is, then those that travel here. docs/protocol.md has
the layout.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

from tsqp.errors import ProtocolError
from tsqp.transport.base import Buffer

# Frames travel in the datagram while they are this short together: a step of generation, but for its logits.
MAX_INLINE_BYTES = 8192
MAX_FRAMES = 1 << 12
# In place of where a frame lies: here.
INLINE = (1 << 64) - 1
_COUNT = struct.Struct("<Q")
_SPAN = struct.Struct("<QQ")
# Frames begin at multiples of this, so that a tensor may be made of one where it lies.
_ALIGNED = 8
_PADDING = [bytes(count) for count in range(_ALIGNED)]
MAX_DATAGRAM = _COUNT.size + MAX_FRAMES * (_SPAN.size + _ALIGNED) + MAX_INLINE_BYTES


def whole(frames: Sequence[Buffer]) -> bytes:
    """Return the datagram of a message that travels in it whole."""
    numbers = [len(frames)]
    pieces: list[Buffer] = [b""]
    for frame in frames:
        size = len(frame)
        numbers += (INLINE, size)
        pieces += (frame, _PADDING[-size % _ALIGNED])
    pieces[0] = _head(2 * len(frames)).pack(*numbers)
    return b"".join(pieces)


def write(spans: Sequence[int], inline: Sequence[Buffer]) -> bytes:
    """Return a datagram.

    Args:
        spans: for each frame where it lies and how long it is.
        inline: those that lie here.
    """
    pieces: list[Buffer] = [_head(len(spans)).pack(len(spans) // 2, *spans)]
    for frame in inline:
        pieces += (frame, _PADDING[-len(frame) % _ALIGNED])
    return b"".join(pieces)


@functools.cache
def _head(numbers: int) -> struct.Struct:
    """Return the layout of a datagram's beginning: so many numbers after the first."""
    return struct.Struct(f"<{1 + numbers}Q")


def read(datagram: memoryview, half: memoryview) -> tuple[list[Buffer], bool]:
    """Return a message's frames, views of the datagram and of the sender's half, and whether some are of the half.

    Raises:
        ProtocolError: it is cut short, or frames lie where there is nothing.
    """
    try:
        (count,) = _COUNT.unpack_from(datagram)
    except struct.error as error:
        raise ProtocolError("a datagram beside the shared region is cut short.") from error
    at = _COUNT.size + count * _SPAN.size
    if count > MAX_FRAMES or at > len(datagram):
        raise ProtocolError(f"{count} frames in a datagram of {len(datagram)} bytes; at most {MAX_FRAMES} fit.")
    room = len(half)  # frames that overlap could otherwise be larger together than the region is
    frames: list[Buffer] = []
    for offset, length in _SPAN.iter_unpack(datagram[_COUNT.size : at]):
        if offset == INLINE:
            frame = datagram[at : at + length]
            at += length + -length % _ALIGNED
        else:
            frame = half[offset : offset + length]
            room -= length
        if len(frame) != length or room < 0:
            raise ProtocolError("a frame beside the shared region lies outside it.")
        frames.append(frame)
    return frames, room < len(half)
