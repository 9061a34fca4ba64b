"""Checks products of integers by another party, row by row, with a secret vector (Freivalds 1977).

For codes W of shape (N, K), the enclave draws s uniformly from F_q^N, q = 2^61 - 1, and keeps c = W^T s mod q. A row
y claimed to be xq W^T is accepted only if <y, s> = <xq, c> mod q. An error in a row is a non-zero integer vector
whose entries are below 2^33 in absolute value, hence non-zero mod q; its product with s is uniform, so a wrong row
passes with probability 1/q. Every row is checked, never a sum of rows. docs/arithmetic.md, "Checking", has the rest.

Sums are exact float64 products over limbs of the vector: operands of b bits, limbs of w bits and n terms stay exact
while b + w + log2 n <= 53, which chooses w.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tsqp.errors import ExactnessError, IntegrityError

Q = (1 << 61) - 1
_Q_BITS = 61
_FLOAT64_BITS = 53
_RESULT_BITS = 31
_CODE_BITS = 7
# How many codes are widened to float64 at a time: 32 MB.
_WIDENED = 1 << 22

RandomBytes = Callable[[int], bytes]


class FieldVector:
    """A vector over F_q, and exact inner products of integer rows with it. Secret: its repr shows the length only.

    Args:
        values_N: int64 in [0, q), shape (N,).
    """

    def __init__(self, values_N: Tensor) -> None:
        self._values_N = values_N
        self._limbs: dict[int, Tensor] = {}

    def __repr__(self) -> str:
        return f"FieldVector(length={len(self._values_N)}, values not shown)"

    def dot(self, rows_MN: Tensor, bits: int) -> Tensor:
        """Return <row, vector> mod q for each row.

        Args:
            rows_MN: integers of at most 2^bits in absolute value.
            bits: their bound.

        Returns:
            int64 in [0, q), shape (M,).

        Raises:
            ExactnessError: the rows are too long to be summed exactly.
        """
        width = _FLOAT64_BITS - bits - math.ceil(math.log2(max(1, len(self._values_N))))
        if width < 1:
            raise ExactnessError(f"rows of {len(self._values_N)} integers of {bits} bits cannot be summed exactly.")
        # Sums are below 2^53 in absolute value; shifted by a multiple of the width, limb after limb.
        sums_ML = (rows_MN.double() @ self._limbs_of(width)).to(torch.int64)
        total_M = torch.zeros(len(rows_MN), dtype=torch.int64)
        for limb in reversed(range(sums_ML.shape[1])):
            total_M = _mod_q(_times_power_of_two(total_M, width) + torch.remainder(sums_ML[:, limb], Q))
        return total_M

    def _limbs_of(self, width: int) -> Tensor:
        """Split the values into limbs of ``width`` bits, least significant first: float64, shape (N, limbs)."""
        if width not in self._limbs:
            count = -(-_Q_BITS // width)
            mask = (1 << width) - 1
            limbs = [(self._values_N >> (width * limb)) & mask for limb in range(count)]
            self._limbs[width] = torch.stack(limbs, dim=1).double()
        return self._limbs[width]


def _mod_q(x_M: Tensor) -> Tensor:
    """Reduce values in [0, 2 q]."""
    return torch.where(x_M >= Q, x_M - Q, x_M)


def _times_power_of_two(x_M: Tensor, shift: int) -> Tensor:
    """Return x 2^shift mod q for x in [0, q): a rotation of 61 bits, since 2^61 = 1 mod q."""
    shift %= _Q_BITS
    return _mod_q(((x_M << shift) & Q) | (x_M >> (_Q_BITS - shift)))


def draw(length: int, random_bytes: RandomBytes = os.urandom) -> FieldVector:
    """Draw a vector uniformly from F_q^length.

    Args:
        length: N.
        random_bytes: where randomness comes from.
    """
    values = torch.empty(0, dtype=torch.int64)
    while len(values) < length:
        words = torch.frombuffer(bytearray(random_bytes(8 * (length - len(values)))), dtype=torch.int64) & Q
        values = torch.cat((values, words[words != Q]))  # q itself is no residue: draw again
    return FieldVector(values)


class Checker:
    """Checks claimed products with one set of codes.

    Args:
        name: the linear group, for messages.
        codes_NK: int8 codes; read once, not kept.
        random_bytes: where randomness comes from.
    """

    def __init__(self, name: str, codes_NK: Tensor, random_bytes: RandomBytes = os.urandom) -> None:
        self.name = name
        outputs, inputs = codes_NK.shape
        self._s = draw(outputs, random_bytes)
        step = max(1, _WIDENED // max(1, outputs))
        parts = [self._s.dot(codes_NK[:, k : k + step].T, _CODE_BITS) for k in range(0, inputs, step)]
        self._c = FieldVector(torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64))

    def __repr__(self) -> str:
        return f"Checker({self.name}, secret not shown)"

    def check(self, y_MN: Tensor, xq_MK: Tensor, peers: Sequence[str]) -> None:
        """Accept y as xq W^T, or raise.

        Args:
            y_MN: int32, as claimed.
            xq_MK: int32.
            peers: all who contributed to y.

        Raises:
            IntegrityError: a row is wrong.
        """
        wrong_M = self._s.dot(y_MN, _RESULT_BITS) != self._c.dot(xq_MK, _RESULT_BITS)
        if wrong_M.any():
            raise IntegrityError(
                f"linear {self.name}: {int(wrong_M.sum())} of {len(wrong_M)} rows are not the product asked for. "
                f"One of these lied or is broken: {', '.join(peers)}."
            )
