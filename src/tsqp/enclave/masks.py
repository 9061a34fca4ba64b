"""Mask keys, the ledger of used rows, and masks: each row hides one row of one linear and is never used again.

A key lives as long as its process; nothing here is ever written down. The ledger hands out row numbers upwards only,
burns what it hands out, and refuses rather than start again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.arith.keystream import KEY_BYTES, MAX_ROWS, keystream_rows
from tsqp.errors import ExactnessError, MaskReuseError


class MaskKey:
    """The key of one mask source, fresh from the operating system. Its repr and pickle show nothing."""

    def __init__(self) -> None:
        self._key = os.urandom(KEY_BYTES)

    def __repr__(self) -> str:
        return "MaskKey(not shown)"

    def __reduce__(self) -> tuple[object, ...]:
        raise MaskReuseError("a mask key must not leave its process.")

    def seed(self) -> bytes:
        """Return the key itself, for the dealer that computes this key's products, over an encrypted link."""
        return self._key

    def rows(self, group: int, first: int, count: int, inputs: int) -> Tensor:
        """Return mask rows; see ``keystream_rows``."""
        return keystream_rows(self._key, group, first, count, inputs)


class MaskLedger:
    """Which mask rows are used up, for every worker, connection and thread of this process.

    A forked child would use the rows its parent uses: the ledger refuses to serve another process than the one it was
    made in.
    """

    def __init__(self) -> None:
        self._next: dict[int, int] = {}
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def check_process(self) -> None:
        """Refuse to go on in a fork.

        Raises:
            MaskReuseError: this process is a fork of the ledger's.
        """
        if os.getpid() != self._owner:
            raise MaskReuseError("this process is a fork of the one that holds the mask ledger: start a new enclave.")

    def take(self, group: int, count: int) -> int:
        """Burn the next ``count`` rows of a group; return the first one's number.

        Raises:
            MaskReuseError: no rows are left, or this process is a fork of the ledger's.
        """
        self.check_process()
        if count < 0:
            raise MaskReuseError(f"{count} mask rows were asked for.")
        with self._lock:
            first = self._next.get(group, 0)
            if first + count > MAX_ROWS:
                raise MaskReuseError(f"the mask rows of group {group} are used up: start a new enclave.")
            self._next[group] = first + count
        return first


@dataclass(frozen=True, slots=True, repr=False)
class MaskRows:
    """Consecutive mask rows of one group with their products u = r W: key material.

    Attributes:
        first: number of the first row.
        u_MN: int32, shape (M, N).
        r_MK: the rows' mask words, int32 of shape (M, K), where they have been made ahead.
    """

    first: int
    u_MN: Tensor
    r_MK: Tensor | None = None

    def __reduce__(self) -> tuple[object, ...]:
        raise MaskReuseError("mask products determine masks; they must not leave their process.")


class Mask:
    """One mask for one product: put on once, taken off once.

    Args:
        rows: their number is the number of rows to hide.
        words: gives the mask words of rows ``first`` to ``first + count``, int32 of shape (count, K).
    """

    def __init__(self, rows: Sequence[MaskRows], words: Callable[[int, int], Tensor]) -> None:
        self._rows = rows
        self._words = words
        self._lock = threading.Lock()
        self._used = self._taken_off = False

    def __repr__(self) -> str:
        return f"Mask({self.count} rows, not shown)"

    def __reduce__(self) -> tuple[object, ...]:
        raise MaskReuseError("a mask must not leave its process.")

    @property
    def count(self) -> int:
        """How many rows it hides."""
        return sum(len(part.u_MN) for part in self._rows)

    def add(self, xq_MK: Tensor, out_MK: Tensor | None = None) -> Tensor:
        """Return x + r modulo 2^32, the words to send: int32, shape (M, K).

        Args:
            xq_MK: int32.
            out_MK: where to store them, perhaps memory that a peer watches: each word is written once, finished.

        Raises:
            MaskReuseError: this mask has hidden something already.
            ExactnessError: another number of rows.
        """
        with self._lock:
            if self._used:
                raise MaskReuseError("a mask was about to hide a second input.")
            self._used = True
        if len(xq_MK) != self.count:
            raise ExactnessError(f"a mask of {self.count} rows cannot hide {len(xq_MK)}.")
        xm_MK = torch.empty_like(xq_MK) if out_MK is None else out_MK
        if len(self._rows) == 1:
            torch.add(xq_MK, self._words_of(self._rows[0]), out=xm_MK)
            return xm_MK
        done = 0
        for part in self._rows:
            rows = slice(done, done + len(part.u_MN))
            torch.add(xq_MK[rows], self._words_of(part), out=xm_MK[rows])
            done = rows.stop
        return xm_MK

    def _words_of(self, part: MaskRows) -> Tensor:
        return self._words(part.first, len(part.u_MN)) if part.r_MK is None else part.r_MK

    def products(self) -> tuple[Tensor, ...]:
        """Return what the mask adds to products, once: u for consecutive rows, int32 of shape (rows, N).

        Raises:
            MaskReuseError: they were given before, or the mask has hidden nothing yet.
        """
        with self._lock:
            if not self._used:
                raise MaskReuseError("a mask that hides nothing was about to be taken off.")
            if self._taken_off:
                raise MaskReuseError("a mask was about to be taken off a second time.")
            self._taken_off = True
        return tuple(part.u_MN for part in self._rows)
