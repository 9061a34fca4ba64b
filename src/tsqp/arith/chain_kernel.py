"""What follows attention in a layer, up to the next layer's first product, as one checked call of native kernels.

A step of generation has one such chain a layer and one row in each, so what lies around the kernels counts: the
weights' addresses are checked once, when the chain is made, and no tensor is made for a part of another.

Shapes: M rows, K inputs of the first product, D hidden, F FFN, N outputs of the last product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsqp.arith import extension
from tsqp.arith.extension import address, readable_rows, separate_rows, strided
from tsqp.arith.native import PANEL, Kernels
from tsqp.errors import ExactnessError

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


class ChainWeights(NamedTuple):
    """Weights of a chain, in order.

    Attributes:
        o: of K inputs and D outputs.
        norm_D: of the norm after it, float32, contiguous.
        gate_up: of D inputs and 2F outputs.
        down: of F inputs and D outputs.
        next_norm_D: of the norm after it.
        following: of D inputs and N outputs.
    """

    o: Weights
    norm_D: Tensor
    gate_up: Weights
    down: Weights
    next_norm_D: Tensor
    following: Weights


class ChainKernel:
    """Computes a chain with the bits of the kernels one by one.

    With h1 = residual + y1 and h2 = h1 + y2 it is y1 = x Wo^T, y2 = SwiGLU(RMSNorm(h1) Wgu^T) Wd^T and
    z = RMSNorm(h2) Wf^T, each with its bias.

    Args:
        kernels: that multiply floats.
        weights: of the chain.
        eps: the norms'.

    Raises:
        ExactnessError: other dtypes, shapes or layouts.
    """

    def __init__(self, kernels: Kernels, weights: ChainWeights, eps: float) -> None:
        self._held = weights  # addresses stay true as long as these are
        o, norm_D, gate_up, down, next_norm_D, following = weights
        hidden, ffn = o.outputs, gate_up.outputs // 2
        if gate_up.outputs % 2 or down.outputs != hidden:
            raise ExactnessError(
                f"a chain takes as many outputs of down as of o, {hidden}, and gate and up alike, not {down.outputs} "
                f"and {gate_up.outputs}."
            )
        self._sizes = o.panels.shape[1], hidden, ffn, following.outputs
        self._o, self._gate_up = o.addresses(self._sizes[0]), gate_up.addresses(hidden)
        self._down, self._following = down.addresses(ffn), following.addresses(hidden)
        self._norm, self._next_norm = (address(each, torch.float32, hidden) for each in (norm_D, next_norm_D))
        self._eps = eps
        self._level = extension.INSTRUCTION_SETS.index(kernels.instructions)

    def multiply(self, x_MC: Tensor, out: Tensor) -> None:
        """Compute one chain.

        Args:
            x_MC: float32, (M, K + D): x and the residual stream beside it; rows may be of wider ones, and another
                process may change it meanwhile.
            out: float32, (M, 2D + N): y1, y2 and z side by side; rows may be of wider ones, apart from x.

        Raises:
            ExactnessError: other dtypes, shapes or layouts.
        """
        inputs, hidden, ffn, outputs = self._sizes
        rows, threads, x_MC = len(x_MC), torch.get_num_threads(), readable_rows(x_MC)
        x, x_row = strided(x_MC, rows, inputs + hidden), x_MC.stride(0)
        y1, y_row = separate_rows(out, rows, 2 * hidden + outputs), out.stride(0)
        residual, y2, z = x + inputs * _FLOAT, y1 + hidden * _FLOAT, y1 + 2 * hidden * _FLOAT
        own = torch.empty(rows * (2 * hidden + 3 * ffn), dtype=torch.float32)
        sums, normed, gated = (own.data_ptr() + rows * at * _FLOAT for at in (0, hidden, 2 * hidden))
        activated = gated + rows * 2 * ffn * _FLOAT
        multiply, norm, eps, last = (
            extension.module.multiply_floats,
            extension.module.rms_norm,
            self._eps,
            (self._level, threads),
        )
        multiply(x, *self._o, y1, (rows, inputs, hidden), (x_row, y_row), *last)
        norm(residual, y1, sums, self._norm, eps, normed, (rows, hidden), (x_row, y_row), *last)
        multiply(normed, *self._gate_up, gated, (rows, hidden, 2 * ffn), (hidden, 2 * ffn), *last)
        extension.module.swiglu(gated, activated, rows, ffn, *last)
        multiply(activated, *self._down, y2, (rows, ffn, hidden), (ffn, y_row), *last)
        norm(sums, y2, 0, self._next_norm, eps, normed, (rows, hidden), (hidden, y_row), *last)
        multiply(normed, *self._following, z, (rows, hidden, outputs), (hidden, y_row), *last)
