"""Both ways to compute attention against the formula in float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tsqp.arith import native
from tsqp.errors import ExactnessError
from tsqp.model.attention import causal_attention, offloaded_attention
from tsqp.threads import using_threads

SHAPES = [
    pytest.param((2, 17, 4, 4, 8), id="multi-head"),
    pytest.param((2, 17, 6, 2, 8), id="grouped"),
    pytest.param((1, 33, 4, 1, 16), id="multi-query"),
    pytest.param((3, 1, 4, 2, 8), id="one-token"),
    pytest.param((1, 2, 1, 1, 2), id="smallest"),
    pytest.param((1, 64, 2, 1, 4), id="one-block"),
    pytest.param((2, 131, 4, 2, 8), id="three-blocks"),
    pytest.param((1, 40, 2, 2, 20), id="odd-head-size"),
    pytest.param((1, 300, 2, 1, 64), id="three-chunks-of-keys"),
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


def by_operators(q_BTNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor) -> Tensor:
    """Compute without the native kernel, as on processors that lack it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "kernels", lambda: None)
        return causal(q_BTNH, k_BTGH, v_BTGH)


def offloaded(q_BTNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor) -> Tensor:
    return offloaded_attention(q_BTNH, k_BTGH.transpose(1, 2), v_BTGH.transpose(1, 2), q_BTNH.shape[1], torch.matmul)


@pytest.mark.parametrize("attention", [causal, by_operators, offloaded], ids=["causal", "operators", "offloaded"])
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


@pytest.fixture
def kernels() -> native.Kernels:
    if "avx512-vnni" not in native.available():
        pytest.skip("native attention needs AVX-512")
    return native.Kernels("avx512-vnni")


def attended(kernels: native.Kernels, q_BTNH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor) -> Tensor:
    """Compute natively into the middle of a larger tensor; nothing beside the result may change."""
    room = torch.full((q_BTNH.numel() + 64,), 7.5)
    y_BTNH = room[32:-32].view(q_BTNH.shape)
    kernels.attend(q_BTNH, k_BGSH, v_BGSH, y_BTNH)
    assert room[:32].eq(7.5).all()
    assert room[-32:].eq(7.5).all()
    return y_BTNH


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_natively_a_query_has_the_same_bits_whatever_is_computed_with_it(kernels: native.Kernels, threads: int) -> None:
    q, k, v = random_qkv((2, 300, 6, 2, 24), 5.0)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    with using_threads(threads):
        every = attended(kernels, q, k, v)
        for first, end in ((0, 1), (0, 33), (17, 160), (128, 300), (70, 85), (63, 65), (290, 300), (299, 300)):
            part = attended(kernels, q[:, first:end], k[:, :, :end], v[:, :, :end])
            assert torch.equal(part, every[:, first:end])


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2), (7, 1)])
@pytest.mark.parametrize("head_size", [2, 14, 16, 34, 64, 80, 130, 256])
def test_natively_few_queries_get_the_bits_of_many(
    kernels: native.Kernels, head_size: int, heads: tuple[int, int]
) -> None:
    """Below 16 another kernel computes them, with other lanes and the same operations."""
    q, k, v = random_qkv((1, 150, *heads, head_size), 3.0)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    every = attended(kernels, q, k, v)
    for first, end in ((0, 1), (0, 15), (60, 70), (127, 129), (149, 150)):
        part = attended(kernels, q[:, first:end], k[:, :, :end], v[:, :, :end])
        assert torch.equal(part, every[:, first:end])


def test_natively_later_keys_are_not_read_into_a_result(kernels: native.Kernels) -> None:
    q, k, v = random_qkv((1, 40, 2, 2, 8))
    k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    before = attended(kernels, q, k, v)
    k[:, :, 20:], v[:, :, 20:] = 1e30, 1e30
    assert torch.equal(attended(kernels, q, k, v)[:, :20], before[:, :20])


@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_natively_what_is_not_a_number_stays_so(kernels: native.Kernels, place: str) -> None:
    tensors = dict(zip("qkv", random_qkv((1, 40, 1, 1, 8)), strict=True))
    tensors[place][0, 5, 0, 3] = math.nan
    y = attended(kernels, tensors["q"], tensors["k"].transpose(1, 2), tensors["v"].transpose(1, 2))
    assert y[0, 5, 0].isnan().any()
    assert place == "v" or not y[0, :5].isnan().any()  # a weight of 0 times a value that is not a number is none


def test_natively_shapes_are_checked(kernels: native.Kernels) -> None:
    q, k, v = random_qkv((1, 4, 4, 2, 8))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    out = torch.empty_like(q)
    for operands in (
        (q.double(), k, v, out),
        (q, k[..., :4], v, out),
        (q, k, v[:, :, :3], out),
        (q, k, v, out[..., ::2]),
        (q, k.transpose(2, 3).contiguous().transpose(2, 3), v, out),
    ):
        with pytest.raises(ExactnessError, match="a native kernel takes"):
            kernels.attend(*operands)
    with pytest.raises(ExactnessError, match="cannot share"):
        kernels.attend(q[:, :, :3], k, v, out[:, :, :3])
    with pytest.raises(ExactnessError, match="4 tokens cannot be the last of 3"):
        kernels.attend(q, k[:, :, :3], v[:, :, :3], out)
    with pytest.raises(ExactnessError, match="no native attention for avx2"):
        native.Kernels("avx2").attend(q, k, v, out)
