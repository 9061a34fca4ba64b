"""Mask rows: AES-256-CTR keystream, each used for one row of one linear and never again.

The counter block of a row's i-th 16 bytes is group (32 bits) | row * blocks per row + i (96 bits), so two rows share no
block under one key. A key lives as long as its process; nothing here is ever written down. The ledger hands out row
numbers upwards only, burns what it hands out, and refuses rather than start again.
"""

from __future__ import annotations

import os
import threading

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from tsqp.errors import MaskReuseError

KEY_BYTES = 32
_BLOCK_BYTES = 16
_WORD_BYTES = 4
_MAX_GROUPS = 1 << 32
_MAX_ROWS = 1 << 64


class MaskKey:
    """The key of one mask source, fresh from the operating system. Its repr and pickle show nothing."""

    def __init__(self) -> None:
        self._key = os.urandom(KEY_BYTES)

    def __repr__(self) -> str:
        return "MaskKey(not shown)"

    def __reduce__(self) -> tuple[object, ...]:
        raise MaskReuseError("a mask key must not leave its process.")

    def rows(self, group: int, first: int, count: int, inputs: int) -> Tensor:
        """Return mask rows.

        Args:
            group: the linear group's number.
            first: number of the first row.
            count: how many.
            inputs: words per row, K.

        Returns:
            Uniform int32 words, shape (count, K).

        Raises:
            MaskReuseError: a number outside the counter's range, where it would wrap into another row's.
        """
        return keystream_rows(self._key, group, first, count, inputs)


def keystream_rows(key: bytes, group: int, first: int, count: int, inputs: int) -> Tensor:
    """Return mask rows of a key; see ``MaskKey.rows``. A dealer that was given the key computes the same."""
    blocks = -(-inputs * _WORD_BYTES // _BLOCK_BYTES)
    if not (0 <= group < _MAX_GROUPS and 0 <= first <= first + count <= _MAX_ROWS and blocks < _MAX_GROUPS):
        raise MaskReuseError(f"mask rows {first} to {first + count} of group {group}: beyond the counter's range.")
    start = (group << 96) | (first * blocks)
    stream = bytearray(count * blocks * _BLOCK_BYTES)
    encryptor = Cipher(algorithms.AES(key), modes.CTR(start.to_bytes(_BLOCK_BYTES, "big"))).encryptor()
    words = bytearray(len(stream) + _BLOCK_BYTES - 1)
    encryptor.update_into(stream, words)
    if not count * inputs:
        return torch.empty(count, inputs, dtype=torch.int32)
    rows = torch.frombuffer(words, dtype=torch.int32, count=len(stream) // _WORD_BYTES).view(count, -1)
    return rows[:, :inputs]


class MaskLedger:
    """Which mask rows are used up, for every worker, connection and thread of this process.

    A forked child would use the rows its parent uses: the ledger refuses to serve another process than the one it was
    made in.
    """

    def __init__(self) -> None:
        self._next: dict[int, int] = {}
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def take(self, group: int, count: int) -> int:
        """Burn the next ``count`` rows of a group; return the first one's number.

        Raises:
            MaskReuseError: no rows are left, or this process is a fork of the ledger's.
        """
        if os.getpid() != self._owner:
            raise MaskReuseError("this process is a fork of the one that holds the mask ledger: start a new enclave.")
        if count < 0:
            raise MaskReuseError(f"{count} mask rows were asked for.")
        with self._lock:
            first = self._next.get(group, 0)
            if first + count > _MAX_ROWS:
                raise MaskReuseError(f"the mask rows of group {group} are used up: start a new enclave.")
            self._next[group] = first + count
        return first
