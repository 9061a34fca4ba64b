"""Float32 products by the native kernel: within a bound, the same bits for a row whatever is around it, in place."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tsqp.arith import native, panels
from tsqp.errors import ExactnessError
from tsqp.threads import using_threads

CPU = torch.device("cpu")
# Rows, inputs, outputs: parts of panels, of blocks and of tiles; pieces of the inputs; more rows than sums fit for.
SHAPES = [
    *((rows, 37, 83) for rows in range(1, 31)),
    (1, 1, 1),
    (9, 1, 16),
    (3, 64, 17),
    (4, 5, 191),
    (131, 19, 50),
    (270, 40, 33),
    (400, 7, 16),
    (2, 30, 170),
    (1, 1025, 100),
    (17, 3000, 49),
    (140, 2049, 130),
]


@pytest.fixture(params=[name for name in native.available() if native.Kernels(name).multiplies_floats])
def kernels(request: pytest.FixtureRequest) -> native.Kernels:
    return native.Kernels(request.param)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with using_threads(request.param):
        yield request.param


def operands(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + inputs + outputs)
    x_MK, w_NK = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    return x_MK, w_NK, torch.randn(outputs, generator=generator)


def multiply(kernels: native.Kernels, x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    y_MN = torch.full((len(x_MK), len(w_NK)), torch.nan)
    kernels.multiply_floats(x_MK, panels.lay_out(w_NK), bias_N, y_MN)
    return y_MN


def assert_within_bound(y_MN: Tensor, x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> None:
    """K operations, each rounded once: off by at most (K + 1) 2^-24 of the terms' magnitudes (Higham 2002, 3.1)."""
    added_N = torch.zeros(len(w_NK), dtype=torch.float64) if bias_N is None else bias_N.double()
    exact = x_MK.double() @ w_NK.double().T + added_N
    magnitude = x_MK.double().abs() @ w_NK.double().abs().T + added_N.abs()
    assert ((y_MN - exact).abs() <= (x_MK.shape[1] + 1) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_within_their_bound(
    kernels: native.Kernels, threads: int, shape: tuple[int, int, int], *, biased: bool
) -> None:
    x_MK, w_NK, bias_N = operands(*shape)
    added = bias_N if biased else None
    assert_within_bound(multiply(kernels, x_MK, w_NK, added), x_MK, w_NK, added)
    assert threads == torch.get_num_threads()


@pytest.mark.parametrize("inputs", [1, 40, 1500])
@pytest.mark.parametrize("outputs", [16, 100, 531])
def test_a_rows_bits_depend_on_nothing_around_it(kernels: native.Kernels, inputs: int, outputs: int) -> None:
    """Not on the number of rows, where in the product it stands, the threads or the instruction set."""
    x_MK, w_NK, bias_N = operands(150, inputs, outputs)
    with using_threads(1):
        best = native.Kernels(native.available()[-1])
        want = torch.cat([multiply(best, row[None], w_NK, bias_N) for row in x_MK])
    for rows in (*range(1, 20), 30, 128, 150):
        for threads in (1, 2):
            with using_threads(threads):
                for first in (0, 150 - rows):
                    some = slice(first, first + rows)
                    assert torch.equal(multiply(kernels, x_MK[some], w_NK, bias_N), want[some]), (rows, threads)


def fused(terms: list[tuple[float, float]], bias: float) -> float:
    """Add products in the stated order, each rounded once to float32; of small integers, so that float64 is exact."""
    total = bias
    for x, w in terms:
        total = struct.unpack("f", struct.pack("f", total + x * w))[0]
    return total


def test_the_order_is_the_stated_one(kernels: native.Kernels) -> None:
    """Where sums round: 24-bit bias, 14-bit factors."""
    generator = torch.Generator().manual_seed(0)
    x_MK = torch.randint(-9999, 9999, (3, 1100), generator=generator).float()
    w_NK = torch.randint(-9999, 9999, (18, 1100), generator=generator).float()
    bias_N = torch.randint(-(1 << 23), 1 << 23, (18,), generator=generator).float()
    got = multiply(kernels, x_MK, w_NK, bias_N)
    for r, x_K in enumerate(x_MK.tolist()):
        for n, w_K in enumerate(w_NK.tolist()):
            assert got[r, n].item() == fused(list(zip(x_K, w_K, strict=True)), bias_N[n].item())


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 64, 17), (13, 1030, 83), (131, 33, 100), (4, 8, 200)], ids=str)
def test_nothing_outside_the_result_is_written(
    kernels: native.Kernels, threads: int, shape: tuple[int, int, int]
) -> None:
    x_MK, w_NK, bias_N = operands(*shape)
    rows, outputs, margin = shape[0], shape[2], 100
    memory = torch.full((margin + rows * outputs + margin,), torch.nan)
    inside = slice(margin, margin + rows * outputs)
    kernels.multiply_floats(x_MK, panels.lay_out(w_NK), bias_N, memory[inside].view(rows, outputs))
    assert_within_bound(memory[inside].view(rows, outputs), x_MK, w_NK, bias_N)
    memory[inside] = torch.nan
    assert memory.isnan().all(), f"{threads} threads"
    assert torch.equal(x_MK, operands(*shape)[0])


def test_rows_may_be_of_wider_ones(kernels: native.Kernels, threads: int) -> None:
    x_MK, w_NK, bias_N = operands(131, 40, 35)
    want = multiply(kernels, x_MK, w_NK, bias_N)
    wide, out = torch.full((131, 60), torch.nan), torch.full((131, 50), torch.nan)
    wide[:, 7:47] = x_MK
    kernels.multiply_floats(wide[:, 7:47], panels.lay_out(w_NK), bias_N, out[:, 9:44])
    assert torch.equal(out[:, 9:44], want), f"{threads} threads"
    out[:, 9:44] = torch.nan
    assert out.isnan().all()


def test_strided_and_unaligned_rows_are_copied(kernels: native.Kernels) -> None:
    x_MK, w_NK, bias_N = operands(6, 40, 20)
    want = multiply(kernels, x_MK, w_NK, bias_N)
    assert torch.equal(multiply(kernels, x_MK.T.contiguous().T, w_NK, bias_N), want)
    assert torch.equal(multiply(kernels, x_MK, w_NK, torch.stack([bias_N, bias_N], dim=1)[:, 0]), want)
    shifted = torch.frombuffer(bytearray(b"\0" + x_MK.numpy().tobytes()), dtype=torch.float32, offset=1).view(6, 40)
    assert shifted.data_ptr() % 4
    assert torch.equal(multiply(kernels, shifted, w_NK, bias_N), want)


def test_of_nothing_comes_nothing(kernels: native.Kernels) -> None:
    assert multiply(kernels, torch.zeros(0, 5), torch.zeros(3, 5), None).shape == (0, 3)


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 64])
def test_panels_hold_the_weights(outputs: int) -> None:
    w_NK = operands(1, 9, outputs)[1]
    laid_out = panels.lay_out(w_NK)
    assert laid_out.shape == (-(-outputs // 16), 9, 16)
    assert torch.equal(panels.plain(laid_out, outputs), w_NK)
    assert laid_out.count_nonzero() == w_NK.count_nonzero()
    w_NK.zero_()  # loading reuses the memory that it lays out from
    assert laid_out.count_nonzero() == 9 * outputs


def test_rows_are_taken_out_of_panels() -> None:
    w_NK = operands(1, 9, 35)[1]
    index_M = torch.tensor([34, 0, 16, 15, 0])
    assert torch.equal(panels.rows(panels.lay_out(w_NK), index_M), w_NK[index_M])


def test_what_does_not_fit_is_refused(kernels: native.Kernels) -> None:
    x, laid_out, bias, y = torch.zeros(2, 4), torch.zeros(1, 4, 16), torch.zeros(3), torch.zeros(2, 3)
    for wrong in (
        (x.double(), laid_out, bias, y),
        (x[:, :0], laid_out[:, :0], bias, y),
        (x, laid_out.double(), bias, y),
        (x, laid_out[:, :3], bias, y),
        (x, laid_out.transpose(1, 2).contiguous().transpose(1, 2), bias, y),
        (x, laid_out, bias[:2], y),
        (x, laid_out, bias.int(), y),
        (x, laid_out, bias, torch.zeros(3, 3)),
        (x, laid_out, bias, torch.zeros(2, 17)),
        (x, laid_out, bias, torch.zeros(2, 6)[:, ::2]),
        (x, laid_out, bias, torch.zeros(1, 3).expand(2, 3)),
        (x, laid_out, bias, y.int()),
    ):
        with pytest.raises(ExactnessError, match="a native kernel takes"):
            kernels.multiply_floats(*wrong)


def test_the_portable_instructions_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    portable = native.Kernels("portable")
    assert not portable.multiplies_floats
    with pytest.raises(NotImplementedError, match="AVX2 with FMA"):
        multiply(portable, *operands(2, 3, 4))
    monkeypatch.setattr(native, "kernels", lambda: portable)
    assert panels.kernels_for(torch.float32, CPU) is None


def test_only_float32_on_the_cpu_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    best = native.Kernels(native.available()[-1])
    monkeypatch.setattr(native, "kernels", lambda: best)
    assert panels.kernels_for(torch.float32, CPU) is (best if best.multiplies_floats else None)
    assert panels.kernels_for(torch.bfloat16, CPU) is None
    assert panels.kernels_for(torch.float32, torch.device("cuda")) is None
    monkeypatch.setattr(native, "kernels", lambda: None)
    assert panels.kernels_for(torch.float32, CPU) is None
