"""Chains of linear groups: the bits of the same asked for one by one, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_models import load_linears, tiny_checkpoint
from torch import Tensor

from tsqp.errors import InputError
from tsqp.model.architecture import chain_name, chains, linear_groups, norm_before, norm_shapes
from tsqp.model.chains import LinearChains
from tsqp.model.layers import add_rms_norm, swiglu
from tsqp.model.linears import Linears
from tsqp.model.ops import read_state
from tsqp.model.weights import Checkpoint

NAMES = ("layers.1.o", "layers.1.gate_up", "layers.1.down", "layers.2.qkv")
CHAIN = "layers.1.o to layers.2.qkv"


@pytest.fixture(scope="module", params=["plain", "biases"])
def directory(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "plain":
        return tiny_llama
    return tiny_checkpoint(tmp_path_factory.mktemp("chains") / "biases", attention_bias=True, mlp_bias=True)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Linears, dict[str, Tensor], LinearChains]:
    linears = load_linears(directory, dtype)
    state = {name: 1 + torch.rand(value.shape) for name, value in read_state(linears, Checkpoint(directory)).items()}
    return linears, state, LinearChains(linears, state)


def one_by_one(
    linears: Linears, state: dict[str, Tensor], names: tuple[str, ...], x_MK: Tensor, x_MD: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """What an enclave makes of four products, and what each group reads."""
    o, gate_up, down, following = names
    eps, residual_MD = linears.config.rms_norm_eps, x_MD.clone()
    y1_MD = linears.linear(o, x_MK).float()
    normed_MD = add_rms_norm(residual_MD, y1_MD, state[norm_before(gate_up) or ""], eps)
    activated_MF = swiglu(linears.linear(gate_up, normed_MD).float())
    y2_MD = linears.linear(down, activated_MF).float()
    next_normed_MD = add_rms_norm(residual_MD, y2_MD, state[norm_before(following) or ""], eps)
    y = torch.cat((y1_MD, y2_MD, linears.linear(following, next_normed_MD).float()), dim=1)
    return y, dict(zip(names, (x_MK, normed_MD, activated_MF, next_normed_MD), strict=True))


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_every_chain_has_the_bits_of_its_groups(directory: Path, rows: int) -> None:
    linears, state, computed = load(directory)
    assert list(computed.by_name) == [chain_name(names) for names in chains(linears.config)]
    for names in chains(linears.config):
        x_MK, x_MD = torch.randn(rows, 48), 9 * torch.randn(rows, linears.config.hidden_size)
        x_MC = torch.cat((x_MK, x_MD), dim=1)
        expected, _ = one_by_one(linears, state, names, x_MK, x_MD)
        chain = computed.find(names)
        chain.check(x_MC.dtype, tuple(x_MC.shape))
        assert chain.widths == (x_MC.shape[1], expected.shape[1])
        kept = x_MC.clone()
        assert torch.equal(computed.multiply(chain.name, x_MC), expected)
        assert torch.equal(x_MC, kept), "operands may be a client's"
        out = torch.full(expected.shape, torch.nan)
        assert computed.multiply(chain.name, x_MC, out) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_rounded_where_products_are(directory: Path, dtype: torch.dtype) -> None:
    linears, state, computed = load(directory, dtype)
    x_MC = torch.randn(5, 96).to(dtype)
    expected, _ = one_by_one(linears, state, NAMES, x_MC[:, :48], x_MC[:, 48:].float())
    got = computed.multiply(CHAIN, x_MC)
    assert got.dtype == dtype
    assert torch.equal(got.float(), expected)


def test_inputs_are_what_each_group_reads(directory: Path) -> None:
    linears, state, computed = load(directory)
    x_MC = torch.randn(3, 96)
    _, expected = one_by_one(linears, state, NAMES, x_MC[:, :48], x_MC[:, 48:])
    read = computed.inputs(CHAIN, x_MC)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("names", "columns", "dtype", "message"),
    [
        ((*NAMES[:3], "head"), 96, torch.float32, "'layers.1.down', 'head' are no chain of this model"),
        (NAMES[:2], 96, torch.float32, "no chain"),
        (("layers.1.qkv", *NAMES[:3]), 96, torch.float32, "no chain"),
        ((*NAMES[:3], "layers.1.qkv"), 96, torch.float32, "no chain"),
        (("", "x", "", "y"), 96, torch.float32, "the linear groups '', 'x', '', 'y' are no chain"),
        (NAMES, 95, torch.float32, r"linear layers.1.o to layers.2.qkv expects floats of shape \[M, 96\]"),
        (NAMES, 96, torch.int8, r"got torch.int8 \[2, 96\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_llama: Path, names: tuple[str, ...], columns: int, dtype: torch.dtype, message: str
) -> None:
    _, _, computed = load(tiny_llama)
    with pytest.raises(InputError, match=message):
        computed.find(names).check(dtype, (2, columns))
    with pytest.raises(InputError, match="expects floats"):
        computed.find(NAMES).check(torch.float32, (96,))


def test_what_lies_between_is_bounded_like_a_result(tiny_llama: Path) -> None:
    """A layer's gate and up may be wider than all that is returned."""
    wide = load(tiny_checkpoint(tiny_llama.parent / "wide", intermediate_size=400))[2]
    rows = (1 << 30) // wide.by_name[CHAIN].widths[1]
    with pytest.raises(InputError, match=r"a result of shape \[\d+, 1296\] has \d+ elements; at most"):
        wide.find(NAMES).check(torch.float32, (rows, 96))


def test_a_worker_without_all_norms_has_no_chains(tiny_llama: Path) -> None:
    linears, state, _ = load(tiny_llama)
    assert not LinearChains(linears, {}).by_name
    del state["model.layers.1.post_attention_layernorm.weight"]
    assert list(LinearChains(linears, state).by_name) == ["layers.0.o to layers.1.qkv", "layers.2.o to head"]


def test_norms_before_groups_are_the_models(tiny_llama: Path) -> None:
    config = load_linears(tiny_llama).config
    groups = [group.name for group in linear_groups(config)]
    norms = [norm for name in groups if (norm := norm_before(name))]
    assert sorted(norms) == sorted(norm_shapes(config))
    for before, after in pairwise(groups):
        assert (norm_before(before) is None) is not (norm_before(after) is None) or before.endswith("qkv")
