"""Causal self-attention. It stays in the enclave unless its two products are sent out on request.

Shapes: B batch, T tokens that ask, S tokens that are looked at (the last T of them are those that ask), N query heads,
G key-value heads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from tsqp.arith import native

MatMul = Callable[[Tensor, Tensor], Tensor]

# Queries at a time: each block looks at the keys up to its own end, and none of the later half of a long prompt is
# multiplied for nothing. Of 16 to 256 this was the fastest, for prompts from 128 tokens (docs/performance.md).
_BLOCK = 64


# The native kernel computes so many queries at a time; for fewer, as in decode, PyTorch's operator is faster.
_LANES = 16


def causal_mask(tokens: int, total: int) -> Tensor:
    """Return what is added to the scores of the last ``tokens`` of ``total``: 0, or -inf for later tokens; (T, S)."""
    return torch.full((tokens, total), -math.inf).triu(total - tokens + 1)


@cache
def _block_mask(total: int) -> Tensor:
    """Return ``causal_mask`` of a block; that of fewer tokens, or with fewer before them, is its lower right part."""
    return causal_mask(_BLOCK, total)


def causal_attention(q_BTNH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, wanted: int) -> Tensor:
    """Return softmax(q k^T / sqrt(H)) v with a causal mask for the last tokens, shape (B, wanted, N*H).

    Key-value heads serve N/G query heads each (grouped-query attention, Ainslie et al. 2023).

    Args:
        q_BTNH: queries of the last T tokens.
        k_BGSH: keys of all S.
        v_BGSH: values of all S.
        wanted: for how many of the T tokens. Their results are the same bits, however many they are.
    """
    tokens, total = q_BTNH.shape[1], k_BGSH.shape[2]
    kernels = native.kernels()
    if kernels and kernels.attends and tokens >= _LANES:
        y_BTNH = torch.empty(len(q_BTNH), wanted, *q_BTNH.shape[2:])
        kernels.attend(q_BTNH[:, tokens - wanted :], k_BGSH, v_BGSH, y_BTNH)
        return y_BTNH.flatten(2)
    mask = _block_mask(max(_BLOCK, 1 << (total - 1).bit_length()))
    y_BTNH = torch.empty_like(q_BTNH, memory_format=torch.contiguous_format)
    for first in range((tokens - wanted) // _BLOCK * _BLOCK, tokens, _BLOCK):
        end = min(tokens, first + _BLOCK)
        seen = total - tokens + end
        y_BNTH = functional.scaled_dot_product_attention(
            q_BTNH[:, first:end].transpose(1, 2),
            k_BGSH[:, :, :seen],
            v_BGSH[:, :, :seen],
            attn_mask=mask[_BLOCK - (end - first) :, mask.shape[1] - seen :],
            enable_gqa=k_BGSH.shape[1] != q_BTNH.shape[2],
        )
        y_BTNH[:, first:end] = y_BNTH.transpose(1, 2)
    return y_BTNH[:, tokens - wanted :].flatten(2)


def offloaded_attention(q_BTNH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, wanted: int, matmul: MatMul) -> Tensor:
    """Compute the same with both products done by ``matmul``, for all T tokens; mask and softmax stay here.

    The worker then sees queries, keys, attention weights and values in clear: for `open` only.
    """
    tokens, heads, head_size = q_BTNH.shape[1:]
    repeats = heads // k_BGSH.shape[1]
    k_BNSH, v_BNSH = k_BGSH.repeat_interleave(repeats, dim=1), v_BGSH.repeat_interleave(repeats, dim=1)
    scores_BNTS = matmul(q_BTNH.transpose(1, 2) / math.sqrt(head_size), k_BNSH.transpose(2, 3))
    weights_BNTS = scores_BNTS.add(causal_mask(tokens, k_BNSH.shape[2])).softmax(dim=-1)
    return matmul(weights_BNTS, v_BNSH).transpose(1, 2)[:, tokens - wanted :].flatten(2)
