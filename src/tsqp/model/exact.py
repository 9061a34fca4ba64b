"""``LinearOps`` over a packed model: quantise, multiply integers exactly, scale back. Who multiplies is exchangeable.

Everything but the large products happens here, so logits depend on who multiplies only if that party errs: `local` over
a packed model, `verified` and `masked` give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tsqp.arith.quantize import dequantize, quantize_activations
from tsqp.arith.ring import multiply
from tsqp.errors import InputError
from tsqp.meter import Meter
from tsqp.model.packed import PackedEnclave
from tsqp.threads import using_threads

# Given a group's name and int32 (M, K) within its exact range, return the int32 (M, N) products, known to be right.
Products = Callable[[str, Tensor], Tensor]


class LocalProducts:
    """Products computed in this process.

    Args:
        codes: int8, shape (N, K), by group.
        threads: CPU threads to compute with.
    """

    def __init__(self, codes: Mapping[str, Tensor], threads: int) -> None:
        self._codes = codes
        self._threads = threads

    def __call__(self, group: str, xq_MK: Tensor) -> Tensor:
        """See ``Products``."""
        with using_threads(self._threads):
            return multiply(xq_MK, self._codes[group])


class ExactOps:
    """A packed model's linear layers with exact products.

    Args:
        packed: the enclave's part of the model.
        products: who multiplies.
        meter: where the time of quantising is counted.
    """

    def __init__(self, packed: PackedEnclave, products: Products, meter: Meter) -> None:
        self._packed = packed
        self._products = products
        self._norms = packed.largest_norms
        self._meter = meter

    def embedding(self, ids_M: Tensor) -> Tensor:
        """See ``LinearOps.embedding``. Always looked up here: a token id cannot be masked."""
        vocabulary = len(self._packed.embedding_VD)
        if ids_M.numel() and not 0 <= int(ids_M.min()) <= int(ids_M.max()) < vocabulary:
            raise InputError(f"a token id lies outside the vocabulary of {vocabulary}.")
        return self._packed.embedding_VD[ids_M].float()

    def linear(self, group: str, x_MK: Tensor) -> Tensor:
        """See ``LinearOps.linear``.

        Raises:
            InputError: an activation is infinite or not a number.
            IntegrityError: a product was wrong.
        """
        with self._meter.span("quantise"):
            xq_MK, scale_M1 = quantize_activations(x_MK, self._norms[group])
        y_MN = self._products(group, xq_MK)
        with self._meter.span("quantise"):
            real_MN = dequantize(y_MN, scale_M1, self._packed.scales[group])
            bias_N = self._packed.biases.get(group)
            return real_MN if bias_N is None else real_MN.add_(bias_N)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``LinearOps.matmul``. Both operands are secret, so nobody else is asked."""
        return torch.matmul(a, b)

    def state(self) -> dict[str, Tensor]:
        """See ``LinearOps.state``."""
        return self._packed.state
