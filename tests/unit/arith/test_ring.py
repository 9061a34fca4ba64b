"""Products modulo 2^32 against Python integers; a kernel that errs is found and not used."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsqp.arith import native, ring
from tsqp.errors import ExactnessError

CPU = torch.device("cpu")
NATIVE: list[ring.Kernel] = [ring.NativeKernel(native.Kernels(name)) for name in native.available()]
# As it pads for CUDA.
ON_CUDA = ring.LimbKernel(ring.CUDA_MULTIPLE, ring.CUDA_MIN_ROWS)
KERNELS: list[ring.Kernel] = [*NATIVE, ring.LimbKernel(), ON_CUDA, ring.Float64Kernel()]
WORDS = st.integers(-(1 << 31), (1 << 31) - 1)


def by_integers(x_MK: Tensor, w_NK: Tensor) -> list[list[int]]:
    def dot(a: Sequence[int], b: Sequence[int]) -> int:
        total = sum(map(int.__mul__, a, b)) & 0xFFFFFFFF
        return total - (1 << 32) if total >> 31 else total

    return [[dot(x, w) for w in w_NK.tolist()] for x in x_MK.tolist()]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@settings(deadline=None)
@given(data=st.data(), rows=st.integers(1, 5), inputs=st.integers(1, 40), outputs=st.integers(1, 6))
def test_any_words_and_codes(kernel: ring.Kernel, data: st.DataObject, rows: int, inputs: int, outputs: int) -> None:
    x = data.draw(st.lists(st.lists(WORDS, min_size=inputs, max_size=inputs), min_size=rows, max_size=rows))
    codes = st.lists(st.integers(-128, 127), min_size=inputs, max_size=inputs)
    w = data.draw(st.lists(codes, min_size=outputs, max_size=outputs))
    x_MK, w_NK = torch.tensor(x, dtype=torch.int32), torch.tensor(w, dtype=torch.int8)
    assert ring.multiply(x_MK, ring.lay_out(w_NK, kernel)).tolist() == by_integers(x_MK, w_NK)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("inputs", [ring.FLOAT64_MAX_K, ring.FLOAT64_MAX_K + 1, ring.INT8_MAX_K, ring.INT8_MAX_K + 1])
@pytest.mark.parametrize("word", [-(1 << 31), (1 << 31) - 1, 0x7F7F7F7F, -0x7F7F7F80])
@pytest.mark.parametrize("code", [127, -127, -128])
def test_the_largest_sums_at_the_bounds(kernel: ring.Kernel, inputs: int, word: int, code: int) -> None:
    x_MK = torch.full((2, inputs), word, dtype=torch.int32)
    w_NK = torch.full((3, inputs), code, dtype=torch.int8)
    want = (word * code * inputs) & 0xFFFFFFFF
    assert {value & 0xFFFFFFFF for value in ring.multiply(x_MK, ring.lay_out(w_NK, kernel)).flatten().tolist()} == {
        want
    }


def test_kernels_agree_on_the_shapes_of_models() -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, inputs, outputs in ((1, 576, 960), (17, 1536, 576), (128, 64, 49)):
        x_MK = torch.randint(-(1 << 31), 1 << 31, (rows, inputs), generator=generator).to(torch.int32)
        w_NK = torch.randint(-127, 128, (outputs, inputs), generator=generator).to(torch.int8)
        first, *others = (ring.multiply(x_MK, ring.lay_out(w_NK, kernel)) for kernel in KERNELS)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 33, 83), (5, 64, 24), (2, ring.INT8_MAX_K + 9, 8)])
def test_int8_products_have_sizes_that_cuda_takes(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 16 rows, and multiples of 8; the codes are there already."""
    sizes: list[tuple[int, int, int]] = []
    int_mm = ring._int_mm

    def watched(a_MK: Tensor, b_NK: Tensor) -> Tensor:
        assert b_NK.untyped_storage().data_ptr() == codes.laid_out.untyped_storage().data_ptr()
        sizes.append((len(a_MK), a_MK.shape[1], len(b_NK)))
        return int_mm(a_MK, b_NK)

    monkeypatch.setattr(ring, "_int_mm", watched)
    x_MK, w_NK = ring.adversarial(*shape)
    codes = ring.lay_out(w_NK, ON_CUDA)
    ring.multiply(x_MK, codes)
    assert torch.equal(codes.plain(), w_NK)
    assert sizes
    for rows, inputs, outputs in sizes:
        assert rows >= 17
        assert inputs % 8 == outputs % 8 == 0


@given(st.lists(WORDS, min_size=1, max_size=20))
def test_limbs_are_balanced_digits(words: list[int]) -> None:
    limbs = ring.limbs(torch.tensor([words], dtype=torch.int32))
    assert limbs.dtype == torch.int8
    assert limbs.shape == (4, len(words))
    for word, digits in zip(words, limbs.T.tolist(), strict=True):
        assert (sum(digit << (8 * place) for place, digit in enumerate(digits)) - word) % (1 << 32) == 0


class _Off(ring.Float64Kernel):
    """A kernel that errs in one case."""

    name = "off"

    def __init__(self, rows: int, delta: int) -> None:
        self._rows, self._delta = rows, delta

    def multiply(self, x_MK: Tensor, codes: ring.Codes, out_MN: Tensor) -> None:
        super().multiply(x_MK, codes, out_MN)
        if len(x_MK) == self._rows:
            out_MN[-1, -1] += self._delta


@pytest.mark.parametrize("rows", [1, 2, 5, 33])
@pytest.mark.parametrize("delta", [1, -(1 << 31)])
def test_a_kernel_that_errs_is_found(rows: int, delta: int) -> None:
    with pytest.raises(ExactnessError, match="off kernel errs"):
        ring.check_exact(_Off(rows, delta), CPU)


class _Saturating(ring.Float64Kernel):
    """What float32 accumulation would do."""

    name = "float32"

    def multiply(self, x_MK: Tensor, codes: ring.Codes, out_MN: Tensor) -> None:
        y_MN = x_MK.float() @ codes.laid_out.float().T
        out_MN.copy_(y_MN.double().remainder(2.0**32).to(torch.int64).to(torch.int32))


def test_a_kernel_that_rounds_is_found() -> None:
    with pytest.raises(ExactnessError, match="float32 kernel errs"):
        ring.check_exact(_Saturating(), CPU)


def test_the_next_kernel_serves_where_the_fastest_errs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", lambda: native.Kernels("portable"))
    ring.tried.cache_clear()
    try:
        assert ring.kernel_for(CPU).name == "native portable"
        monkeypatch.setattr(ring.NativeKernel, "multiply", lambda _self, _x, _codes, out_MN: out_MN.zero_())
        ring.tried.cache_clear()
        assert ring.kernel_for(CPU).name == "int8 limbs"
        monkeypatch.setattr(ring.LimbKernel, "multiply", _Off(1, 1).multiply)
        ring.tried.cache_clear()
        assert ring.kernel_for(CPU).name == "float64"
        monkeypatch.setattr(ring.Float64Kernel, "multiply", _Saturating().multiply)
        ring.tried.cache_clear()
        with pytest.raises(ExactnessError, match=r"exactly on cpu: native portable: .*; int8 limbs: .*; float64: "):
            ring.kernel_for(CPU)
    finally:
        ring.tried.cache_clear()


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int8), "expected int32"),
        (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 2), "expected int8"),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int8), "expected int32"),
        (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int8), "rows of 2 and of 3"),
    ],
)
def test_wrong_operands_are_named(x: Tensor, w: Tensor, message: str) -> None:
    with pytest.raises(ExactnessError, match=message):
        ring.multiply(x, ring.lay_out(w))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 3, 2), (3, 0, 2), (3, 2, 0)])
def test_empty_products(kernel: ring.Kernel, rows: int, inputs: int, outputs: int) -> None:
    codes = ring.lay_out(torch.zeros(outputs, inputs, dtype=torch.int8), kernel)
    y_MN = ring.multiply(torch.zeros(rows, inputs, dtype=torch.int32), codes)
    assert y_MN.tolist() == torch.zeros(rows, outputs).tolist()
    assert codes.plain().shape == (outputs, inputs)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (16, 2), (17, 3), (50, 31), (96, 64)])
def test_codes_come_back_as_they_were_given(kernel: ring.Kernel, outputs: int, inputs: int) -> None:
    w_NK = torch.randint(-128, 128, (outputs, inputs), generator=torch.Generator().manual_seed(outputs)).to(torch.int8)
    codes = ring.lay_out(w_NK, kernel)
    assert (codes.rows, codes.inputs, codes.device) == (outputs, inputs, CPU)
    assert codes.nbytes >= w_NK.nbytes
    assert torch.equal(codes.plain(), w_NK)
    assert torch.equal(ring.lay_out(w_NK[1:], kernel).plain(), w_NK[1:])
    for first in (0, 1, outputs // 2, outputs - 1, outputs):
        for rows in (0, 1, outputs // 3, outputs - first):
            assert torch.equal(codes.plain(first, min(rows, outputs - first)), w_NK[first : first + rows])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_product_goes_where_it_is_asked_to(kernel: ring.Kernel) -> None:
    x_MK, w_NK = ring.adversarial(7, 33, 21)
    out_MN = torch.full((7, 21), 9, dtype=torch.int32)
    assert ring.multiply(x_MK, ring.lay_out(w_NK, kernel), out_MN) is out_MN
    assert out_MN.tolist() == by_integers(x_MK, w_NK)
    for wrong in (torch.zeros(7, 21), torch.zeros(7, 20, dtype=torch.int32), torch.zeros(21, 7, dtype=torch.int32).T):
        with pytest.raises(ExactnessError, match="cannot go to"):
            ring.multiply(x_MK, ring.lay_out(w_NK, kernel), wrong)
