"""Breaks float masks that are used twice: the difference of two messages has no mask in it.

Shapes: T positions, K hidden size, V vocabulary, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsqp.audit.attacks.nearest import nearest_tokens
from tsqp.audit.public import TokenTable

# Tokens kept on either side of a pair. With whitening the right one was always among the best 4 (bundled model).
_CANDIDATES = 64
# Below this part of a typical token's norm, a difference is rounding.
_NO_DIFFERENCE = 1e-3


def with_known_prompt(sent_TK: Tensor, known_sent_TK: Tensor, known_ids_T: Tensor, table: TokenTable) -> Tensor:
    """Recover a prompt when another one under the same masks is known, as to any client of the service.

    Args:
        sent_TK: X + R.
        known_sent_TK: X' + R.
        known_ids_T: the tokens of X'.
        table: the public vocabulary.

    Returns:
        int64 token ids of X, shape (T,).
    """
    clear_TK = sent_TK.double() - known_sent_TK.double() + table.vectors_VD[known_ids_T].double()
    return nearest_tokens(clear_TK, table).ids_T


def token_pairs(first_TK: Tensor, second_TK: Tensor, table: TokenTable) -> tuple[Tensor, Tensor]:
    """Recover two prompts at once from their difference, knowing neither.

    At each position the difference is e_v - e_w. Whitened, the vocabulary's rows are nearly orthogonal, so v is among
    the tokens most aligned with it and w among those most opposed; of these pairs the closest is taken.

    Args:
        first_TK: X + R.
        second_TK: X' + R.
        table: the public vocabulary.

    Returns:
        int64 token ids of both prompts, each (T,); -1 in both where the two have the same token.
    """
    difference_TK = first_TK.double() - second_TK.double()
    whitener_KK = _whitener(table)
    aligned_TV = _whitened_scores(difference_TK, whitener_KK, table)
    ids = [_pair(d_K, aligned_V, table) for d_K, aligned_V in zip(difference_TK.float(), aligned_TV, strict=True)]
    ids_T2 = torch.tensor(ids, dtype=torch.int64).view(-1, 2)
    return ids_T2[:, 0], ids_T2[:, 1]


def _whitener(table: TokenTable) -> Tensor:
    """Return the inverse square root of the vocabulary's covariance, float64."""
    centred_VK = table.vectors_VD - table.vectors_VD.mean(0)
    values, vectors = torch.linalg.eigh((centred_VK.T @ centred_VK).double() / len(table))
    whitener_KK: Tensor = vectors / values.clamp_min(1e-9 * float(values[-1])).sqrt()
    return whitener_KK


def _whitened_scores(difference_TK: Tensor, whitener_KK: Tensor, table: TokenTable) -> Tensor:
    """Return how well each token is aligned with each whitened difference, float32 (T, V)."""
    tokens_VK = (table.vectors_VD - table.vectors_VD.mean(0)) @ whitener_KK.float()
    tokens_VK /= torch.linalg.vector_norm(tokens_VK, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (difference_TK @ whitener_KK).float() @ tokens_VK.T


def _pair(d_K: Tensor, aligned_V: Tensor, table: TokenTable) -> tuple[int, int]:
    """Find the pair with e_v - e_w closest to d, by ||d - e_v + e_w||^2 written out in inner products."""
    if float(torch.linalg.vector_norm(d_K)) < _NO_DIFFERENCE * float(table.norms_V.median()):
        return -1, -1
    count = min(_CANDIDATES, len(table))
    plus_C, minus_C = aligned_V.topk(count).indices, (-aligned_V).topk(count).indices
    plus_CK, minus_CK = table.vectors_VD[plus_C], table.vectors_VD[minus_C]
    plus = plus_CK.square().sum(1) - 2 * plus_CK @ d_K
    minus = minus_CK.square().sum(1) + 2 * minus_CK @ d_K
    error_CC = plus[:, None] + minus - 2 * plus_CK @ minus_CK.T
    best = int(error_CC.argmin())
    return int(plus_C[best // count]), int(minus_C[best % count])
