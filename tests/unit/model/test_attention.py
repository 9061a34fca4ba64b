"""Both ways to compute attention against the formula in float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tsqp.model.attention import causal_attention, offloaded_attention

SHAPES = [
    pytest.param((2, 17, 4, 4, 8), id="multi-head"),
    pytest.param((2, 17, 6, 2, 8), id="grouped"),
    pytest.param((1, 33, 4, 1, 16), id="multi-query"),
    pytest.param((3, 1, 4, 2, 8), id="one-token"),
    pytest.param((1, 2, 1, 1, 2), id="smallest"),
    pytest.param((1, 64, 2, 1, 4), id="one-block"),
    pytest.param((2, 131, 4, 2, 8), id="three-blocks"),
]


def exact(q_BTNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor) -> Tensor:
    """Compute head by head and token by token, in float64."""
    batch, tokens, heads, head_size = q_BTNH.shape
    group = heads // k_BTGH.shape[2]
    y_BTNH = torch.zeros(q_BTNH.shape, dtype=torch.float64)
    for b in range(batch):
        for n in range(heads):
            keys, values = k_BTGH[b, :, n // group].double(), v_BTGH[b, :, n // group].double()
            for t in range(tokens):
                scores = keys[: t + 1] @ q_BTNH[b, t, n].double() / math.sqrt(head_size)
                y_BTNH[b, t, n] = scores.softmax(0) @ values[: t + 1]
    return y_BTNH.flatten(2)


def random_qkv(shape: tuple[int, ...], scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, kv_heads, head_size = shape
    generator = torch.Generator().manual_seed(0)
    q = scale * torch.randn(batch, tokens, heads, head_size, generator=generator)
    k, v = torch.randn(2, batch, tokens, kv_heads, head_size, generator=generator)
    return q, k, v


def causal(q_BTNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor) -> Tensor:
    return causal_attention(q_BTNH, k_BTGH.transpose(1, 2), v_BTGH.transpose(1, 2), q_BTNH.shape[1])


def offloaded(q_BTNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor) -> Tensor:
    return offloaded_attention(q_BTNH, k_BTGH.transpose(1, 2), v_BTGH.transpose(1, 2), q_BTNH.shape[1], torch.matmul)


@pytest.mark.parametrize("attention", [causal, offloaded], ids=["causal", "offloaded"])
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["soft", "peaked"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula(attention: Any, shape: tuple[int, ...], scale: float) -> None:
    """A score is off by a few of its own roundings, so a weight by that much relative: 1e-6 times the largest score."""
    q, k, v = random_qkv(shape, scale)
    y = attention(q, k, v)
    assert y.shape == (shape[0], shape[1], shape[2] * shape[4])
    torch.testing.assert_close(y.double(), exact(q, k, v), rtol=0, atol=4e-6 * max(scale, 1.0))


@pytest.mark.parametrize("attention", [causal_attention, None], ids=["causal", "offloaded"])
@pytest.mark.parametrize("last", [1, 2, 63, 64, 65, 130])
def test_the_last_tokens_alone_get_what_they_get_among_all(attention: Any, last: int) -> None:
    attend = attention or partial(offloaded_attention, matmul=torch.matmul)
    q, k, v = random_qkv((2, 131, 4, 2, 8))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    every = attend(q, k, v, 131)
    assert torch.equal(attend(q, k, v, last), every[:, -last:])
    torch.testing.assert_close(attend(q[:, -last:], k, v, last), every[:, -last:], rtol=0, atol=4e-6)


@pytest.mark.parametrize("attention", [causal, offloaded], ids=["causal", "offloaded"])
def test_first_token_sees_itself_only(attention: Any) -> None:
    q, k, v = random_qkv((1, 5, 2, 2, 4))
    torch.testing.assert_close(attention(q, k, v)[:, 0], v[:, 0].flatten(1), rtol=1e-6, atol=1e-6)


def test_offloaded_asks_for_two_products() -> None:
    """The second operand's leading shape equals the first's, as the wire demands; nothing masked is infinite."""
    seen: list[tuple[torch.Size, torch.Size]] = []

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a.shape, b.shape))
        assert a.isfinite().all()
        assert b.isfinite().all()
        return torch.matmul(a, b)

    q, k, v = random_qkv((2, 5, 6, 2, 8))
    offloaded_attention(q, k.transpose(1, 2), v.transpose(1, 2), 5, matmul)
    assert seen == [
        (torch.Size([2, 6, 5, 8]), torch.Size([2, 6, 8, 5])),
        (torch.Size([2, 6, 5, 5]), torch.Size([2, 6, 5, 8])),
    ]
