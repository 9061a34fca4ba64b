"""Pairs of linear groups with a residual sum and a norm between them: what ends a block of a layer and begins the next.

A worker at `open` computes such a pair for one request, which saves a round trip. Nothing becomes known to it by that:
it computes every product that is added to the residual stream, and the embedding that the stream begins with.

Shapes: M rows, K inputs of the first group, D hidden, N outputs of the second, C = K + D.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from tsqp.arith.pair_kernel import PairKernel
from tsqp.errors import InputError
from tsqp.model.architecture import LinearGroup, norm_before, pair_name
from tsqp.model.layers import rms_norm_of_sum
from tsqp.model.linears import Linears, bound_result, memory_errors


@dataclass(frozen=True, slots=True)
class Pair:
    """Two groups of which the second reads the norm of the residual stream with the first one's product added.

    Attributes:
        first: its product has D columns.
        second: reads D columns.
        norm_D: weights of the norm before the second, float32 on the device.
        kernel: what computes all of it for float32 on the CPU, if there is such a one.
    """

    first: LinearGroup
    second: LinearGroup
    norm_D: Tensor
    kernel: PairKernel | None = None

    @property
    def name(self) -> str:
        """What the pair is called where a group has its name."""
        return pair_name(self.first.name, self.second.name)

    @property
    def widths(self) -> tuple[int, int]:
        """Columns that are read, C, and columns that are returned, D + N."""
        return self.first.in_features + self.first.rows, self.first.rows + self.second.rows


class LinearPairs:
    """All pairs of a model.

    Args:
        linears: the model's large weights.
        state: its norm weights by checkpoint name, float32. Pairs around a norm that is not among them are left out.
    """

    def __init__(self, linears: Linears, state: dict[str, Tensor]) -> None:
        self._linears = linears
        self._pairs: dict[tuple[str, str], Pair] = {}
        for first, second in pairwise(linears.groups.values()):
            norm = norm_before(second.name)
            if norm in state and norm_before(first.name) is None:
                norm_D = state[norm].to(linears.device)
                kernel = linears.pair_kernel(first, norm_D, second)
                self._pairs[first.name, second.name] = Pair(first, second, norm_D, kernel)
        self.by_name = {pair.name: pair for pair in self._pairs.values()}

    def check(self, names: tuple[str, str], dtype: torch.dtype, shape: tuple[int, ...]) -> Pair:
        """Return the pair of two groups if it can be computed for a tensor.

        Raises:
            InputError: no such pair, the tensor has another shape, or the result would be too large.
        """
        pair = self._pairs.get(names)
        if pair is None:
            raise InputError(f"no pair of linear groups is {names[0]!r} and {names[1]!r}.")
        columns, results = pair.widths
        if len(shape) != 2 or shape[1] != columns or not dtype.is_floating_point:  # noqa: PLR2004
            raise InputError(f"linear {pair.name} expects floats of shape [M, {columns}], got {dtype} {list(shape)}.")
        bound_result((shape[0], results))
        return pair

    def multiply(self, name: str, x_MC: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute a pair's products.

        Args:
            name: a pair's.
            x_MC: what the first group reads, and the residual stream beside it; any float dtype and device.
            out: where to store the result, shape (M, D + N); by default new memory.

        Returns:
            The first product, and beside it the second; in the weights' dtype, on this device.

        Raises:
            DeviceMemoryError: the device has no room.
        """
        pair, linears = self.by_name[name], self._linears
        with memory_errors(f"linear {name}", linears.device):
            if out is None:
                out = torch.empty(len(x_MC), pair.widths[1], dtype=linears.dtype, device=linears.device)
            if pair.kernel and x_MC.dtype == torch.float32:
                pair.kernel.multiply(x_MC, out)
            else:
                self._multiply(pair, x_MC, out)
            return out

    @torch.inference_mode()
    def _multiply(self, pair: Pair, x_MC: Tensor, out: Tensor) -> None:
        x_MK, residual_MD = self._parts(pair, x_MC.to(self._linears.device))
        first_MD = self._linears.multiply(pair.first.name, x_MK, out[:, : pair.first.rows])
        normed_MD = self._normed(residual_MD, first_MD, pair.norm_D)
        self._linears.multiply(pair.second.name, normed_MD, out[:, pair.first.rows :])

    @torch.inference_mode()
    def inputs(self, name: str, x_MC: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the first group of a pair reads, and what the second one reads."""
        pair = self.by_name[name]
        x_MK, residual_MD = self._parts(pair, x_MC)
        return x_MK, self._normed(residual_MD, self._linears.multiply(pair.first.name, x_MK), pair.norm_D)

    @staticmethod
    def _parts(pair: Pair, x_MC: Tensor) -> tuple[Tensor, Tensor]:
        x_MK, residual_MD = x_MC.split((pair.first.in_features, pair.first.rows), dim=1)
        return x_MK, residual_MD

    def _normed(self, residual_MD: Tensor, added_MD: Tensor, norm_D: Tensor) -> Tensor:
        """Return the norm of a sum, float32: on the CPU with the bits that the enclave computes for itself."""
        eps = self._linears.config.rms_norm_eps
        if self._linears.device.type != "cpu":
            return functional.rms_norm(residual_MD.float() + added_MD.float(), norm_D.shape, norm_D, eps)
        return rms_norm_of_sum(residual_MD.float(), added_MD.float(), norm_D, eps)
