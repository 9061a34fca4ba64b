"""The non-linear layers against their formulas in float64 and against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import LLAMA3_ROPE, tiny_reference
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tsqp.arith import native
from tsqp.errors import ExactnessError
from tsqp.model.architecture import LlamaConfig, RopeParameters, parse_config
from tsqp.model.layers import (
    RotaryTable,
    add_rms_norm,
    rms_norm,
    rope_frequencies,
    rotate,
    rotate_rows,
    swiglu,
)
from tsqp.threads import using_threads

# A handful of float32 roundings, each at most 2^-24 relative.
FEW_ROUNDINGS = 16 * 2.0**-24

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "large-theta": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": LLAMA3_ROPE,
    "llama3.1": {**LLAMA3_ROPE, "original_max_position_embeddings": 8192},
    "llama3.2": {**LLAMA3_ROPE, "factor": 32.0, "original_max_position_embeddings": 8192},
}


@pytest.fixture(params=["off", *native.available()], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with each instruction set, and with PyTorch's operators."""
    kernels = None if request.param == "off" else native.Kernels(request.param)
    monkeypatch.setattr(native, "kernels", lambda: kernels)
    return str(request.param)


def config_with(rope: dict[str, Any], head_size: int = 16) -> LlamaConfig:
    raw = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 9}
    return parse_config({**raw, "num_attention_heads": 2, "head_dim": head_size, "rope_parameters": rope}, "x")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.5])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm(eps: float, scale: float) -> None:
    x_BTD, weight_D = scale * randn(2, 5, 64), 1 + randn(64, seed=1)
    exact = x_BTD.double() / (x_BTD.double().square().mean(-1, keepdim=True) + eps).sqrt() * weight_D.double()
    torch.testing.assert_close(rms_norm(x_BTD, weight_D, eps).double(), exact, rtol=FEW_ROUNDINGS, atol=0)


def test_rms_norm_of_zero_is_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(1, 1, 8), torch.ones(8), 1e-5), torch.zeros(1, 1, 8))


def test_swiglu() -> None:
    gate_BTF, up_BTF = 4 * randn(2, 5, 24), randn(2, 5, 24, seed=1)
    exact = gate_BTF.double() / (1 + (-gate_BTF.double()).exp()) * up_BTF.double()
    ours = swiglu(torch.cat((gate_BTF, up_BTF), dim=-1))
    torch.testing.assert_close(ours.double(), exact, rtol=FEW_ROUNDINGS, atol=0)


def test_swiglu_of_extremes_is_finite() -> None:
    gate = torch.tensor([[[-1e4, 1e4, 0.0]]])
    assert swiglu(torch.cat((gate, torch.ones(1, 1, 3)), dim=-1)).tolist() == [[[0.0, 1e4, 0.0]]]


@pytest.mark.parametrize("head_size", [2, 16, 64, 128])
@pytest.mark.parametrize("rope", [pytest.param(rope, id=name) for name, rope in ROPES.items()])
def test_frequencies_are_those_of_transformers(rope: dict[str, Any], head_size: int) -> None:
    reference = tiny_reference(
        head_dim=head_size, num_hidden_layers=1, rope_parameters=rope, max_position_embeddings=9000
    )
    theirs = reference.model.rotary_emb.inv_freq
    torch.testing.assert_close(rope_frequencies(config_with(rope, head_size)), theirs, rtol=FEW_ROUNDINGS, atol=0)


def test_llama3_branches() -> None:
    """Meta's rule, pair by pair: short wavelengths kept, long ones divided, those between interpolated."""
    rope = RopeParameters(theta=5e5, kind="llama3", factor=8.0, original_context_length=512)
    config = config_with(LLAMA3_ROPE)
    assert config.rope == rope
    branches = set()
    for i, frequency in enumerate(rope_frequencies(config).tolist()):
        plain = 5e5 ** (-2 * i / 16)
        turns = 512 * plain / (2 * math.pi)
        if turns > 4:
            branch, expected = "kept", plain
        elif turns < 1:
            branch, expected = "divided", plain / 8
        else:
            smooth = (turns - 1) / 3
            branch, expected = "between", (1 - smooth) * plain / 8 + smooth * plain
        branches.add(branch)
        assert frequency == pytest.approx(expected, rel=1e-6)
    assert branches == {"kept", "divided", "between"}


def test_rotate_is_that_of_transformers() -> None:
    reference = tiny_reference(head_dim=16, num_hidden_layers=1, rope_parameters=LLAMA3_ROPE)
    q_BTNH, k_BTGH = randn(2, 30, 4, 16), randn(2, 30, 2, 16, seed=1)
    cos, sin = reference.model.rotary_emb(q_BTNH, torch.arange(30)[None])
    q_theirs, k_theirs = apply_rotary_pos_emb(q_BTNH.transpose(1, 2), k_BTGH.transpose(1, 2), cos, sin)
    table = RotaryTable(config_with(LLAMA3_ROPE)).between(0, 30)
    torch.testing.assert_close(rotate(q_BTNH, *table), q_theirs.transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate(k_BTGH, *table), k_theirs.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    config = config_with(ROPES["default"])
    cos_TH, sin_TH = RotaryTable(config).between(0, 40)
    q_H, k_H = randn(16), randn(16, seed=1)
    q_THH = rotate(q_H.expand(1, 40, 1, 16), cos_TH, sin_TH)[0, :, 0]
    k_THH = rotate(k_H.expand(1, 40, 1, 16), cos_TH, sin_TH)[0, :, 0]
    torch.testing.assert_close(q_THH.norm(dim=-1), q_H.norm().expand(40), rtol=1e-5, atol=0)
    scores = q_THH @ k_THH.T
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-3, atol=1e-4)


def test_rotate_leaves_its_input_alone() -> None:
    x_BTNH = randn(1, 4, 2, 16)
    before = x_BTNH.clone()
    rotate(x_BTNH, *RotaryTable(config_with(ROPES["default"])).between(0, 4))
    assert torch.equal(x_BTNH, before)


def test_table_grows_and_shrinks_without_changing() -> None:
    config = config_with(LLAMA3_ROPE)
    whole_cos, whole_sin = RotaryTable(config).between(0, 100)
    table = RotaryTable(config)
    for tokens in (3, 100, 7, 1):
        cos, sin = table.between(0, tokens)
        assert torch.equal(cos, whole_cos[:tokens])
        assert torch.equal(sin, whole_sin[:tokens])


def test_a_position_has_the_same_bits_whatever_was_asked_for_before() -> None:
    """Also where a head's half is no whole vector, at positions that end a table."""
    config = config_with(LLAMA3_ROPE, head_size=6)
    whole = RotaryTable(config).between(0, 3000)
    positions = torch.tensor([2999, 0, 128, 130, 127, 129])
    table = RotaryTable(config)
    for end in (1, 129, 131, 1000):
        assert all(map(torch.equal, table.between(0, end), (whole[0][:end], whole[1][:end])))
    assert all(map(torch.equal, table.at(positions), (whole[0][positions], whole[1][positions])))
    assert table.at(positions[:0])[0].shape == (0, 6)


def layers_of(x_MD: Tensor, weight_D: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Compute every layer of some rows; D is 3 heads of H."""
    heads_MNH = x_MD.unflatten(1, (3, -1)).clone()
    rotate_rows(heads_MNH[:, 1:], *angles)
    rotated = rotate(x_MD.unflatten(1, (3, -1))[:, :2], *angles)
    residual = x_MD.clone()
    added = add_rms_norm(residual, x_MD.roll(1, 1), weight_D, 1e-5)
    return rms_norm(x_MD, weight_D, 1e-5), residual, added, swiglu(4 * x_MD), heads_MNH, rotated


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("head_size", [2, 6, 34, 64, 192])
def test_a_row_has_the_same_bits_whatever_is_computed_with_it(head_size: int, threads: int) -> None:
    """Enough rows that threads share them."""
    rows = 1 + (1 << 17) // (3 * head_size) if head_size > 6 else 70
    x_MD, weight_D = randn(rows, 3 * head_size), 1 + randn(3 * head_size, seed=1)
    angles = RotaryTable(config_with(ROPES["default"], head_size)).at(torch.arange(rows) * 7 % 100)
    with using_threads(threads):
        every = layers_of(x_MD, weight_D, angles)
        for first, end in ((0, 1), (rows - 1, rows), (1, 8), (rows // 2, rows), (3, 3)):
            part = slice(first, end)
            some = layers_of(x_MD[part], weight_D, (angles[0][part], angles[1][part]))
            assert all(torch.equal(ours, theirs[part]) for ours, theirs in zip(some, every, strict=True))


def test_instruction_sets_agree_bit_for_bit(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "off":
        pytest.skip("PyTorch's operators round otherwise")
    x_MD, weight_D = 20 * randn(9, 3 * 42), randn(3 * 42, seed=1)
    angles = RotaryTable(config_with(ROPES["default"], 42)).between(50, 59)
    ours = layers_of(x_MD, weight_D, angles)
    monkeypatch.setattr(native, "kernels", lambda: native.Kernels("portable"))
    assert all(map(torch.equal, ours, layers_of(x_MD, weight_D, angles)))


def test_residuals_are_added_before_the_norm() -> None:
    x_MD, added_MD, weight_D = randn(5, 37), randn(5, 37, seed=1), randn(37, seed=2)
    total = x_MD + added_MD
    assert torch.equal(add_rms_norm(x_MD, added_MD, weight_D, 1e-5), rms_norm(total, weight_D, 1e-5))
    assert torch.equal(x_MD, total)


def test_rotate_rows_is_rotate_in_place() -> None:
    x_MNH = randn(7, 5, 16)
    angles = RotaryTable(config_with(ROPES["default"])).at(torch.tensor([4, 0, 9, 9, 1, 77, 3]))
    expected = torch.cat((rotate(x_MNH[:, :3], *angles), x_MNH[:, 3:]), dim=1)
    rotate_rows(x_MNH[:, :3], *angles)
    assert torch.equal(x_MNH, expected)


def test_swiglu_over_the_whole_range() -> None:
    """SiLU's exponential: where it overflows, underflows, and at each power of two."""
    gate_1F = torch.cat((torch.linspace(-120, 120, 4097), torch.tensor([0.0, -0.0, 3e38, -3e38, 1e-45])))[None]
    exact = gate_1F.double() / (1 + (-gate_1F.double()).exp())
    ours = swiglu(torch.cat((gate_1F, torch.ones_like(gate_1F)), dim=-1))
    torch.testing.assert_close(ours.double(), exact, rtol=FEW_ROUNDINGS, atol=1e-35)
    special = torch.tensor([[math.nan, math.inf, 1.0, 1.0]])
    assert swiglu(special.clone()).isnan().tolist() == [[True, False]]
    assert swiglu(special)[0, 1].isinf()


def test_one_position_may_serve_all_tokens() -> None:
    x_BTNH = randn(1, 9, 2, 16)
    cos_TH, sin_TH = RotaryTable(config_with(ROPES["default"])).between(5, 6)
    expected = rotate(x_BTNH, cos_TH.repeat(9, 1), sin_TH.repeat(9, 1))
    assert torch.equal(rotate(x_BTNH, cos_TH, sin_TH), expected)


def test_strided_tensors_are_taken() -> None:
    x_BTD, weight_D = randn(2, 5, 48), randn(96, seed=1)[::2]
    assert torch.equal(rms_norm(x_BTD[:, -1:], weight_D, 1e-5), rms_norm(x_BTD, weight_D, 1e-5)[:, -1:])
    assert torch.equal(swiglu(x_BTD[:, 2:].clone()), swiglu(x_BTD)[:, 2:])


def test_natively_shapes_are_checked(way: str) -> None:
    if way == "off":
        pytest.skip("PyTorch checks them")
    kernels, x, half = native.Kernels(way), torch.zeros(4, 8), torch.zeros(4, 4)
    heads, angles = x.view(4, 2, 4), torch.zeros(4, 4)
    for call, operands in (
        (kernels.rms_norm, (x, x[0, :4], 1e-5, x.clone(), None)),
        (kernels.rms_norm, (x, x[0], 1e-5, half, None)),
        (kernels.rms_norm, (x, x[0], 1e-5, x.clone(), half)),
        (kernels.rms_norm, (x.T, x[:, 0], 1e-5, x.clone(), None)),
        (kernels.rms_norm, (x, x[0], 1e-5, x.clone(), x, half)),
        (kernels.rms_norm, (x, x[0], 1e-5, x.clone(), x, x.T.contiguous().T)),
        (kernels.rms_norm, (x.double(), x[0], 1e-5, x.clone(), None)),
        (kernels.swiglu, (x, x.clone())),
        (kernels.swiglu, (x.double(), half)),
        (kernels.swiglu, (x, half[:3])),
        (kernels.rotate, (heads, angles[:, :2], angles, heads)),
        (kernels.rotate, (heads, angles, angles[:3], heads)),
        (kernels.rotate, (heads.mT, angles[:, :2], angles[:, :2], heads.mT)),
        (kernels.rotate, (heads, angles, angles, heads[:3])),
    ):
        with pytest.raises(ExactnessError, match="a native kernel takes"):
            call(*operands)
    with pytest.raises(ExactnessError, match="no halves"):
        kernels.rotate(heads[..., :3], angles[:, :3], angles[:, :3], heads[..., :3])
