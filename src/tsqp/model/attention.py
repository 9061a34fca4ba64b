"""Causal self-attention. It stays in the enclave unless its two products are sent out on request.

Shapes: B batch, T tokens that ask, S tokens that are looked at (the last T of them are those that ask), M rows of a
step, N query heads, G key-value heads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from tsqp.arith import native
from tsqp.arith.paging import BLOCK_TOKENS, Segments
from tsqp.model.layers import Angles, rotate_rows
from tsqp.threads import using_threads

__all__ = [
    "BLOCK_TOKENS",
    "MatMul",
    "Segments",
    "causal_attention",
    "causal_mask",
    "keep",
    "offloaded_attention",
    "paged_attention",
]

MatMul = Callable[[Tensor, Tensor], Tensor]

# Queries at a time: each block looks at the keys up to its own end, and none of the later half of a long prompt is
# multiplied for nothing. Of 16 to 256 this was the fastest, for prompts from 128 tokens (docs/performance.md).
_BLOCK = 64


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
    tokens = q_BTNH.shape[1]
    kernels = native.kernels()
    if kernels and kernels.attends:
        y_BTNH = torch.empty(len(q_BTNH), wanted, *q_BTNH.shape[2:])
        kernels.attend(q_BTNH[:, tokens - wanted :], k_BGSH, v_BGSH, y_BTNH)
        return y_BTNH.flatten(2)
    return _by_operators(q_BTNH, k_BGSH, v_BGSH, wanted).flatten(2)


def keep(qkv_MXH: Tensor, angles: Angles, pool: Tensor, segments: Segments) -> None:
    """Rotate the queries and keys of a step's rows in place, and store keys and values in a layer's pool.

    Args:
        qkv_MXH: N queries, G keys and G values of each row, float32, contiguous.
        angles: of the rows' positions.
        pool: shape (blocks, 2, G, BLOCK_TOKENS, H).
        segments: what the rows are.

    Raises:
        ExactnessError: as ``paged_attention``.
    """
    kernels = native.kernels()
    if kernels:
        kernels.keep(qkv_MXH, *angles, pool, segments)
        return
    segments.check_fits(len(qkv_MXH), len(pool))
    kv_heads = pool.shape[2]
    rotate_rows(qkv_MXH[:, :-kv_heads], *angles)
    for row, tokens, first, offset, _ in segments.spans_S5.tolist():
        positions = torch.arange(first, first + tokens)
        blocks = segments.tables[offset + positions // BLOCK_TOKENS].long()
        kv_T2GH = qkv_MXH[row : row + tokens, -2 * kv_heads :].unflatten(1, (2, kv_heads))
        pool[blocks, :, :, positions % BLOCK_TOKENS] = kv_T2GH


def paged_attention(q_MNH: Tensor, pool: Tensor, segments: Segments, out_MNH: Tensor) -> None:
    """Store the same for the rows of a step, whose keys and values lie in a layer's pool.

    A row's result depends on its own sequence only. With the native kernel it is that of ``causal_attention`` for the
    whole prompt, bit for bit, however the prompt is cut. PyTorch's operators, one call a segment and block of queries,
    round differently where a segment is longer or shorter; they would with another number of threads too, which
    depends on how many rows a step has, so they have one.

    Args:
        q_MNH: queries, float32.
        pool: keys and values, shape (blocks, 2, G, BLOCK_TOKENS, H), those of these rows included.
        segments: what the rows are.
        out_MNH: float32, contiguous; rows of no segment are left as they are.

    Raises:
        ExactnessError: shapes or layouts that do not fit, or segments that need more rows or blocks than there are.
    """
    kernels = native.kernels()
    if kernels and kernels.attends:
        kernels.attend_paged(q_MNH, pool, segments, out_MNH)
        return
    segments.check_fits(len(q_MNH), len(pool))
    with using_threads(1):
        for row, tokens, first, offset, length in segments.spans_S5.tolist():
            kv = pool[segments.tables[offset : offset + length]]
            k_1GSH, v_1GSH = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, None, :, : first + tokens]
            # A copy, as keys and values are: a product's rounding may depend on where its operands are aligned.
            q_1TNH = q_MNH[None, row : row + tokens].clone(memory_format=torch.contiguous_format)
            out_MNH[row : row + tokens] = _by_operators(q_1TNH, k_1GSH, v_1GSH, tokens)[0]


def _by_operators(q_BTNH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, wanted: int) -> Tensor:
    """Compute ``causal_attention`` by PyTorch's, shape (B, wanted, N, H)."""
    tokens, total = q_BTNH.shape[1], k_BGSH.shape[2]
    mask = _block_mask(max(_BLOCK, 1 << max(total - 1, 0).bit_length()))
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
    return y_BTNH[:, tokens - wanted :]


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
