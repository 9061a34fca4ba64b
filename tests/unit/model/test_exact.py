"""The packed model's layers: close to the float ones, exact in what others multiply, and strict about their input."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import load_linears, tiny_checkpoint
from torch import Tensor
from workers import packed_tiny

from tsqp.arith.native import Scaling
from tsqp.arith.quantize import dequantize
from tsqp.arith.ring import lay_out
from tsqp.errors import InputError
from tsqp.meter import Meter
from tsqp.model.exact import ExactOps, LocalProducts
from tsqp.model.packed import PackedEnclave, open_codes, open_enclave


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("exact") / "model", attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def packed(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_tiny(directory, tmp_path_factory.mktemp("exact-packed") / "packed")


@pytest.fixture(scope="module")
def enclave(packed: Path) -> PackedEnclave:
    return open_enclave(packed)


@pytest.fixture
def ops(packed: Path, enclave: PackedEnclave) -> ExactOps:
    codes = open_codes(packed)
    return ExactOps(
        enclave, LocalProducts({group.name: lay_out(codes.read(group.name)) for group in codes.groups}, 1), Meter()
    )


def test_every_group_is_close_to_the_float_one(ops: ExactOps, directory: Path) -> None:
    linears = load_linears(directory)
    for name, group in linears.groups.items():
        x_MK = torch.randn(6, group.in_features, generator=torch.Generator().manual_seed(1))
        ours, theirs = ops.linear(name, x_MK)(), linears.linear(name, x_MK)
        assert ours.dtype == torch.float32
        error = float((ours - theirs).norm() / theirs.norm())
        assert 0 < error < 0.01, f"{name}: int8 weights change a product by {error:.4f}"


def test_embedding_and_norms_are_the_models(ops: ExactOps, directory: Path) -> None:
    ids_M = torch.tensor([0, 100, 7])
    assert torch.equal(ops.embedding(ids_M)(), load_linears(directory).embedding(ids_M))
    assert set(ops.state()) == set(open_enclave_state(directory))


def open_enclave_state(directory: Path) -> dict[str, Tensor]:
    from tiny_models import reference_from  # noqa: PLC0415  this test alone

    return {name: value for name, value in reference_from(directory).named_parameters() if "norm" in name}


@pytest.mark.parametrize("bad", [-1, 101])
def test_ids_outside_the_vocabulary_are_refused(ops: ExactOps, bad: int) -> None:
    with pytest.raises(InputError, match="outside the vocabulary of 101"):
        ops.embedding(torch.tensor([3, bad]))()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nothing_is_multiplied_when_an_activation_is_not_finite(enclave: PackedEnclave, value: float) -> None:
    products = SimpleNamespace(start=lambda group, _: pytest.fail(f"{group} was multiplied"))

    x_MK = torch.zeros(2, 48)
    x_MK[1, 5] = value
    with pytest.raises(InputError, match="infinite or not a number"):
        ExactOps(enclave, products, Meter()).linear("layers.0.qkv", x_MK)()


def test_what_is_multiplied_stays_in_range(enclave: PackedEnclave, packed: Path) -> None:
    codes = open_codes(packed)
    seen: list[int] = []

    def products(group: str, xq_MK: Tensor, scaling: Scaling) -> Tensor:
        exact = xq_MK.long() @ codes.read(group).long().T
        seen.append(int(exact.abs().max()))
        return dequantize(exact.int(), scaling)

    ops = ExactOps(enclave, SimpleNamespace(start=partial(partial, products)), Meter())
    for scale in (1e-30, 1.0, 1e30):
        ops.linear("layers.0.down", scale * torch.randn(4, 80))()
    assert max(seen) < 1 << 31
    assert min(seen) > 1 << 26, "activations use the range that the bound leaves"


def test_quantising_is_metered(enclave: PackedEnclave, packed: Path) -> None:
    codes = open_codes(packed)
    meter = Meter()
    ExactOps(enclave, LocalProducts({"head": lay_out(codes.read("head"))}, 1), meter).linear(
        "head", torch.ones(1, 48)
    )()
    assert meter.quantise_ns > 0
    assert meter.protection_ns == meter.quantise_ns
    assert meter.since(meter).quantise_ns == 0
