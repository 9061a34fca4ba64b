"""Rows of mask words: AES-256-CTR keystream. The enclave makes them from its keys, a dealer from a key it was sent.

The counter block of a row's i-th 16 bytes is group (32 bits) | row * blocks per row + i (96 bits), so two rows share no
block under one key (docs/arithmetic.md, "Masks").
"""

from __future__ import annotations

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from tsqp.errors import MaskReuseError

KEY_BYTES = 32
# Row numbers and group numbers lie below these. A dealer is told row numbers in fields of 62 bits.
MAX_ROWS = 1 << 62
MAX_GROUPS = 1 << 32
_BLOCK_BYTES = 16
_WORD_BYTES = 4
# What is encrypted: kept, since making as many zeros anew takes as long as encrypting them.
_ZEROS = memoryview(bytes(1 << 20))


def keystream_rows(key: bytes, group: int, first: int, count: int, inputs: int) -> Tensor:
    """Return mask rows of a key.

    Args:
        key: 32 bytes.
        group: the linear group's number.
        first: number of the first row.
        count: how many.
        inputs: words per row, K.

    Returns:
        Uniform int32 words, shape (count, K).

    Raises:
        MaskReuseError: a number outside the counter's range, where it would wrap into another row's.
    """
    blocks = -(-inputs * _WORD_BYTES // _BLOCK_BYTES)
    if not (0 <= group < MAX_GROUPS and 0 <= first <= first + count <= MAX_ROWS and blocks < MAX_GROUPS):
        raise MaskReuseError(f"mask rows {first} to {first + count} of group {group}: beyond the counter's range.")
    start = (group << 96) | (first * blocks)
    size = count * blocks * _BLOCK_BYTES
    # update_into wants room for a block more than it writes.
    words = torch.empty(size + _BLOCK_BYTES - 1, dtype=torch.uint8)
    out = words.numpy().data
    encryptor = Cipher(algorithms.AES(key), modes.CTR(start.to_bytes(_BLOCK_BYTES, "big"))).encryptor()
    for done in range(0, size, len(_ZEROS)):
        encryptor.update_into(_ZEROS[: size - done], out[done:])
    return words[:size].view(torch.int32).view(count, blocks * _BLOCK_BYTES // _WORD_BYTES)[:, :inputs]
