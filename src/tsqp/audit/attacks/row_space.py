"""Membership of tokens in the row space: mixing rows by any matrix A leaves the space that they span as it was.

Shapes: M observed rows, K hidden size, U distinct tokens found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsqp.audit.public import TokenTable

# Distance of a unit vector to the observed space. Measured on the bundled model: below 4e-6 for tokens of the prompt,
# above 0.2 for all others.
MEMBER_DISTANCE = 3e-3
# Singular values below this part of the largest are rounding: float32 leaves 2^-24 per entry.
_RANK_TOLERANCE = 1e-6


def row_space(seen_MK: Tensor) -> Tensor:
    """Return an orthonormal basis of the observed rows' span, float64, shape (rank, K)."""
    x_MK = seen_MK.double()
    x_MK = x_MK / torch.linalg.vector_norm(x_MK, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    _, values, basis = torch.linalg.svd(x_MK, full_matrices=False)
    kept: Tensor = basis[values > _RANK_TOLERANCE * values[:1].clamp_min(torch.finfo(torch.float64).tiny)]
    return kept


def member_tokens(seen_MK: Tensor, table: TokenTable, distance: float = MEMBER_DISTANCE) -> Tensor:
    """Return the vocabulary's tokens that lie in the span of the observed rows.

    With fewer independent rows than K, a vector that is no combination of them lies outside almost surely; with K of
    them the span is everything and the attack says nothing.

    Args:
        seen_MK: A X, or any rows with the same span.
        table: the public vocabulary.
        distance: from a token's unit vector to the span, below which it counts as inside.

    Returns:
        int64 ids in rising order, shape (U,); empty if the span is everything.
    """
    basis_RK = row_space(seen_MK)
    if len(basis_RK) >= seen_MK.shape[1]:
        return torch.empty(0, dtype=torch.int64)
    return table.inside(basis_RK, distance)
