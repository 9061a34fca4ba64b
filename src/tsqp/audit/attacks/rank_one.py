"""Breaks rank-1 blinding: sent = M X with M = D + a b', D diagonal, a and b secret and kept for the run.

Rows mix tokens: only then does the enclave get X W back from the worker's M X W, by inverting M in O(T) operations
(Sherman and Morrison 1950). One message is enough. The row space of M X is that of X, so membership gives the
distinct tokens E (U, K). Coordinates in that basis are M P, with P (T, U) one-hot: row t is d_t at its own token plus
a_t (b' P). Off its own token, every row is a multiple of the same c = b' P. The one entry that is not is the token.

Shapes: T positions, K hidden size, U distinct tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsqp.audit.attacks.row_space import member_tokens
from tsqp.audit.public import TokenTable

# With fewer distinct tokens the common part of the rows cannot be told from the tokens' own.
MIN_DISTINCT = 4


def tokens_in_order(seen_TK: Tensor, table: TokenTable) -> Tensor:
    """Recover the prompt from one rank-1 blinded layer-0 input.

    Args:
        seen_TK: (D + a b') X, float32.
        table: the public vocabulary.

    Returns:
        int64 token ids, shape (T,); all -1 if fewer than ``MIN_DISTINCT`` tokens lie in the row space.
    """
    ids_U = member_tokens(seen_TK, table)
    if len(ids_U) < MIN_DISTINCT:
        return torch.full((len(seen_TK),), -1)
    tokens_UK = table.vectors_VD[ids_U].double()
    coordinates_TU = torch.linalg.lstsq(tokens_UK.T, seen_TK.double().T).solution.T
    return ids_U[own_token(coordinates_TU)]


def own_token(coordinates_TU: Tensor) -> Tensor:
    """Find, in rows that are a_t c plus one entry each, which entry it is.

    The multiple of one row in another is the median of their entries' ratios: at most two entries disturb it. From the
    rows a common c is put together, entry by entry, by a median again; few rows share a token.

    Args:
        coordinates_TU: float64.

    Returns:
        int64 column per row, shape (T,).
    """
    pivot_U = coordinates_TU[_typical_row(coordinates_TU)]
    scale_T1 = (coordinates_TU / pivot_U).nanmedian(dim=1, keepdim=True).values
    # Medians over rows: entry u of c is disturbed only in rows whose own token is u, and in the pivot.
    common_U = (coordinates_TU / scale_T1).nanmedian(dim=0).values
    scale_T1 = (coordinates_TU / common_U).nanmedian(dim=1, keepdim=True).values
    return (coordinates_TU - scale_T1 * common_U).abs().argmax(dim=1)


def _typical_row(coordinates_TU: Tensor) -> int:
    """Choose the row with the largest median entry: its multiple of c stands out most from rounding."""
    return int(coordinates_TU.abs().median(dim=1).values.argmax())
