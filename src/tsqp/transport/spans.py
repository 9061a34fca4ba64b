"""Which bytes of one side's half of a shared region are in use. Pure: it counts offsets and touches no memory."""

from __future__ import annotations

from bisect import bisect_left

_ALIGNMENT = 64


class FullError(Exception):
    """There is no room at the moment."""


def padded(size: int) -> int:
    """Return the room that ``size`` bytes take."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Spans:
    """Hands out aligned spans, the lowest that fits first: few pages are touched, and they stay in the cache.

    Args:
        size: of the half, in bytes; a multiple of 64.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        # Free spans by offset; no two of them touch.
        self._starts = [0]
        self._ends = [size]

    def take(self, size: int) -> int:
        """Return the offset of ``size`` free bytes.

        Raises:
            FullError: no free span is that long.
        """
        room = padded(size)
        if not room:
            return 0
        for index, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            if end - start >= room:
                if end - start == room:
                    del self._starts[index], self._ends[index]
                else:
                    self._starts[index] = start + room
                self.used += room
                return start
        raise FullError

    def free(self, offset: int, size: int) -> None:
        """Give back a span that ``take`` returned for ``size`` bytes."""
        if not size:
            return
        start, end = offset, offset + padded(size)
        self.used -= end - start
        index = bisect_left(self._starts, start)
        if index < len(self._starts) and self._starts[index] == end:
            end = self._ends[index]
            del self._starts[index], self._ends[index]
        if index and self._ends[index - 1] == start:
            self._ends[index - 1] = end
        else:
            self._starts.insert(index, start)
            self._ends.insert(index, end)
