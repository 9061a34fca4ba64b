"""Breaks diagonal scaling of queries and keys: q' = q D, k' = k D^-1 keeps every product q_i k_i as it was.

The scheme has to leave the scores q' k'^T right, so whatever D is, of either sign, fresh for every call and head, it
cancels in q'_i k'_i. At position t that vector is a public function of the token: rotate the vocabulary's queries and
keys to t, multiply, and take the nearest. A few heads choose candidates, all heads decide.

Shapes: T positions, N query heads, G key-value heads, H head size, V vocabulary, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsqp.audit.public import PublicModel

_CANDIDATES = 64


def tokens_in_order(q_TNH: Tensor, k_TNH: Tensor, public: PublicModel) -> Tensor:
    """Recover a prompt from layer 0's scaled queries and keys, both after rotary embedding.

    Args:
        q_TNH: queries as sent, up to one positive factor.
        k_TNH: keys as sent, repeated for every query head.
        public: the model's weights.

    Returns:
        int64 token ids, shape (T,).
    """
    features_TNH = q_TNH.double() * k_TNH.double()
    everyone = torch.arange(len(public.table))
    first_head = _HeadTable(public, everyone, heads=1)
    found = []
    for position, feature_NH in enumerate(features_TNH):
        scores_V = first_head.scores(feature_NH[:1], position)
        shortlist = scores_V.topk(min(_CANDIDATES, len(scores_V))).indices
        scores_C = _HeadTable(public, shortlist, public.config.heads).scores(feature_NH, position)
        found.append(int(shortlist[scores_C.argmax()]))
    return torch.tensor(found)


class _HeadTable:
    """Queries and keys of some tokens for the first heads, before rotation."""

    def __init__(self, public: PublicModel, ids_C: Tensor, heads: int) -> None:
        layer, size = public.first_layer, public.config.head_size
        repeats = public.config.heads // public.config.kv_heads
        kv_heads = -(-heads // repeats)
        x_CD = public.table.vectors_VD[ids_C]
        q = x_CD @ layer.q_weight[: heads * size].T + layer.q_bias[: heads * size]
        k = x_CD @ layer.k_weight[: kv_heads * size].T + layer.k_bias[: kv_heads * size]
        self._q_CNH = q.unflatten(1, (-1, size))
        self._k_CNH = k.unflatten(1, (-1, size)).repeat_interleave(repeats, dim=1)[:, :heads]
        self._public = public

    def scores(self, feature_NH: Tensor, position: int) -> Tensor:
        """Return the cosine of each token's product vector at a position with the observed one, shape (C,)."""
        # Every token is turned by the same angles: only cosines and sines of one position are needed.
        at = torch.tensor([position])
        product = self._public.rotated(self._q_CNH, at) * self._public.rotated(self._k_CNH, at)
        flat = product.flatten(1)
        norms: Tensor = torch.linalg.vector_norm(flat, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        target = feature_NH.flatten() / torch.linalg.vector_norm(feature_NH).clamp_min(1e-300)
        scores_C: Tensor = (flat @ target.float()) / norms
        return scores_C
