"""int8 weights, and activations scaled so that no product can leave the centred range of 32 bits.

Shapes: M rows, K inputs, N outputs. docs/arithmetic.md has the proof.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tsqp.arith import native
from tsqp.arith.native import Scaling
from tsqp.errors import ExactnessError, InputError, WeightsError

# The largest integer that a centred residue stands for.
L = (1 << 31) - 1
_MAX_CODE = 127
# Elements squared at a time in ``largest_norm``, 4 MiB as int32.
_NORM_BLOCK = 1 << 20
# float64's relative error in ||x||, s_x and the quotient together is at most (K/16 + 16) 2^-53; times L it is below 1/8
# (docs/arithmetic.md, "Exact range").
MAX_K = 1 << 22
# The squares of a row are summed in this many lanes.
_LANES = 16


def quantize_weights(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Round each output channel to int8, symmetrically: W_j ~ s_j Wq_j.

    Args:
        w_NK: float weights.

    Returns:
        int8 codes in [-127, 127], shape (N, K), and float32 scales, shape (N,); a channel of zeros has scale 1.

    Raises:
        WeightsError: a weight is infinite or not a number.
    """
    w_NK = w_NK.float()
    largest_N = w_NK.abs().amax(dim=1)
    if not torch.isfinite(largest_N).all():
        raise WeightsError("a weight is infinite or not a number; the model's file is damaged.")
    scale_N = torch.where(largest_N > 0, largest_N / _MAX_CODE, torch.ones_like(largest_N))
    # Of a channel of denormals the quotient may round above the largest code, or the scale to zero.
    scale_N = scale_N.clamp_min(torch.finfo(torch.float32).tiny)
    codes_NK = (w_NK / scale_N[:, None]).round_().clamp_(-_MAX_CODE, _MAX_CODE)
    return codes_NK.to(torch.int8), scale_N


def largest_norm(codes_NK: Tensor) -> float:
    """Return B, the largest Euclidean norm of a row of codes, rounded up.

    The sum of squares is an integer of at most K 127^2 < 2^53, exact in float64, and so is its square root but for one
    rounding.
    """
    if not codes_NK.numel():
        return 0.0
    rows = max(1, _NORM_BLOCK // codes_NK.shape[1])
    squares = max(
        int(block.to(torch.int32).square_().sum(dim=1, dtype=torch.int64).max()) for block in codes_NK.split(rows)
    )
    return math.nextafter(math.sqrt(squares), math.inf) if squares else 0.0


def quantize_activations(x_MK: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Scale each row by its own s_x and round: x_i ~ s_x xq_i, with |xq . Wq_j| <= L for every row j of the codes.

        s_x = ||x|| B / (L - B sqrt(K) / 2)

    By Cauchy-Schwarz |xq . Wq_j| <= (||x|| / s_x + sqrt(K) / 2) B = L. Rounding in float64 adds less than 1, and an
    integer below L + 1 is at most L.

    The native kernel and its twin in PyTorch give the same bits: squares of float32 are exact in float64; element i
    is summed in lane i mod 16, from first to last, then lanes l and l + 8, l + 4, l + 2 and l + 1; a row is multiplied
    by one rounded 1 / s_x; halves go to the even integer. With ||x|| in [2^-149, 2^139] and B in [1, L] nothing under-
    or overflows.

    Args:
        x_MK: float32 activations.
        largest: B of the codes they meet, from ``largest_norm``: 0, or at least 1 since codes are integers.

    Returns:
        int32 integers, shape (M, K), and float64 scales, shape (M, 1). Where ||x|| or B is 0: zeros, and scale 1.

    Raises:
        InputError: an activation is infinite or not a number.
        ExactnessError: K or B is too large for the bound, or x is not float32 of two dimensions.
    """
    if (x_MK.dtype, x_MK.ndim) != (torch.float32, 2):
        raise ExactnessError(f"activations of {x_MK.dtype} {list(x_MK.shape)}: expected float32 [M, K].")
    inputs = x_MK.shape[1]
    room = L - largest * math.sqrt(inputs) / 2
    if inputs > MAX_K or room < 1 or 0 < largest < 1:
        raise ExactnessError(f"rows of {inputs} inputs and codes of norm {largest:.0f} leave no exact range.")
    kernels = native.kernels()
    scaled = kernels.quantize(x_MK, largest / room) if kernels else _quantize(x_MK, largest / room)
    xq_MK, scale_M1, failures = scaled
    if failures:
        raise InputError("an activation is infinite or not a number; it cannot be quantised.")
    return xq_MK, scale_M1


def _quantize(x_MK: Tensor, factor: float) -> tuple[Tensor, Tensor, int]:
    """Do what ``Kernels.quantize`` does, in PyTorch."""
    x_MK = x_MK.double()
    # NumPy's root is IEEE's; PyTorch's may come from a library whose last bit differs.
    norm_M1 = torch.from_numpy(np.sqrt(_lane_sums(x_MK.square()).numpy()))
    scale_M1 = norm_M1 * factor
    scale_M1 = torch.where(scale_M1 > 0, scale_M1, torch.ones_like(scale_M1))
    inverse_M1 = scale_M1.reciprocal() if factor else torch.zeros_like(scale_M1)
    failures = int(torch.isfinite(norm_M1).logical_not_().count_nonzero())
    xq_MK = (x_MK * inverse_M1).round_() if not failures else torch.zeros_like(x_MK)
    return xq_MK.to(torch.int32), scale_M1, failures


def _lane_sums(squares_MK: Tensor) -> Tensor:
    """Sum rows in the stated order: float64, shape (M, 1). A running sum adds from first to last."""
    rows, inputs = squares_MK.shape
    if not inputs:
        return squares_MK.new_zeros(rows, 1)
    lanes_MBL = functional.pad(squares_MK, (0, -inputs % _LANES)).unflatten(1, (-1, _LANES))
    lanes_ML: Tensor = lanes_MBL.cumsum(dim=1)[:, -1]
    while (half := lanes_ML.shape[1] // 2) > 0:
        lanes_ML = lanes_ML[:, :half] + lanes_ML[:, half:]
    return lanes_ML


def dequantize(y_MN: Tensor, scaling: Scaling, out_MN: Tensor | None = None) -> Tensor:
    """Return the real products that integers stand for: y s_x s_j (+ bias), in float32, each operation rounded.

    Args:
        y_MN: int32 integers.
        scaling: s_x, s_j and the bias.
        out_MN: where to store them: float32, contiguous, such as y's own memory (``y_MN.view(torch.float32)``). By
            default new memory.

    Returns:
        float32, shape (M, N).
    """
    kernels = native.kernels()
    if kernels:
        out_MN = torch.empty(y_MN.shape, dtype=torch.float32) if out_MN is None else out_MN
        kernels.dequantize(y_MN, scaling, out_MN)
        return out_MN
    real_MN = y_MN.float().mul_(scaling.rows_M1.float()).mul_(scaling.columns_N)
    if scaling.bias_N is not None:
        real_MN += scaling.bias_N
    return real_MN if out_MN is None else out_MN.copy_(real_MN)
