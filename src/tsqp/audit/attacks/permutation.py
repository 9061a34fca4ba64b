"""Breaks a permutation of tokens: the rows name the tokens, and causality puts them in order.

The input of layer 0's output projection at position t is attention over positions 0 to t. Who knows the first t tokens
computes it for every candidate with the public weights: for the right one, and only for it, a row that was observed
comes out. Nothing links rows of the two groups, so a fresh permutation for each does not help.

Shapes: T positions, C candidates, P prefix with the candidate, N query heads, G key-value heads, H head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsqp.audit.attacks.nearest import nearest_tokens
from tsqp.audit.public import PublicModel


def tokens_in_any_order(qkv_TK: Tensor, public: PublicModel) -> Tensor:
    """Return the tokens of permuted layer-0 inputs, int64 (T,), in the order they were sent in."""
    return nearest_tokens(qkv_TK, public.table).ids_T


def tokens_in_order(qkv_TK: Tensor, attended_TK: Tensor, public: PublicModel) -> Tensor:
    """Recover a prompt from permuted rows.

    Args:
        qkv_TK: inputs of layer 0's q, k and v projections, rows in any order.
        attended_TK: inputs of its output projection, rows in any other order.
        public: the model's weights.

    Returns:
        int64 token ids in the prompt's order, shape (T,).
    """
    left = tokens_in_any_order(qkv_TK, public).tolist()
    rows_RK = attended_TK.float()
    replay = _Replay(torch.tensor(sorted(set(left))), public)
    order: list[int] = []
    while left:
        remaining_C = torch.tensor(sorted(set(left)))
        distance_CR = torch.cdist(replay.next_rows(remaining_C), rows_RK, compute_mode="donot_use_mm_for_euclid_dist")
        best = int(distance_CR.argmin())
        chosen, row = int(remaining_C[best // len(rows_RK)]), best % len(rows_RK)
        replay.extend(chosen)
        order.append(chosen)
        left.remove(chosen)
        rows_RK = torch.cat((rows_RK[:row], rows_RK[row + 1 :]))
    return torch.tensor(order)


class _Replay:
    """Layer 0's attention over a prefix that grows token by token.

    Args:
        vocabulary_U: all token ids that may occur, in rising order.
        public: the model's weights.
    """

    def __init__(self, vocabulary_U: Tensor, public: PublicModel) -> None:
        layer, config = public.first_layer, public.config
        x_UD = public.table.vectors_VD[vocabulary_U]
        self._public = public
        self._ids_U = vocabulary_U
        self._q_UNH = (x_UD @ layer.q_weight.T + layer.q_bias).unflatten(1, (-1, config.head_size))
        self._k_UGH = (x_UD @ layer.k_weight.T + layer.k_bias).unflatten(1, (-1, config.head_size))
        self._v_UGH = (x_UD @ layer.v_weight.T + layer.v_bias).unflatten(1, (-1, config.head_size))
        self._past_k: list[Tensor] = []
        self._past_v: list[Tensor] = []

    def next_rows(self, candidates_C: Tensor) -> Tensor:
        """Compute attention's output at the next position, once for every candidate token there: float32 (C, N H)."""
        config = self._public.config
        at_C = torch.searchsorted(self._ids_U, candidates_C)
        q_CNH, own_k_CGH = self._rotated(self._q_UNH[at_C]), self._rotated(self._k_UGH[at_C])
        repeats = config.heads // config.kv_heads
        keys_CPNH = _with_past(self._past_k, own_k_CGH).repeat_interleave(repeats, dim=2)
        values_CPNH = _with_past(self._past_v, self._v_UGH[at_C]).repeat_interleave(repeats, dim=2)
        scores_CNP = torch.einsum("cnh,cpnh->cnp", q_CNH, keys_CPNH) / math.sqrt(config.head_size)
        return torch.einsum("cnp,cpnh->cnh", scores_CNP.softmax(dim=-1), values_CPNH).flatten(1)

    def extend(self, token: int) -> None:
        """Append a token to the prefix."""
        at = torch.searchsorted(self._ids_U, torch.tensor([token]))
        self._past_k.append(self._rotated(self._k_UGH[at])[0])
        self._past_v.append(self._v_UGH[at][0])

    def _rotated(self, x_CXH: Tensor) -> Tensor:
        return self._public.rotated(x_CXH, torch.tensor([len(self._past_v)]))


def _with_past(past: list[Tensor], own_CGH: Tensor) -> Tensor:
    """Put each candidate's own row behind the prefix's rows: shape (C, P, G, H)."""
    earlier_PGH = torch.stack(past) if past else own_CGH[:0]
    return torch.cat((earlier_PGH[None].expand(len(own_CGH), -1, -1, -1), own_CGH[:, None]), dim=1)
