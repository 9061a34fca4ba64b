"""Attention over a pool's blocks: by the formula, and the same bits whatever else a step computes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tsqp.arith import native
from tsqp.arith.paging import BLOCK_TOKENS, Segments
from tsqp.errors import ExactnessError
from tsqp.model.attention import causal_attention, keep, paged_attention
from tsqp.model.layers import rotate_rows
from tsqp.threads import using_threads

SHAPES = [
    pytest.param((9, 3, 64), id="bundled"),
    pytest.param((4, 4, 8), id="multi-head"),
    pytest.param((6, 1, 34), id="multi-query"),
    pytest.param((4, 2, 80), id="odd-vectors"),
    pytest.param((2, 1, 256), id="largest"),
]
LENGTHS = (1, 64, 65, 200, 40, 131)


@pytest.fixture(params=["native", "operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How attention is computed."""
    if request.param == "operators":
        monkeypatch.setattr(native, "kernels", lambda: None)
    elif "avx512-vnni" not in native.available():
        pytest.skip("native attention needs AVX-512")
    else:
        monkeypatch.setattr(native, "kernels", lambda: native.Kernels("avx512-vnni"))
    return str(request.param)


class Sequences:
    """Sequences of random queries, keys and values, of the lengths asked for."""

    def __init__(self, heads: int, kv_heads: int, size: int, lengths: Sequence[int] = LENGTHS) -> None:
        generator = torch.Generator().manual_seed(size)
        self.q = [3 * torch.randn(length, heads, size, generator=generator) for length in lengths]
        self.kv = [torch.randn(2, length, kv_heads, size, generator=generator) for length in lengths]

    def paged(self, seed: int) -> tuple[Tensor, list[list[int]]]:
        """Return a pool where their keys and values lie in blocks of some order, and the tables. The rest is NaN."""
        counts = [-(-kv.shape[1] // BLOCK_TOKENS) for kv in self.kv]
        numbers = np.random.default_rng(seed).permutation(sum(counts) + 3).tolist()
        _, _, kv_heads, size = self.kv[0].shape
        pool = torch.full((len(numbers), 2, kv_heads, BLOCK_TOKENS, size), math.nan)
        tables = [[numbers.pop() for _ in range(count)] for count in counts]
        for kv, table in zip(self.kv, tables, strict=True):
            for at, number in enumerate(table):
                part = kv[:, at * BLOCK_TOKENS : (at + 1) * BLOCK_TOKENS]
                pool[number, :, :, : part.shape[1]] = part.transpose(1, 2)
        return pool, tables

    def attend(self, spans: Sequence[tuple[int, int, int]], seed: int = 0) -> list[Tensor]:
        """Compute some spans, each a sequence's number, its first and its end; return each one's rows."""
        pool, tables = self.paged(seed)
        segments = Segments.of((end - first, first, tables[which]) for which, first, end in spans)
        q_MNH = torch.cat([self.q[which][first:end] for which, first, end in spans])
        out_MNH = torch.full(q_MNH.shape, 7.5)
        paged_attention(q_MNH, pool, segments, out_MNH)
        return list(out_MNH.split([end - first for _, first, end in spans]))

    def exact(self, which: int) -> Tensor:
        """Compute a whole sequence in float64."""
        q_NTH = self.q[which].double().transpose(0, 1)
        repeats = q_NTH.shape[0] // self.kv[which].shape[2]
        k_NTH, v_NTH = self.kv[which].double().transpose(1, 2).repeat_interleave(repeats, dim=1)
        scores = q_NTH @ k_NTH.mT / math.sqrt(q_NTH.shape[-1])
        hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
        y_NTH: Tensor = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v_NTH
        return y_NTH.transpose(0, 1)


WHOLE = [(which, 0, length) for which, length in enumerate(LENGTHS)]
MIXED = [(3, 100, 200), (0, 0, 1), (1, 63, 64), (2, 50, 65), (4, 39, 40), (5, 129, 131)]


@pytest.mark.parametrize("spans", [WHOLE, MIXED], ids=["whole", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula(way: str, shape: tuple[int, int, int], spans: list[tuple[int, int, int]]) -> None:
    sequences = Sequences(*shape)
    for (which, first, end), rows in zip(spans, sequences.attend(spans), strict=True):
        exact = sequences.exact(which)[first:end]
        torch.testing.assert_close(rows.double(), exact, rtol=0, atol=1.2e-5, msg=f"{way}, sequence {which}")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_segment_has_the_same_bits_alone_and_in_other_blocks(
    way: str, shape: tuple[int, int, int], threads: int
) -> None:
    sequences = Sequences(*shape)
    with using_threads(1):
        together = sequences.attend(MIXED)
    with using_threads(threads):
        for other in (sequences.attend(MIXED, seed=1), sequences.attend(MIXED[::-1], seed=2)[::-1]):
            assert all(map(torch.equal, other, together)), way
        for span, rows in zip(MIXED, together, strict=True):
            assert torch.equal(sequences.attend([span], seed=3)[0], rows), f"{way}, {span}"


@pytest.mark.parametrize("pieces", [[1] * 200, [15] * 13 + [5], [64, 1, 16, 119], [100, 100]], ids=len)
@pytest.mark.parametrize("shape", SHAPES)
def test_natively_however_a_prompt_is_cut(shape: tuple[int, int, int], pieces: list[int]) -> None:
    """In pieces, each with the blocks that its keys need, as in a contiguous tensor."""
    if "avx512-vnni" not in native.available():
        pytest.skip("native attention needs AVX-512")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "kernels", lambda: native.Kernels("avx512-vnni"))
        sequences = Sequences(*shape)
        k_1GSH, v_1GSH = sequences.kv[3][:, None].transpose(2, 3)
        whole = causal_attention(sequences.q[3][None], k_1GSH, v_1GSH, 200).view(sequences.q[3].shape)
        ends = np.cumsum(pieces).tolist()
        rows = sequences.attend([(3, end - count, end) for count, end in zip(pieces, ends, strict=True)])
    assert torch.equal(torch.cat(rows), whole)


def test_strided_queries_and_blocks_are_read_where_they_lie(way: str) -> None:
    """Queries inside rows of a larger product, and a layer inside a pool of all layers."""
    sequences = Sequences(6, 2, 16)
    pool, tables = sequences.paged(0)
    spans = [(3, 180, 200), (2, 64, 65)]
    segments = Segments.of((end - first, first, tables[which]) for which, first, end in spans)
    q_MNH = torch.cat([sequences.q[which][first:end] for which, first, end in spans])
    wide = torch.full((len(q_MNH), 10, 16), math.nan)
    wide[:, :6] = q_MNH
    layers = torch.full((len(pool), 3, *pool.shape[1:]), math.nan)
    layers[:, 1] = pool
    out, expected = torch.empty(q_MNH.shape), torch.empty(q_MNH.shape)
    paged_attention(wide[:, :6], layers[:, 1], segments, out)
    paged_attention(q_MNH, pool, segments, expected)
    assert torch.equal(out, expected), way


def test_rows_of_no_segment_are_left(way: str) -> None:
    sequences = Sequences(2, 1, 8)
    pool, tables = sequences.paged(0)
    spans = np.array([[3, 1, 0, 0, 1], [1, 0, 0, 0, 1]], dtype=np.int32)
    segments = Segments.checked(spans, np.array(tables[0], dtype=np.int32))
    out = torch.full((5, 2, 8), 7.5)
    paged_attention(torch.randn(5, 2, 8), pool, segments, out)
    assert out[[0, 1, 2, 4]].eq(7.5).all(), way
    torch.testing.assert_close(out[3], sequences.kv[0][1].expand(2, 2, 8)[0], rtol=1e-6, atol=0)
    paged_attention(torch.randn(0, 2, 8), pool, Segments.of([]), torch.empty(0, 2, 8))


def test_segments_that_do_not_fit_are_refused(way: str) -> None:
    pool, q = torch.zeros(4, 2, 1, BLOCK_TOKENS, 8), torch.zeros(3, 2, 8)
    for segments in (Segments.of([(1, 0, [4])]), Segments.of([(4, 0, [0])])):
        with pytest.raises(ExactnessError, match="the segments need"):
            paged_attention(q, pool, segments, torch.empty_like(q))
    with pytest.raises(ExactnessError, match="fewer blocks of 64"):
        Segments.of([(1, 64, [0])])
    with pytest.raises(ExactnessError, match=way and "is negative"):
        Segments.of([(1, 0, [-1])])


@pytest.mark.parametrize(
    ("spans", "match"),
    [
        ([[0, 2, 0, 0, 1], [1, 1, 0, 0, 1]], "share a row"),
        ([[-1, 1, 0, 0, 1]], "negative"),
        ([[0, 1, 0, 1, 1]], "ends after the 1 numbers"),
        ([[0, 1, 2**31 - 1, 0, 1]], "fewer blocks"),
    ],
)
def test_numbers_that_make_no_segments_are_refused(spans: list[list[int]], match: str) -> None:
    with pytest.raises(ExactnessError, match=match):
        Segments.checked(np.array(spans, dtype=np.int32), np.zeros(1, dtype=np.int32))


def test_natively_shapes_are_checked() -> None:
    if "avx512-vnni" not in native.available():
        pytest.skip("native attention needs AVX-512")
    kernels, segments = native.Kernels("avx512-vnni"), Segments.of([(1, 0, [0])])
    pool, q = torch.zeros(4, 2, 1, BLOCK_TOKENS, 8), torch.zeros(3, 2, 8)
    for operands in (
        (q.double(), pool, segments, q.clone()),
        (q, pool[:, :, :, :32], segments, q.clone()),
        (q, pool[..., :4], segments, q.clone()),
        (q, torch.zeros(4, 2, 2, BLOCK_TOKENS, 8)[:, :, :1], segments, q.clone()),
        (q, pool, segments, q.double()),
        (q, pool, segments, q[:2].clone()),
    ):
        with pytest.raises(ExactnessError, match="a native kernel takes"):
            kernels.attend_paged(*operands)
    with pytest.raises(ExactnessError, match="no native attention for avx2"):
        native.Kernels("avx2").attend_paged(q, pool, segments, q.clone())
    with pytest.raises(ExactnessError, match="cannot share"):
        kernels.attend_paged(q, torch.zeros(4, 2, 3, BLOCK_TOKENS, 8), segments, q.clone())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_kept_where_its_segments_find_it(way: str, shape: tuple[int, int, int]) -> None:
    heads, kv_heads, size = shape
    spans = [(3, 60, [4, 1]), (1, 0, [2]), (70, 100, [0, 3, 5])]
    rows = sum(tokens for tokens, _, _ in spans)
    qkv_MXH = torch.randn(rows, heads + 2 * kv_heads, size)
    angles = (torch.randn(rows, size), torch.randn(rows, size))
    pool = torch.full((7, 2, kv_heads, BLOCK_TOKENS, size), math.nan)
    rotated_MXH = qkv_MXH.clone()
    rotate_rows(rotated_MXH[:, : heads + kv_heads], *angles)
    keep(qkv_MXH, angles, pool, Segments.of(spans))
    assert torch.equal(qkv_MXH, rotated_MXH), way
    row = 0
    for tokens, first, table in spans:
        for position in range(first, first + tokens):
            kept = pool[table[position // BLOCK_TOKENS], :, :, position % BLOCK_TOKENS]
            assert torch.equal(kept.flatten(0, 1), rotated_MXH[row, heads:])
            row += 1
    assert (~pool.isnan()).sum() == rows * 2 * kv_heads * size, "nothing else is written"


def test_what_does_not_fit_a_step_is_not_kept(way: str) -> None:
    angles = (torch.zeros(3, 8), torch.zeros(3, 8))
    pool, qkv = torch.zeros(4, 2, 1, BLOCK_TOKENS, 8), torch.zeros(3, 4, 8)
    for segments in (Segments.of([(4, 0, [0])]), Segments.of([(1, 0, [4])])):
        with pytest.raises(ExactnessError, match="the segments need"):
            keep(qkv, angles, pool, segments)
    if way == "native":
        kernels, segments = native.kernels(), Segments.of([(3, 0, [0])])
        assert kernels
        with pytest.raises(ExactnessError, match="are not queries, keys and values"):
            kernels.keep(qkv[:, :2].contiguous(), *angles, pool, segments)
        for operands in ((qkv[..., ::2], *angles, pool[..., :4]), (qkv, angles[0][:2], angles[1], pool)):
            with pytest.raises(ExactnessError, match="a native kernel takes"):
                kernels.keep(*operands, segments)
