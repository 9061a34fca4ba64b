"""Activations in eight bits and one scale per token, for links of the level `open` that are slow.

A row of K numbers travels as K + 4 bytes: int8 codes, then the scale as float32, little-endian. It loses more than the
float dtypes do (docs/tuning.md has the errors, docs/protocol.md the format). Beside it may lie a row of the residual
stream in bfloat16: with one scale per token the few large values of that stream would leave nothing of the others.

Shapes: M rows, K columns, P = K + 4 bytes of a row, D columns of the residual stream, C = P + 2D bytes of both, N
columns of some parts together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tsqp.errors import ProtocolError

SCALE_BYTES = 4
# Of a number of the residual stream.
STREAM_BYTES = 2
_MAX_CODE = 127


def encode(x_MK: Tensor) -> Tensor:
    """Round each row to multiples of its largest magnitude / 127.

    Args:
        x_MK: floats. A row with an infinity or a NaN comes out as NaN.

    Returns:
        int8, shape (M, P).
    """
    x_MK = x_MK.float()
    scale_M1 = x_MK.abs().amax(dim=1, keepdim=True) / _MAX_CODE
    divisor_M1 = torch.where(scale_M1 > 0, scale_M1, torch.ones_like(scale_M1))
    codes_MK = (x_MK / divisor_M1).nan_to_num_(0.0).round_().clamp_(-_MAX_CODE, _MAX_CODE).to(torch.int8)
    # Of no rows a result has strides that cannot be viewed as bytes; a copy has none of those.
    finite_M1 = torch.where(scale_M1.isfinite(), scale_M1, torch.nan).clone(memory_format=torch.contiguous_format)
    return torch.cat((codes_MK, finite_M1.view(torch.int8)), dim=1)


def encode_parts(y_MN: Tensor, sizes: Sequence[int]) -> Tensor:
    """Encode parts of rows, each with scales of its own, side by side.

    Args:
        y_MN: floats.
        sizes: columns of each part, N together.

    Returns:
        int8, shape (M, N + 4 for each part).
    """
    return torch.cat([encode(part) for part in y_MN.split(list(sizes), dim=1)], dim=1)


def encode_beside(x_MK: Tensor, residual_MD: Tensor) -> Tensor:
    """Encode rows, and beside each its row of the residual stream: int8, shape (M, C)."""
    stream_MD = residual_MD.to(torch.bfloat16).contiguous()
    return torch.cat((encode(x_MK), stream_MD.view(torch.int8)), dim=1)


def decode_beside(rows_MC: Tensor, hidden: int) -> Tensor:
    """Return the float32 numbers that ``encode_beside`` encoded, shape (M, K + D).

    Args:
        rows_MC: int8; at any address.
        hidden: D.
    """
    coded_MP, stream = rows_MC.split((rows_MC.shape[1] - STREAM_BYTES * hidden, STREAM_BYTES * hidden), dim=1)
    stream_MD = stream.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
    return torch.cat((decode(coded_MP), stream_MD.float()), dim=1)


def decode(rows_MP: Tensor) -> Tensor:
    """Return the float32 numbers, shape (M, K), that rows stand for: code times scale.

    Raises:
        ProtocolError: no rows of int8, or rows without room for a scale.
    """
    if rows_MP.dtype != torch.int8 or rows_MP.ndim != 2 or rows_MP.shape[1] <= SCALE_BYTES:  # noqa: PLR2004
        raise ProtocolError(
            f"int8 activations are rows of codes and 4 bytes of scale, not {rows_MP.dtype} {list(rows_MP.shape)}."
        )
    codes_MK, scale_M4 = rows_MP.split((rows_MP.shape[1] - SCALE_BYTES, SCALE_BYTES), dim=1)
    # A copy of its own: a view of four bytes within a row is not aligned.
    scale_M1: Tensor = scale_M4.clone(memory_format=torch.contiguous_format).view(torch.float32)
    x_MK: Tensor = codes_MK.float() * scale_M1
    return x_MK
