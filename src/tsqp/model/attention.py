"""Causal self-attention of one prompt. It stays in the enclave unless its two products are sent out on request.

Shapes: B batch, T tokens, N query heads, G key-value heads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

MatMul = Callable[[Tensor, Tensor], Tensor]


def causal_attention(q_BTNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(H)) v with a causal mask, shape (B, T, N*H).

    Key-value heads serve N/G query heads each (grouped-query attention, Ainslie et al. 2023).
    """
    y_BNTH = functional.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BTGH.transpose(1, 2),
        v_BTGH.transpose(1, 2),
        is_causal=True,
        enable_gqa=k_BTGH.shape[2] != q_BTNH.shape[2],
    )
    return y_BNTH.transpose(1, 2).flatten(2)


def offloaded_attention(q_BTNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, matmul: MatMul) -> Tensor:
    """Compute the same with both products done by ``matmul``; mask and softmax stay here.

    The worker then sees queries, keys, attention weights and values in clear: for `open` only.
    """
    heads, tokens, head_size = q_BTNH.shape[2], q_BTNH.shape[1], q_BTNH.shape[3]
    repeats = heads // k_BTGH.shape[2]
    k_BNTH = k_BTGH.transpose(1, 2).repeat_interleave(repeats, dim=1)
    v_BNTH = v_BTGH.transpose(1, 2).repeat_interleave(repeats, dim=1)
    scores_BNTT = matmul(q_BTNH.transpose(1, 2) / math.sqrt(head_size), k_BNTH.transpose(2, 3))
    future_TT = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights_BNTT = scores_BNTT.masked_fill(future_TT, -math.inf).softmax(dim=-1)
    return matmul(weights_BNTT, v_BNTH).transpose(1, 2).flatten(2)
