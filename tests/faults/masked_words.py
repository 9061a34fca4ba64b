"""The masked words that enclaves send, as one sees them who reads the link: no mask may ever hide two inputs."""

from __future__ import annotations

import itertools
import threading
from hashlib import blake2b

import msgspec
import numpy as np
from numpy.typing import NDArray

# An input is below 2^31 / B, and B, the largest norm of a row of codes, is at least 127 (docs/arithmetic.md): two rows
# under one mask differ by less than this in every word. Two rows under masks of their own do so in all of WORDS words
# with probability 2^-72, as uniform words are that close with 2^-6.
NEAR = 1 << 25
WORDS = 12
# Words by which rows are first sorted into cells of twice that width, and how many bits name a cell.
_KEYS = 5
_CELL_BITS = 6

Rows = NDArray[np.uint32]


class Sent(msgspec.Struct, frozen=True):
    """What was sent, in all.

    Attributes:
        rows: of masked words.
        resent: messages that came again as they were: retries of stored bytes, which tell nothing new.
        reused: pairs of rows under one mask. There must be none.
    """

    rows: int
    resent: int
    reused: int


class MaskedWords:
    """Keeps the beginning of every masked row. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, list[Rows]] = {}
        self._known: set[bytes] = set()
        self._resent = 0

    def add(self, group: str, words: bytes, width: int) -> None:
        """Take one message's words in.

        Args:
            group: which product they were sent for; masks of different groups are disjoint streams.
            words: all of them.
            width: words per row.
        """
        name = blake2b(words, digest_size=16, key=group.encode()[:64]).digest()
        rows = np.frombuffer(words, np.uint32).reshape(-1, width)[:, :WORDS].copy()
        with self._lock:
            if name in self._known:
                self._resent += 1
            else:
                self._known.add(name)
                self._rows.setdefault(group, []).append(rows)

    def look(self) -> Sent:
        """Compare all rows with each other."""
        with self._lock:
            groups = [np.concatenate(rows) for rows in self._rows.values()]
            return Sent(sum(map(len, groups)), self._resent, sum(map(_near_pairs, groups)))


def _near_pairs(rows_MW: Rows) -> int:
    """Count pairs of rows that are near each other in every word.

    Two words that are near lie in one cell of at least one of two grids, which are half a cell apart.
    """
    near: set[tuple[int, int]] = set()
    keys = min(_KEYS, rows_MW.shape[1])
    for shifts in itertools.product((0, NEAR), repeat=keys):
        cells_MK = (rows_MW[:, :keys] + np.array(shifts, np.uint32)) >> np.uint32(32 - _CELL_BITS)
        names_M = cells_MK.astype(np.uint64) @ (np.uint64(1 << _CELL_BITS) ** np.arange(keys, dtype=np.uint64))
        order_M = np.argsort(names_M, kind="stable")
        sorted_M = names_M[order_M]
        for step in range(1, len(rows_MW)):
            (at,) = np.nonzero(sorted_M[step:] == sorted_M[:-step])
            if not len(at):
                break
            one, other = order_M[at], order_M[at + step]
            apart_PW = rows_MW[one] - rows_MW[other]
            found = (np.minimum(apart_PW, -apart_PW) < NEAR).all(-1)
            near |= set(zip(one[found].tolist(), other[found].tolist(), strict=True))
    return len(near)
