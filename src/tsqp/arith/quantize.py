"""int8 weights, and activations scaled so that no product can leave the centred range of 32 bits.

Shapes: M rows, K inputs, N outputs. docs/arithmetic.md has the proof.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsqp.errors import ExactnessError, InputError, WeightsError

# The largest integer that a centred residue stands for.
L = (1 << 31) - 1
_MAX_CODE = 127
# Elements squared at a time in ``largest_norm``, 4 MiB as int32.
_NORM_BLOCK = 1 << 20
# float64's relative error in ||x||, s_x and the quotient together is at most (K + 8) 2^-53; times L it stays below 1.
MAX_K = (1 << 22) - 9


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

    Args:
        x_MK: float32 activations.
        largest: B of the codes they meet, from ``largest_norm``.

    Returns:
        int32 integers, shape (M, K), and float64 scales, shape (M, 1). Where ||x|| or B is 0: zeros, and scale 1.

    Raises:
        InputError: an activation is infinite or not a number.
        ExactnessError: K or B is too large for the bound.
    """
    inputs = x_MK.shape[-1]
    room = L - largest * math.sqrt(inputs) / 2
    if inputs > MAX_K or room <= 0:
        raise ExactnessError(f"rows of {inputs} inputs and codes of norm {largest:.0f} leave no exact range.")
    norm_M1 = torch.linalg.vector_norm(x_MK, dim=-1, keepdim=True, dtype=torch.float64)
    if not torch.isfinite(norm_M1).all():
        raise InputError("an activation is infinite or not a number; it cannot be quantised.")
    scale_M1 = norm_M1 * (largest / room)
    scale_M1 = torch.where(scale_M1 > 0, scale_M1, torch.ones_like(scale_M1))
    if not largest:
        return torch.zeros(x_MK.shape, dtype=torch.int32, device=x_MK.device), scale_M1
    return torch.div(x_MK, scale_M1).round_().to(torch.int32), scale_M1


def dequantize(y_MN: Tensor, scale_M1: Tensor, scale_N: Tensor) -> Tensor:
    """Return the real products that integers stand for: y s_x s_j.

    Args:
        y_MN: int32 integers.
        scale_M1: of the activations, float64.
        scale_N: of the weights, float32.

    Returns:
        float32, shape (M, N).
    """
    return y_MN.float().mul_(scale_M1.float()).mul_(scale_N)
