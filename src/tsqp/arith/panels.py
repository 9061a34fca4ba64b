"""Float32 products on the CPU by ``native/float_gemm.c``, and weights as it reads them.

Each element is fma(x[k], w[k], sum) for k from 0 upwards, beginning with the bias or 0. So a row's result has the same
bits whatever rows are multiplied with it, on any number of threads, and with any of the instruction sets that have it.
It is within (K + 1) 2^-24 sum |x w| of the exact sum, like every order of float32 additions (Higham 2002, section 3.1).

Shapes: M rows, K inputs, N outputs, P panels of 16 outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsqp.arith import native


def kernels_for(dtype: torch.dtype, device: torch.device) -> native.Kernels | None:
    """Return the kernels if they multiply this dtype on this device; if not, PyTorch's libraries do."""
    found = native.kernels() if dtype == torch.float32 and device.type == "cpu" else None
    return found if found and found.multiplies_floats else None


def lay_out(w_NK: Tensor) -> Tensor:
    """Copy float32 weights into panels, shape (P, K, 16), with zeros for outputs beyond N."""
    outputs, inputs = w_NK.shape
    whole, rest = divmod(outputs, native.PANEL)
    panels = torch.empty(whole + bool(rest), inputs, native.PANEL)
    panels[:whole] = w_NK[: whole * native.PANEL].view(whole, native.PANEL, inputs).transpose(1, 2)
    if rest:
        panels[whole].zero_()[:, :rest] = w_NK[whole * native.PANEL :].T
    return panels


def plain(panels: Tensor, outputs: int) -> Tensor:
    """Copy panels back into weights of shape (N, K)."""
    count, inputs, width = panels.shape
    return panels.transpose(1, 2).reshape(count * width, inputs)[:outputs]


def rows(panels: Tensor, index_M: Tensor) -> Tensor:
    """Copy some rows of the weights out of panels, shape (M, K)."""
    return panels[index_M // native.PANEL, :, index_M % native.PANEL]
