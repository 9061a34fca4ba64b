"""Checks products of integers by another party, row by row, with a secret vector (Freivalds 1977).

For codes W of shape (N, K), the enclave draws s uniformly from F_q^N, q = 2^61 - 1, and keeps c = W^T s mod q. A row
y claimed to be xq W^T is accepted only if <y, s> = <xq, c> mod q. An error in a row is a non-zero integer vector
whose entries are below 2^33 in absolute value, hence non-zero mod q; its product with s is uniform, so a wrong row
passes with probability 1/q. Every row is checked, never a sum of rows. docs/arithmetic.md, "Checking", has the rest.

Inner products are computed by ``native/check.c``, which reads a claimed word once: what it checks is what it returns,
also where the peer can change the words meanwhile. Its twin copies the claim first and uses int8 products: integers are
cut into bytes, field elements into eight balanced limbs, and int32 holds the sums exactly (``ring.multiply_int8``).
Both give the same residues; docs/arithmetic.md has the bounds.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tsqp.arith import native
from tsqp.arith.native import Scaling
from tsqp.arith.quantize import dequantize
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
# The native kernel's limbs: three of 21 bits.
_NATIVE_LIMBS = 3
_NATIVE_LIMB_BITS = 21
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
        self._native_limbs_3N: Tensor | None = None

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
        self._word_limbs = self._native_limbs_3N = None

    def dot_words(self, rows_MN: Tensor) -> Tensor:
        """Return <row, vector> mod q for rows of int32 that nobody changes meanwhile: int64 in [0, q), shape (M,)."""
        if not rows_MN.numel():
            return torch.zeros(len(rows_MN), dtype=torch.int64)
        kernels = native.kernels()
        if kernels:
            return kernels.dots(rows_MN, self._native_limbs())
        return _mod_q(self._halves(rows_MN))

    def unmasking(
        self, u: Sequence[Tensor], out_MN: Tensor, scaling: Scaling | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Return a function of words that stores y = words - u modulo 2^32 and returns <row, vector> mod q of y.

        All that can be is done before the words are there. They are int32 and of out's shape; whoever shares their
        memory may change them meanwhile: each word is read once. The function may be called once.

        Args:
            u: int32, consecutive rows, M together; none to subtract nothing.
            out_MN: int32, contiguous, memory of this process.
            scaling: store y scaled back, float32 in the memory of ``out_MN``.

        Raises:
            ExactnessError: shapes do not go together.
        """
        if u and sum(map(len, u)) != len(out_MN):
            raise ExactnessError(f"{len(out_MN)} rows to check, and masks of {sum(map(len, u))}.")
        kernels = native.kernels()
        if not kernels:
            return partial(self._dot_by_twin, u, out_MN, scaling)
        limbs_3N = self._native_limbs()
        if len(u) <= 1:
            return kernels.unmasking(limbs_3N, u[0] if u else None, out_MN, scaling)
        ends = list(itertools.accumulate(map(len, u)))
        rows = [slice(end - len(u_PN), end) for end, u_PN in zip(ends, u, strict=True)]
        parts = [
            kernels.unmasking(limbs_3N, u_PN, out_MN[part], None if scaling is None else scaling.part(part))
            for part, u_PN in zip(rows, u, strict=True)
        ]
        return lambda words_MN: torch.cat([dots(words_MN[part]) for part, dots in zip(rows, parts, strict=True)])

    def _dot_by_twin(self, u: Sequence[Tensor], out_MN: Tensor, scaling: Scaling | None, words_MN: Tensor) -> Tensor:
        out_MN.copy_(words_MN)
        if u:
            out_MN -= torch.cat(tuple(u))
        residues_M = self.dot_words(out_MN)
        if scaling is not None:
            dequantize(out_MN, scaling, out_MN.view(torch.float32))
        return residues_M

    def _native_limbs(self) -> Tensor:
        if self._native_limbs_3N is None:
            mask = (1 << _NATIVE_LIMB_BITS) - 1
            limbs = [self._values_N >> (_NATIVE_LIMB_BITS * i) & mask for i in range(_NATIVE_LIMBS)]
            self._native_limbs_3N = torch.stack(limbs).to(torch.int32)
        return self._native_limbs_3N

    def _halves(self, rows_MN: Tensor) -> Tensor:
        """Return <row, vector> as h0 + 2^32 h1 mod q: int64 below 2^62 in absolute value, shape (M, 2)."""
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


class Expectation:
    """What the check of some rows must give, and all else that is ready for it. Secret: its repr shows nothing.

    Args:
        residues_M: int64 in [0, q).
        y_MN: where the checked product will lie: int32, or float32 scaled back.
        dots: stores it there and returns its residues; see ``FieldVector.unmasking``.
    """

    __slots__ = ("_dots", "_residues_M", "_y_MN")

    def __init__(self, residues_M: Tensor, y_MN: Tensor, dots: Callable[[Tensor], Tensor]) -> None:
        self._residues_M = residues_M
        self._y_MN = y_MN
        self._dots: Callable[[Tensor], Tensor] | None = dots

    def __repr__(self) -> str:
        return f"Expectation({len(self._residues_M)} rows, not shown)"

    def __reduce__(self) -> tuple[object, ...]:
        raise ExactnessError("what a check expects must not leave its process.")

    def compare(self, claimed_MN: Tensor) -> tuple[Tensor, int]:
        """Return the product and how many of its rows are wrong. Each claimed word is read once.

        Raises:
            ExactnessError: another shape, or a second claim: it would change what the first one was found to be.
        """
        dots, self._dots = self._dots, None
        if dots is None or claimed_MN.shape != self._y_MN.shape:
            raise ExactnessError(
                f"a claim of shape {list(claimed_MN.shape)} to check: expected one, of {list(self._y_MN.shape)}."
            )
        found_M = dots(claimed_MN)
        if torch.equal(found_M, self._residues_M):
            return self._y_MN, 0
        return self._y_MN, int((found_M != self._residues_M).count_nonzero())


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

    def expect(self, xq_MK: Tensor, u: Sequence[Tensor] = (), scaling: Scaling | None = None) -> Expectation:
        """Prepare the check of the products of these integers; to be done while the worker computes.

        Args:
            xq_MK: int32.
            u: products of the masks that were put on, for consecutive rows, M together; none where nothing was masked.
            scaling: scale the products back once they are checked.

        Raises:
            ExactnessError: not all codes have been absorbed, or shapes do not go together.
        """
        if self._absorbed != len(self._s):
            raise ExactnessError(f"linear {self.name}: {self._absorbed} of {len(self._s)} rows of codes absorbed.")
        y_MN = torch.empty(len(xq_MK), len(self._s), dtype=torch.int32)
        dots = self._s.unmasking(u, y_MN, scaling)
        return Expectation(self._c.dot_words(xq_MK), y_MN if scaling is None else y_MN.view(torch.float32), dots)

    def verified(self, claim: Claim, expectation: Expectation, peers: Sequence[str]) -> Tensor:
        """Return the claimed y less u if it is xq W^T: memory of this process, that nobody else changes.

        Args:
            claim: of the product of what was sent; its words may change meanwhile, and each is read once.
            expectation: from ``expect`` for xq; for one claim.
            peers: all who contributed to the claim.

        Returns:
            int32 (M, N), or float32 if it is scaled back.

        Raises:
            IntegrityError: a row is wrong, or one was before.
        """
        if self._failed:
            raise IntegrityError(f"linear {self.name}: a wrong product came before; its check must be drawn anew.")
        y_MN, wrong = expectation.compare(claim.unverified())
        if wrong:
            self._failed = True
            raise IntegrityError(
                f"linear {self.name}: {wrong} of {len(y_MN)} rows are not the product asked for. "
                f"One of these lied or is broken: {', '.join(peers)}."
            )
        return y_MN
