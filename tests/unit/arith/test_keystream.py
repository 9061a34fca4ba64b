"""Mask words: the keystream of the standard, in disjoint rows, and never beyond the counter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from tsqp.arith.keystream import keystream_rows
from tsqp.errors import MaskReuseError

# NIST SP 800-38A, F.5.5: CTR-AES256.Encrypt.
NIST_KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
NIST_COUNTER = int("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", 16)
NIST_KEYSTREAM = bytes(
    a ^ b
    for a, b in zip(
        bytes.fromhex("6bc1bee22e409f96e93d7e117393172a"),
        bytes.fromhex("601ec313775789a5b7a7f504bbf3d228"),
        strict=True,
    )
)


def as_bytes(rows: torch.Tensor) -> bytes:
    return rows.contiguous().numpy().tobytes()


def test_a_row_is_the_keystream_of_the_standard() -> None:
    """With 4 words a row is one block, so group and row spell the counter; the standard has a larger row number."""
    encryptor = Cipher(algorithms.AES(NIST_KEY), modes.CTR(NIST_COUNTER.to_bytes(16, "big"))).encryptor()
    assert encryptor.update(bytes(16)) == NIST_KEYSTREAM
    row = keystream_rows(NIST_KEY, 0xF0F1F2F3, 0x38F9FAFBFCFDFEFF, 1, 4)
    counter = (0xF0F1F2F3 << 96 | 0x38F9FAFBFCFDFEFF).to_bytes(16, "big")
    block = Cipher(algorithms.AES(NIST_KEY), modes.ECB()).encryptor().update(counter)  # noqa: S305  CTR by hand
    assert as_bytes(row) == block


@given(st.integers(0, 1 << 40), st.integers(1, 6), st.integers(1, 40))
def test_rows_made_together_and_alone_are_the_same(first: int, count: int, inputs: int) -> None:
    together = keystream_rows(NIST_KEY, 7, first, count, inputs)
    assert together.shape == (count, inputs)
    for index in range(count):
        assert torch.equal(together[index], keystream_rows(NIST_KEY, 7, first + index, 1, inputs)[0])


def test_rows_longer_than_what_is_encrypted_at_a_time_go_on() -> None:
    inputs = 100_000
    rows = keystream_rows(NIST_KEY, 3, 5, 7, inputs)
    start = (3 << 96) | 5 * inputs // 4
    encryptor = Cipher(algorithms.AES(NIST_KEY), modes.CTR(start.to_bytes(16, "big"))).encryptor()
    assert as_bytes(rows) == encryptor.update(bytes(4 * 7 * inputs))


def test_no_block_is_shared() -> None:
    """Over groups and rows, with rows that do not fill their last block."""
    blocks: Counter[bytes] = Counter()
    for group in range(4):
        for row in range(50):
            data = as_bytes(keystream_rows(NIST_KEY, group, row, 1, 10))
            blocks.update(data[start : start + 16] for start in range(0, 32, 16))
    assert max(blocks.values()) == 1


@pytest.mark.parametrize(
    ("group", "first", "count", "inputs"),
    [(-1, 0, 1, 4), (1 << 32, 0, 1, 4), (0, -1, 1, 4), (0, (1 << 62) - 1, 2, 4), (0, 0, 1, 1 << 34), (0, 5, -1, 4)],
)
def test_the_counter_never_wraps(group: int, first: int, count: int, inputs: int) -> None:
    with pytest.raises(MaskReuseError, match="beyond the counter's range"):
        keystream_rows(NIST_KEY, group, first, count, inputs)
