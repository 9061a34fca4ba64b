"""Pairs of linear groups: the bits of the same asked for one by one, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_models import load_linears, tiny_checkpoint
from torch import Tensor

from tsqp.errors import InputError
from tsqp.model.architecture import linear_groups, norm_before, norm_shapes
from tsqp.model.layers import add_rms_norm
from tsqp.model.linears import Linears
from tsqp.model.ops import read_state
from tsqp.model.pairs import LinearPairs
from tsqp.model.weights import Checkpoint

OUT, GATE_UP = "layers.1.o", "layers.1.gate_up"
PAIR = "layers.1.o and layers.1.gate_up"


@pytest.fixture(scope="module", params=["plain", "biases"])
def directory(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "plain":
        return tiny_llama
    return tiny_checkpoint(tmp_path_factory.mktemp("pairs") / "biases", attention_bias=True, mlp_bias=True)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Linears, dict[str, Tensor], LinearPairs]:
    linears = load_linears(directory, dtype)
    state = {name: 1 + torch.rand(value.shape) for name, value in read_state(linears, Checkpoint(directory)).items()}
    return linears, state, LinearPairs(linears, state)


def one_by_one(
    linears: Linears, state: dict[str, Tensor], names: tuple[str, str], x_MK: Tensor, x_MD: Tensor
) -> Tensor:
    """What an enclave makes of two products."""
    first_MD = linears.linear(names[0], x_MK).float()
    normed_MD = add_rms_norm(x_MD.clone(), first_MD, state[norm_before(names[1]) or ""], linears.config.rms_norm_eps)
    return torch.cat((first_MD, linears.linear(names[1], normed_MD).float()), dim=1)


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_every_pair_has_the_bits_of_its_groups(directory: Path, rows: int) -> None:
    linears, state, pairs = load(directory)
    assert len(pairs.by_name) == 2 * linears.config.layers
    for name, pair in pairs.by_name.items():
        x_MK, x_MD = torch.randn(rows, pair.first.in_features), 9 * torch.randn(rows, linears.config.hidden_size)
        x_MC = torch.cat((x_MK, x_MD), dim=1)
        expected = one_by_one(linears, state, (pair.first.name, pair.second.name), x_MK, x_MD)
        assert pairs.check((pair.first.name, pair.second.name), x_MC.dtype, tuple(x_MC.shape)) is pair
        assert pair.widths == (x_MC.shape[1], expected.shape[1])
        kept = x_MC.clone()
        assert torch.equal(pairs.multiply(name, x_MC), expected)
        assert torch.equal(x_MC, kept), "operands may be a client's"
        out = torch.full(expected.shape, torch.nan)
        assert pairs.multiply(name, x_MC, out) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_rounded_where_products_are(directory: Path, dtype: torch.dtype) -> None:
    linears, state, pairs = load(directory, dtype)
    pair = pairs.by_name[PAIR]
    x_MC = torch.randn(5, pair.widths[0]).to(dtype)
    x_MK, x_MD = x_MC.split((pair.first.in_features, pair.first.rows), dim=1)
    expected = one_by_one(linears, state, (OUT, GATE_UP), x_MK, x_MD.float())
    got = pairs.multiply(PAIR, x_MC)
    assert got.dtype == dtype
    assert torch.equal(got.float(), expected)


def test_inputs_are_what_both_groups_read(directory: Path) -> None:
    linears, _, pairs = load(directory)
    x_MC = torch.randn(3, pairs.by_name[PAIR].widths[0])
    x_MK, normed_MD = pairs.inputs(PAIR, x_MC)
    columns = pairs.by_name[PAIR].first.rows
    product = pairs.multiply(PAIR, x_MC)
    assert torch.equal(x_MK, x_MC[:, : x_MK.shape[1]])
    assert torch.equal(linears.linear(GATE_UP, normed_MD), product[:, columns:])


@pytest.mark.parametrize(
    ("names", "columns", "dtype", "message"),
    [
        ((OUT, "layers.1.down"), 96, torch.float32, "no pair of linear groups is 'layers.1.o' and 'layers.1.down'"),
        (("layers.1.qkv", OUT), 96, torch.float32, "no pair"),
        ((OUT, "layers.0.gate_up"), 96, torch.float32, "no pair"),
        (("", "x"), 96, torch.float32, "no pair of linear groups is '' and 'x'"),
        (
            (OUT, GATE_UP),
            95,
            torch.float32,
            r"linear layers.1.o and layers.1.gate_up expects floats of shape \[M, 96\]",
        ),
        ((OUT, GATE_UP), 96, torch.int8, r"got torch.int8 \[2, 96\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_llama: Path, names: tuple[str, str], columns: int, dtype: torch.dtype, message: str
) -> None:
    _, _, pairs = load(tiny_llama)
    with pytest.raises(InputError, match=message):
        pairs.check(names, dtype, (2, columns))
    with pytest.raises(InputError, match="expects floats"):
        pairs.check((OUT, GATE_UP), torch.float32, (96,))
    with pytest.raises(InputError, match="elements; at most"):
        pairs.check((OUT, GATE_UP), torch.float32, (1 << 30, 96))


def test_a_worker_without_norms_has_no_pairs(tiny_llama: Path) -> None:
    assert not LinearPairs(load_linears(tiny_llama), {}).by_name


def test_norms_before_groups_are_the_models(tiny_llama: Path) -> None:
    config = load_linears(tiny_llama).config
    groups = [group.name for group in linear_groups(config)]
    norms = [norm for name in groups if (norm := norm_before(name))]
    assert sorted(norms) == sorted(norm_shapes(config))
    for before, after in pairwise(groups):
        assert (norm_before(before) is None) is not (norm_before(after) is None) or before.endswith("qkv")
