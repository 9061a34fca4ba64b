"""``LinearOps`` over a packed model: quantise, multiply integers exactly, scale back. Who multiplies is exchangeable.

Everything but the large products happens here, so logits depend on who multiplies only if that party errs: `local` over
a packed model, `verified` and `masked` give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tsqp.arith.native import Scaling
from tsqp.arith.quantize import dequantize, quantize_activations
from tsqp.arith.ring import Codes, multiply
from tsqp.errors import InputError
from tsqp.meter import Meter
from tsqp.model.overlap import Pending
from tsqp.model.packed import PackedEnclave
from tsqp.threads import using_threads


class Products(Protocol):
    """Who multiplies integers."""

    def start(self, group: str, xq_MK: Tensor, scaling: Scaling | None = None) -> Pending:
        """Ask for products.

        Args:
            group: the linear group's name.
            xq_MK: int32 within the group's exact range.
            scaling: what makes their products activations again; None for the integers themselves.

        Returns:
            To be called for the products, known to be right: float32 (M, N), or int32 without scaling, in memory that
            nobody else uses.
        """

    def abandon(self) -> None:
        """Forget what has been asked for and will not be collected."""


class LocalProducts:
    """Products computed in this process.

    Args:
        codes: by group.
        threads: CPU threads to compute with.
    """

    def __init__(self, codes: Mapping[str, Codes], threads: int) -> None:
        self._codes = codes
        self._threads = threads

    def start(self, group: str, xq_MK: Tensor, scaling: Scaling | None = None) -> Pending:
        """See ``Products.start``. Nothing is computed before the call."""
        return partial(self._multiply, group, xq_MK, scaling)

    def abandon(self) -> None:
        """See ``Products.abandon``. Nothing is on its way."""

    def _multiply(self, group: str, xq_MK: Tensor, scaling: Scaling | None) -> Tensor:
        with using_threads(self._threads):
            y_MN = multiply(xq_MK, self._codes[group])
            return y_MN if scaling is None else dequantize(y_MN, scaling, y_MN.view(torch.float32))


class GroupScales(Protocol):
    """What turns products with a model's codes into real ones, by group."""

    @property
    def largest_norms(self) -> Mapping[str, float]:
        """B, the largest Euclidean norm of a row of codes."""

    @property
    def scales(self) -> Mapping[str, Tensor]:
        """Of the output channels, float32, shape (N,)."""

    @property
    def biases(self) -> Mapping[str, Tensor]:
        """Of groups whose biases are added with their products, float32, shape (N,)."""


class ExactLinears:
    """Linear groups with exact products.

    Args:
        scales: of their codes.
        products: who multiplies.
        meter: where the time of quantising is counted.
    """

    def __init__(self, scales: GroupScales, products: Products, meter: Meter) -> None:
        self._scales, self._biases, self._norms = scales.scales, scales.biases, scales.largest_norms
        self._products = products
        self._meter = meter

    def linear(self, group: str, x_MK: Tensor) -> Pending:
        """See ``LinearOps.linear``.

        Raises:
            InputError: an activation is infinite or not a number.
            IntegrityError: a product was wrong; when it is collected.
        """
        with self._meter.span("quantise"):
            xq_MK, scale_M1 = quantize_activations(x_MK, self._norms[group])
        scaling = Scaling(scale_M1, self._scales[group], self._biases.get(group))
        return self._products.start(group, xq_MK, scaling)

    def abandon(self) -> None:
        """See ``LinearOps.abandon``."""
        self._products.abandon()


class ExactOps(ExactLinears):
    """A packed model's linear layers with exact products.

    Args:
        packed: the enclave's part of the model.
        products: who multiplies.
        meter: where the time of quantising is counted.
    """

    def __init__(self, packed: PackedEnclave, products: Products, meter: Meter) -> None:
        super().__init__(packed, products, meter)
        self._packed = packed

    def embedding(self, ids_M: Tensor) -> Pending:
        """See ``LinearOps.embedding``. Always looked up here: a token id cannot be masked."""
        return partial(self._look_up, ids_M)

    def _look_up(self, ids_M: Tensor) -> Tensor:
        vocabulary = len(self._packed.embedding_VD)
        if ids_M.numel() and not 0 <= int(ids_M.min()) <= int(ids_M.max()) < vocabulary:
            raise InputError(f"a token id lies outside the vocabulary of {vocabulary}.")
        return self._packed.embedding_VD[ids_M].float()

    def linear_chain(self, groups: tuple[str, ...], x_MK: Tensor, residual_MD: Tensor) -> None:
        """See ``LinearOps.linear_chain``: a product must be checked before anything is made of it."""

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``LinearOps.matmul``. Both operands are secret, so nobody else is asked."""
        return torch.matmul(a, b)

    def state(self) -> dict[str, Tensor]:
        """See ``LinearOps.state``."""
        return self._packed.state
