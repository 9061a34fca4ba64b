"""Two float32 products with the RMSNorm between them, as one checked call of three native kernels.

A step of generation has two such pairs a layer and one row in each, so what lies around the kernels counts: the
weights' addresses are checked once, when the pair is made, and no tensor is made for a part of another.

Shapes: M rows, K inputs of the first product, D its outputs and the residual stream, N outputs of the second.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsqp.arith import extension
from tsqp.arith.extension import address, readable_rows, separate_rows, strided
from tsqp.arith.native import PANEL, Kernels

_FLOAT = torch.float32.itemsize


class Weights(NamedTuple):
    """Weights of one product.

    Attributes:
        panels: float32, shape (P, inputs, 16), contiguous; see ``arith/panels.py``.
        bias_N: float32, or None.
        outputs: how many there are.
    """

    panels: Tensor
    bias_N: Tensor | None
    outputs: int

    def addresses(self, inputs: int) -> tuple[int, int]:
        """Return where panels of so many inputs and bias lie; 0 for no bias.

        Raises:
            ExactnessError: other dtypes, shapes or layouts.
        """
        bias_N = self.bias_N
        return (
            address(self.panels, torch.float32, -(-self.outputs // PANEL), inputs, PANEL),
            0 if bias_N is None else address(bias_N, torch.float32, self.outputs),
        )


class PairKernel:
    """Computes y1 = x W1^T + b1 and y2 = RMSNorm(residual + y1) W2^T + b2, with the bits of the kernels one by one.

    Args:
        kernels: that multiply floats.
        first: the first product's weights.
        norm_D: the norm's, float32, contiguous.
        eps: the norm's.
        second: the second product's weights, which reads D inputs.

    Raises:
        ExactnessError: other dtypes, shapes or layouts.
    """

    def __init__(self, kernels: Kernels, first: Weights, norm_D: Tensor, eps: float, second: Weights) -> None:
        self._held = first, norm_D, second  # addresses stay true as long as these are
        self._sizes = first.panels.shape[1], first.outputs, second.outputs
        self._first, self._second = first.addresses(self._sizes[0]), second.addresses(first.outputs)
        self._norm, self._eps = address(norm_D, torch.float32, first.outputs), eps
        self._level = extension.INSTRUCTION_SETS.index(kernels.instructions)

    def multiply(self, x_MC: Tensor, out: Tensor) -> None:
        """Compute one pair.

        Args:
            x_MC: float32, (M, K + D): x and the residual stream beside it; rows may be of wider ones, and another
                process may change it meanwhile.
            out: float32, (M, D + N): y1 and y2 beside it; rows may be of wider ones, apart from x.

        Raises:
            ExactnessError: other dtypes, shapes or layouts.
        """
        inputs, hidden, outputs = self._sizes
        rows, level, threads = len(x_MC), self._level, torch.get_num_threads()
        x_MC = readable_rows(x_MC)
        x, x_row = strided(x_MC, rows, inputs + hidden), x_MC.stride(0)
        y, y_row = separate_rows(out, rows, hidden + outputs), out.stride(0)
        normed_MD = torch.empty(rows, hidden)
        normed, module = normed_MD.data_ptr(), extension.module
        module.multiply_floats(x, *self._first, y, (rows, inputs, hidden), (x_row, y_row), level, threads)
        residual = x + inputs * _FLOAT
        module.rms_norm(residual, y, 0, self._norm, self._eps, normed, (rows, hidden), (x_row, y_row), level, threads)
        second = y + hidden * _FLOAT
        module.multiply_floats(normed, *self._second, second, (rows, hidden, outputs), (hidden, y_row), level, threads)
