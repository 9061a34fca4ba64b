"""Parts of a model's weights: together they are all rows, each reads only its own, and products fit together again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_models import edit_tensors, packed_model
from tiny_models import load_linears, tiny_checkpoint

from tsqp.arith.panels import kernels_for
from tsqp.errors import ConfigError, WeightsError
from tsqp.model.architecture import LinearGroup, read_config
from tsqp.model.linears import Linears
from tsqp.model.packed import open_codes
from tsqp.model.share import Share, parts
from tsqp.model.weights import Checkpoint

CPU = torch.device("cpu")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
}


@given(rows=st.integers(1, 500), ranks=st.integers(1, 40))
def test_ranks_share_all_rows_in_order_and_evenly(rows: int, ranks: int) -> None:
    shares = [Share(rank, ranks).of(rows) for rank in range(ranks)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [Share(0, ranks).of(rows, rank) for rank in range(ranks)] == shares


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), ends=st.tuples(st.integers(0, 120), st.integers(0, 120))
)
def test_rows_come_from_the_members_that_have_them(sizes: list[int], ends: tuple[int, int]) -> None:
    group = LinearGroup("g", tuple(map(str, range(len(sizes)))), 1, tuple(sizes), bias=False)
    whole = [(member, row) for member, size in zip(group.members, sizes, strict=True) for row in range(size)]
    first, end = sorted(min(each, len(whole)) for each in ends)
    placed: list[Any] = [None] * (end - first)
    for member, some, place in parts(group, range(first, end)):
        placed[place] = [(member, row) for row in some]
    assert placed == whole[first:end]


def test_more_ranks_than_rows_are_refused_and_as_many_are_not() -> None:
    groups = [LinearGroup(name, (name,), 4, (rows,), bias=False) for name, rows in (("a", 9), ("b", 5), ("c", 7))]
    Share(0, 5).check(groups)
    with pytest.raises(ConfigError, match=r"--tensor-parallel 6: .* b has 5: at most 5 ranks fit this model"):
        Share(0, 6).check(groups)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_products_are_those_of_the_whole(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    """With the native kernel bit for bit; oneDNN may cut its sums by the number of outputs."""
    directory = tiny_checkpoint(tmp_path / "model", **options)
    whole = load_linears(directory, dtype)
    ranks = [
        Linears(read_config(directory), Checkpoint(directory), dtype, CPU, share=Share(rank, 3)) for rank in range(3)
    ]
    for name, group in whole.groups.items():
        x_MK = torch.randn(5, group.in_features, generator=torch.Generator().manual_seed(2)).to(dtype)
        together = torch.cat([rank.multiply(name, x_MK) for rank in ranks], dim=1)
        if kernels_for(dtype, CPU):
            assert torch.equal(together, whole.multiply(name, x_MK))
        else:
            torch.testing.assert_close(together, whole.multiply(name, x_MK))
    assert torch.equal(ranks[0].embedding(torch.arange(101)), whole.embedding(torch.arange(101)))


def test_a_rank_holds_its_own_rows_only(tmp_path: Path) -> None:
    """Panels are of 16 rows, so that a part may have up to 15 more."""
    directory = tiny_checkpoint(tmp_path / "model", hidden_size=192, intermediate_size=320, vocab_size=512)
    config, checkpoint = read_config(directory), Checkpoint(directory)
    read = []

    class Watched(Checkpoint):
        def read_into(self, name: str, out: torch.Tensor, rows: range | None = None) -> None:
            read.append(out.numel())
            super().read_into(name, out, rows)

    sizes = [
        sum(panels.nbytes for panels in Linears(config, checkpoint, torch.float32, CPU, share=share)._panels.values())
        for share in (Share(0, 1), Share(1, 4))
    ]
    Linears(config, Watched(directory), torch.float32, CPU, share=Share(1, 4))
    elements = sum(group.rows * group.in_features for group in load_linears(directory).groups.values())
    assert sizes == ([4 * elements, elements] if kernels_for(torch.float32, CPU) else [0, 0])
    assert sum(read) == elements / 4


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_model(tmp_path_factory.mktemp("share"))


def test_rows_of_codes_are_those_of_all(packed: Path) -> None:
    codes = open_codes(packed)
    for group in codes.groups:
        whole = codes.read(group.name)
        pieces = [codes.read(group.name, Share(rank, 5).of(group.rows)) for rank in range(5)]
        assert torch.equal(torch.cat(pieces), whole)
        assert [len(piece) for piece in pieces] == [len(Share(rank, 5).of(group.rows)) for rank in range(5)]
        assert all(piece.untyped_storage().nbytes() == piece.nbytes for piece in pieces)


@pytest.mark.parametrize("row", [0, 20, 47])
def test_a_change_in_rows_that_are_not_kept_is_found(tmp_path: Path, row: int) -> None:
    """Before, among and behind the rows of one rank."""
    packed = packed_model(tmp_path)
    open_codes(packed).read("layers.0.o", range(16, 32))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.o"][row, 0] ^= 1

    edit_tensors(packed / "worker" / "layer-00000.safetensors", change)
    with pytest.raises(WeightsError, match=r"tensor 'layers\.0\.o' was changed"):
        open_codes(packed).read("layers.0.o", range(16, 32))
