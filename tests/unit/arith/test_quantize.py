"""int8 weights and bounded activations: the bound holds for every input, and nothing is lost that it does not force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tsqp.arith import quantize, ring
from tsqp.arith.native import Scaling
from tsqp.arith.quantize import L, dequantize, largest_norm, quantize_activations, quantize_weights
from tsqp.errors import ExactnessError, InputError, WeightsError

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(
    st.lists(FLOATS, min_size=1, max_size=64),
    st.lists(st.integers(-127, 127), min_size=64, max_size=64),
    st.booleans(),
)
@example([1.0] * 64, [127] * 64, True)
@example([3.4e38] * 64, [127] * 64, False)
@example([1e-45] * 64, [1] + [0] * 63, False)
def test_no_product_leaves_the_centred_range(xs: list[float], codes: list[int], aligned: bool) -> None:  # noqa: FBT001
    """In Python integers. ``aligned``: x along the codes, where Cauchy-Schwarz is tight."""
    codes = codes[: len(xs)]
    x_1K = torch.tensor([[float(code) for code in codes]] if aligned else [xs], dtype=torch.float32)
    w_NK = torch.tensor([codes], dtype=torch.int8)
    xq_1K, _ = quantize_activations(x_1K, largest_norm(w_NK))
    exact = sum(map(int.__mul__, xq_1K[0].tolist(), codes))
    assert abs(exact) <= L
    assert ring.multiply(xq_1K, ring.lay_out(w_NK)).item() == exact


def test_the_range_is_used_to_the_last_bit() -> None:
    """Where x lies along a code row, the product comes within rounding of L."""
    w_NK = torch.full((1, 576), 127, dtype=torch.int8)
    xq_1K, _ = quantize_activations(torch.ones(1, 576), largest_norm(w_NK))
    product = 576 * 127 * int(xq_1K[0, 0])
    assert L - 576 * 127 * 2 < product <= L


def test_activations_keep_the_precision_the_bound_leaves() -> None:
    generator = torch.Generator().manual_seed(2)
    x_MK = torch.randn(16, 576, generator=generator)
    codes, _ = quantize_weights(torch.randn(960, 576, generator=generator))
    xq_MK, scale_M1 = quantize_activations(x_MK, largest_norm(codes))
    assert torch.allclose(xq_MK * scale_M1, x_MK.double(), rtol=0, atol=float(scale_M1.max()) / 2 * (1 + 1e-9))
    assert int(xq_MK.abs().max()) > 1 << 16


def test_products_come_back_near_the_real_ones() -> None:
    generator = torch.Generator().manual_seed(3)
    x_MK, w_NK = torch.randn(8, 256, generator=generator), torch.randn(32, 256, generator=generator)
    codes, scale_N = quantize_weights(w_NK)
    xq_MK, scale_M1 = quantize_activations(x_MK, largest_norm(codes))
    y_MN = dequantize(ring.multiply(xq_MK, ring.lay_out(codes)), Scaling(scale_M1, scale_N))
    rounded = x_MK.double() @ (codes * scale_N[:, None].double()).T
    assert torch.allclose(y_MN.double(), rounded, rtol=1e-4, atol=1e-3)
    assert (y_MN - x_MK @ w_NK.T).abs().max() < 0.02 * (x_MK @ w_NK.T).abs().max()


@settings(deadline=None)
@given(st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=5))
def test_weights_are_at_most_half_a_step_off(rows: list[list[float]]) -> None:
    w_NK = torch.tensor(rows, dtype=torch.float32)
    codes, scale_N = quantize_weights(w_NK)
    assert int(codes.to(torch.int32).abs().max()) <= 127
    steps = (w_NK.double() / scale_N[:, None].double() - codes.double()).abs()
    assert float(steps.max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    values = torch.ones(2, 4)
    values[1, 2] = bad
    with pytest.raises(WeightsError, match="infinite or not a number"):
        quantize_weights(values)
    with pytest.raises(InputError, match="infinite or not a number"):
        quantize_activations(values, 127.0)


def test_zeros_stay_zeros() -> None:
    codes, scale_N = quantize_weights(torch.zeros(3, 4))
    assert codes.tolist() == torch.zeros(3, 4).tolist()
    assert scale_N.tolist() == [1.0] * 3
    assert largest_norm(codes) == 0.0
    for x_MK, largest in ((torch.zeros(2, 4), 5.0), (torch.ones(2, 4), 0.0)):
        xq_MK, scale_M1 = quantize_activations(x_MK, largest)
        assert xq_MK.tolist() == torch.zeros(2, 4).tolist()
        assert scale_M1.tolist() == [[1.0]] * 2


@given(st.lists(st.integers(-127, 127), min_size=1, max_size=50))
def test_the_norm_is_never_rounded_down(codes: list[int]) -> None:
    largest = largest_norm(torch.tensor([codes], dtype=torch.int8))
    squares = sum(code * code for code in codes)
    numerator, denominator = largest.as_integer_ratio()
    assert numerator**2 >= squares * denominator**2
    assert largest <= math.sqrt(squares) * (1 + 1e-15)


@pytest.mark.parametrize("position", [0, 1, 17, 99])
def test_the_largest_row_counts_wherever_it_is(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.ones(100, 40, dtype=torch.int8)
    codes[position] = -127
    expected = largest_norm(codes[position : position + 1])
    for block in (1, 40, 81, 4000, 1 << 20):
        monkeypatch.setattr(quantize, "_NORM_BLOCK", block)
        assert largest_norm(codes) == expected


@pytest.mark.parametrize(("inputs", "largest"), [((1 << 22) + 1, 1.0), (4, float(L)), (4, 0.5)])
def test_beyond_the_bound_nothing_is_quantised(inputs: int, largest: float) -> None:
    with pytest.raises(ExactnessError, match="leave no exact range"):
        quantize_activations(torch.ones(1, inputs), largest)
