"""Products modulo 2^32 against Python integers; a kernel that errs is found and not used."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsqp.arith import ring
from tsqp.errors import ExactnessError

CPU = torch.device("cpu")
KERNELS: list[ring.Kernel] = [ring.LimbKernel(), ring.Float64Kernel()]
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
    codes = st.lists(st.integers(-127, 127), min_size=inputs, max_size=inputs)
    w = data.draw(st.lists(codes, min_size=outputs, max_size=outputs))
    x_MK, w_NK = torch.tensor(x, dtype=torch.int32), torch.tensor(w, dtype=torch.int8)
    assert kernel.multiply(x_MK, w_NK).tolist() == by_integers(x_MK, w_NK)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("inputs", [ring.FLOAT64_MAX_K, ring.FLOAT64_MAX_K + 1, ring.INT8_MAX_K, ring.INT8_MAX_K + 1])
@pytest.mark.parametrize("word", [-(1 << 31), (1 << 31) - 1, 0x7F7F7F7F, -0x7F7F7F80])
@pytest.mark.parametrize("code", [127, -127])
def test_the_largest_sums_at_the_bounds(kernel: ring.Kernel, inputs: int, word: int, code: int) -> None:
    x_MK = torch.full((2, inputs), word, dtype=torch.int32)
    w_NK = torch.full((3, inputs), code, dtype=torch.int8)
    want = (word * code * inputs) & 0xFFFFFFFF
    assert {value & 0xFFFFFFFF for value in kernel.multiply(x_MK, w_NK).flatten().tolist()} == {want}


def test_both_kernels_agree_on_the_shapes_of_models() -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, inputs, outputs in ((1, 576, 960), (17, 1536, 576), (128, 64, 49)):
        x_MK = torch.randint(-(1 << 31), 1 << 31, (rows, inputs), generator=generator).to(torch.int32)
        w_NK = torch.randint(-127, 128, (outputs, inputs), generator=generator).to(torch.int8)
        results = [kernel.multiply(x_MK, w_NK) for kernel in KERNELS]
        assert torch.equal(*results)


@given(st.lists(WORDS, min_size=1, max_size=20))
def test_limbs_are_balanced_digits(words: list[int]) -> None:
    limbs = ring.limbs(torch.tensor([words], dtype=torch.int32))
    assert limbs.dtype == torch.int8
    assert limbs.shape == (4, len(words))
    for word, digits in zip(words, limbs.T.tolist(), strict=True):
        assert (sum(digit << (8 * place) for place, digit in enumerate(digits)) - word) % (1 << 32) == 0


class _Off:
    """A kernel that errs in one case."""

    name = "off"

    def __init__(self, rows: int, delta: int) -> None:
        self._rows, self._delta = rows, delta

    def multiply(self, x_MK: Tensor, w_NK: Tensor) -> Tensor:
        y_MN = ring.Float64Kernel().multiply(x_MK, w_NK)
        if len(x_MK) == self._rows:
            y_MN[-1, -1] += self._delta
        return y_MN


@pytest.mark.parametrize("rows", [1, 2, 5, 33])
@pytest.mark.parametrize("delta", [1, -(1 << 31)])
def test_a_kernel_that_errs_is_found(rows: int, delta: int) -> None:
    with pytest.raises(ExactnessError, match="off kernel errs"):
        ring.check_exact(_Off(rows, delta), CPU)


class _Saturating:
    """What float32 accumulation would do."""

    name = "float32"

    def multiply(self, x_MK: Tensor, w_NK: Tensor) -> Tensor:
        return (x_MK.float() @ w_NK.float().T).double().remainder(2.0**32).to(torch.int64).to(torch.int32)


def test_a_kernel_that_rounds_is_found() -> None:
    with pytest.raises(ExactnessError, match="float32 kernel errs"):
        ring.check_exact(_Saturating(), CPU)


def test_the_next_kernel_serves_where_the_fastest_errs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring.LimbKernel, "multiply", _Off(1, 1).multiply)
    ring.kernel_for.cache_clear()
    try:
        assert ring.kernel_for(CPU).name == "float64"
        monkeypatch.setattr(ring.Float64Kernel, "multiply", _Saturating().multiply)
        ring.kernel_for.cache_clear()
        with pytest.raises(ExactnessError, match=r"no kernel multiplies exactly on cpu: int8 limbs: .*; float64: "):
            ring.kernel_for(CPU)
    finally:
        ring.kernel_for.cache_clear()


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int8), "expected int32"),
        (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 2), "expected int32"),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int8), "expected int32"),
        (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int8), "rows of 2 and of 3"),
    ],
)
def test_wrong_operands_are_named(x: Tensor, w: Tensor, message: str) -> None:
    with pytest.raises(ExactnessError, match=message):
        ring.multiply(x, w)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 3, 2), (3, 0, 2), (3, 2, 0)])
def test_empty_products(rows: int, inputs: int, outputs: int) -> None:
    y_MN = ring.multiply(torch.zeros(rows, inputs, dtype=torch.int32), torch.zeros(outputs, inputs, dtype=torch.int8))
    assert y_MN.tolist() == torch.zeros(rows, outputs).tolist()
