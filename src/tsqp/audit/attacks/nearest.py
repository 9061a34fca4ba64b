"""Token recovery by nearest neighbour: a row of layer 0's input *is* a row of a public table, up to scale.

Shapes: T positions, K hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.audit.public import TokenTable


@dataclass(frozen=True, slots=True)
class Guess:
    """A token per position, int64 (T,), and how much closer it was in cosine than the second best, (T,)."""

    ids_T: Tensor
    margin_T: Tensor


def nearest_tokens(seen_TK: Tensor, table: TokenTable) -> Guess:
    """Return the token whose direction is closest to each row.

    Args:
        seen_TK: rows as observed: floats, or words, which are read as centred integers. Any positive scale per row.
        table: the public vocabulary.

    Returns:
        The guess; a row of zeros gets some token with margin 0.
    """
    # Words lie within 2^31: float64 holds them before they are scaled to unit length.
    x_TK = seen_TK.double()
    x_TK = x_TK / torch.linalg.vector_norm(x_TK, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    best = (x_TK.float() @ table.directions_VD.T).topk(2, dim=1)
    return Guess(best.indices[:, 0], best.values[:, 0] - best.values[:, 1])
