"""Checks products of integers by another party, row by row, with a secret vector (Freivalds 1977).

For codes W of shape (N, K), the enclave draws s uniformly from F_q^N, q = 2^61 - 1, and keeps c = W^T s mod q. A row
y claimed to be xq W^T is accepted only if <y, s> = <xq, c> mod q. An error in a row is a non-zero integer vector
whose entries are below 2^33 in absolute value, hence non-zero mod q; its product with s is uniform, so a wrong row
passes with probability 1/q. Every row is checked, never a sum of rows. docs/arithmetic.md, "Checking", has the rest.

Inner products are int8 products: integers are cut into bytes, field elements into eight balanced limbs, and int32 holds
the sums exactly (``ring.multiply_int8``). docs/arithmetic.md has the bounds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tsqp.arith.ring import INT8_MAX_K, multiply_int8
from tsqp.errors import ExactnessError, IntegrityError
from tsqp.wire.codec import Claim

Q = (1 << 61) - 1
_Q_BITS = 61
_HALF_BITS = 32
_WORD_BYTES = 4
# y = d3 2^24 + d2 2^16 + d1 2^8 + d0 + 0x808080 for the int8 bytes d of y xor 0x808080: the top byte is signed already.
_CENTRE = 0x808080
# Adding it to an int64 and flipping every byte's top bit gives eight balanced limbs.
_LIMB_OFFSET = 0x8080808080808080 - (1 << 64)
# Sums of at most this many blocks of INT8_MAX_K bytes stay below 2^61 in absolute value.
_MAX_BLOCKS = 32

RandomBytes = Callable[[int], bytes]


class FieldVector:
    """A vector over F_q, and exact inner products of integer rows with it. Secret: its repr shows the length only.

    Args:
        values_N: int64 in [0, q), shape (N,).

    Raises:
        ExactnessError: it is too long for sums to stay exact.
    """

    def __init__(self, values_N: Tensor) -> None:
        if _WORD_BYTES * len(values_N) > _MAX_BLOCKS * INT8_MAX_K:
            raise ExactnessError(f"rows of {len(values_N)} integers cannot be summed exactly.")
        self._values_N = values_N
        self._word_limbs: tuple[Tensor, int] | None = None

    def __repr__(self) -> str:
        return f"FieldVector(length={len(self._values_N)}, values not shown)"

    def __reduce__(self) -> tuple[object, ...]:
        raise ExactnessError("a check's secret must not leave its process.")

    def __len__(self) -> int:
        return len(self._values_N)

    def part(self, rows: slice) -> FieldVector:
        """Return some of its entries as a vector of their own."""
        return FieldVector(self._values_N[rows])

    def add(self, values_N: Tensor) -> None:
        """Add a vector of int64 in [0, q)."""
        self._values_N = _below_q(self._values_N + values_N)
        self._word_limbs = None

    def dot_words(self, rows_MN: Tensor) -> Tensor:
        """Return <row, vector> for rows of int32 as two halves: h0 + 2^32 h1 mod q.

        Args:
            rows_MN: int32.

        Returns:
            int64 below 2^62 in absolute value, shape (M, 2).
        """
        if self._word_limbs is None:
            # Byte i of a word weighs 2^8i: give each its own multiple of the value.
            spread_NB = torch.stack([_times_power_of_two(self._values_N, 8 * i) for i in range(_WORD_BYTES)], dim=1)
            offset = _CENTRE * sum(self._values_N.tolist()) % Q
            self._word_limbs = _limbs(spread_NB.flatten()), offset
        limbs_8L, offset = self._word_limbs
        halves_M2 = _halves((rows_MN ^ _CENTRE).contiguous().view(torch.int8), limbs_8L)
        halves_M2[:, 0] += offset
        return halves_M2

    def dot_codes(self, rows_MN: Tensor) -> Tensor:
        """Return <row, vector> mod q for rows of int8: int64 in [0, q), shape (M,)."""
        return _mod_q(_halves(rows_MN.contiguous(), _limbs(self._values_N)))


def _limbs(values_L: Tensor) -> Tensor:
    """Cut values of F_q into eight balanced limbs each, least significant first: int8, shape (8, L)."""
    centred_L = torch.where(values_L > Q // 2, values_L - Q, values_L)
    return ((centred_L + _LIMB_OFFSET) ^ _LIMB_OFFSET).view(torch.int8).view(-1, 8).T.contiguous()


def _halves(bytes_ML: Tensor, limbs_8L: Tensor) -> Tensor:
    """Return the inner products of bytes with what limbs stand for, as halves h0 + 2^32 h1: int64, shape (M, 2).

    A block's products with one limb sum to less than 2^31, four of them shifted by up to 24 bits to less than 2^56.
    """
    weights_42 = torch.tensor([[1, 0], [1 << 8, 0], [1 << 16, 0], [1 << 24, 0]])
    weights_82 = torch.cat((weights_42, weights_42.flip(1)))
    halves_M2 = torch.zeros(len(bytes_ML), 2, dtype=torch.int64)
    for first in range(0, bytes_ML.shape[1], INT8_MAX_K):
        block = slice(first, first + INT8_MAX_K)
        halves_M2 += multiply_int8(bytes_ML[:, block], limbs_8L[:, block]).to(torch.int64) @ weights_82
    return halves_M2


def _mod_q(halves_M2: Tensor) -> Tensor:
    """Return h0 + 2^32 h1 mod q, in [0, q)."""
    low_M, high_M = torch.remainder(halves_M2, Q).unbind(1)
    return _below_q(low_M + _times_power_of_two(high_M, _HALF_BITS))


def _below_q(x_M: Tensor) -> Tensor:
    """Reduce values in [0, 2 q)."""
    return torch.where(x_M >= Q, x_M - Q, x_M)


def _times_power_of_two(x_M: Tensor, shift: int) -> Tensor:
    """Return x 2^shift mod q for x in [0, q), shift < 61: a rotation of 61 bits, since 2^61 = 1 mod q."""
    return _below_q(((x_M << shift) & Q) | (x_M >> (_Q_BITS - shift)))


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
    """Checks claimed products with one set of codes. After a failure it refuses everything: s must be drawn anew.

    Args:
        name: the linear group, for messages.
        outputs: rows of the codes, N.
        inputs: their columns, K.
        random_bytes: where randomness comes from.
    """

    def __init__(self, name: str, outputs: int, inputs: int, random_bytes: RandomBytes = os.urandom) -> None:
        self.name = name
        self._s = draw(outputs, random_bytes)
        self._c = FieldVector(torch.zeros(inputs, dtype=torch.int64))
        self._absorbed = 0
        self._failed = False

    def __repr__(self) -> str:
        return f"Checker({self.name}, secret not shown)"

    def __reduce__(self) -> tuple[object, ...]:
        raise ExactnessError("a checker's secret must not leave its process.")

    def absorb(self, codes_RK: Tensor) -> None:
        """Add the next rows of the codes to c; they are read once and not kept.

        Args:
            codes_RK: int8.

        Raises:
            ExactnessError: more rows than there are.
        """
        rows = slice(self._absorbed, self._absorbed + len(codes_RK))
        if rows.stop > len(self._s):
            raise ExactnessError(f"linear {self.name} has {len(self._s)} rows of codes; {rows.stop} came.")
        self._c.add(self._s.part(rows).dot_codes(codes_RK.T))
        self._absorbed = rows.stop

    def verified(self, claim: Claim, xq_MK: Tensor, peers: Sequence[str]) -> Tensor:
        """Return the claimed y, int32 (M, N), if it is xq W^T.

        Args:
            claim: of the product.
            xq_MK: int32.
            peers: all who contributed to the claim.

        Raises:
            IntegrityError: a row is wrong, or one was before.
            ExactnessError: not all codes have been absorbed.
        """
        if self._absorbed != len(self._s):
            raise ExactnessError(f"linear {self.name}: {self._absorbed} of {len(self._s)} rows of codes absorbed.")
        if self._failed:
            raise IntegrityError(f"linear {self.name}: a wrong product came before; its check must be drawn anew.")
        y_MN = claim.unverified()
        wrong_M = _mod_q(self._s.dot_words(y_MN) - self._c.dot_words(xq_MK))
        if wrong_M.any():
            self._failed = True
            wrong = int(wrong_M.count_nonzero())
            raise IntegrityError(
                f"linear {self.name}: {wrong} of {len(wrong_M)} rows are not the product asked for. "
                f"One of these lied or is broken: {', '.join(peers)}."
            )
        return y_MN
