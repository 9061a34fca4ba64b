"""Native kernels: built where they can be, the same bits as their twins and as Python integers, and checked calls."""

from __future__ import annotations

import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsqp.arith import native, quantize, ring
from tsqp.arith.native import Scaling
from tsqp.arith.quantize import dequantize, largest_norm, quantize_activations
from tsqp.errors import ConfigError, ExactnessError, InputError
from tsqp.threads import using_threads

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ADVERSARIAL = FLOATS | st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 0.1])
SHARED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=native.available())
def kernels(request: pytest.FixtureRequest) -> native.Kernels:
    return native.Kernels(request.param)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with using_threads(request.param):
        yield request.param


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forget what was chosen, before and after."""
    native.kernels.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native.kernels.cache_clear()


def twin(function: object, *operands: object) -> object:
    """Call a function without the extension."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "kernels", lambda: None)
        return function(*operands)  # type: ignore[operator]


def bits(real: Tensor) -> list[int]:
    values: list[int] = real.contiguous().view({8: torch.int64, 4: torch.int32}[real.element_size()]).flatten().tolist()
    return values


def test_the_extension_is_built_where_there_is_a_compiler() -> None:
    """A failure, not a skip: without it nobody would notice that only the twins are tested."""
    if shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"):
        assert native.available(), "run 'make test', which builds it, or: pip install --editable ."


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 577, 130), (7, 64, 16), (13, 33, 83), (50, 700, 333), (129, 1030, 9)])
def test_products_are_the_same_on_any_number_of_threads(
    kernels: native.Kernels, threads: int, shape: tuple[int, int, int]
) -> None:
    x_MK, w_NK = ring.adversarial(*shape)
    want = ring.multiply(x_MK, ring.lay_out(w_NK, ring.Float64Kernel()))
    got = ring.multiply(x_MK, ring.lay_out(w_NK, ring.NativeKernel(kernels)))
    assert torch.equal(got, want), f"{threads} threads"


def test_rows_beyond_one_block_of_packed_words(kernels: native.Kernels) -> None:
    """32 MiB of packed words are two blocks here."""
    x_MK = torch.randint(-(1 << 31), 1 << 31, (70, 131072), generator=torch.Generator().manual_seed(1)).int()
    w_NK = torch.randint(-128, 128, (3, 131072), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    want = ring.multiply(x_MK, ring.lay_out(w_NK, ring.LimbKernel()))
    assert torch.equal(ring.multiply(x_MK, ring.lay_out(w_NK, ring.NativeKernel(kernels))), want)


def test_strided_and_unaligned_words_are_copied(kernels: native.Kernels) -> None:
    x_MK, w_NK = ring.adversarial(6, 40, 20)
    codes = ring.lay_out(w_NK, ring.NativeKernel(kernels))
    want = ring.multiply(x_MK, codes)
    assert torch.equal(ring.multiply(x_MK.T.contiguous().T, codes), want)
    shifted = torch.frombuffer(bytearray(b"\0" + x_MK.numpy().tobytes()), dtype=torch.int32, offset=1).view(6, 40)
    assert shifted.data_ptr() % 4
    assert torch.equal(ring.multiply(shifted, codes), want)


def test_what_does_not_fit_is_refused(kernels: native.Kernels) -> None:
    words, panels = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(1, 2, 16, 2, dtype=torch.int8)
    for x, laid_out, y in (
        (words.float(), panels, torch.zeros(2, 3, dtype=torch.int32)),
        (words, panels, torch.zeros(3, 3, dtype=torch.int32)),
        (words, panels, torch.zeros(2, 17, dtype=torch.int32)),
        (words, panels[:, :1], torch.zeros(2, 3, dtype=torch.int32)),
        (words, panels.int(), torch.zeros(2, 3, dtype=torch.int32)),
        (words, panels, torch.zeros(2, 3)),
        (words, panels, torch.zeros(2, 6, dtype=torch.int32)[:, ::2]),
        (words, panels.transpose(2, 3), torch.zeros(2, 3, dtype=torch.int32)),
    ):
        with pytest.raises(ExactnessError, match="a native kernel takes"):
            kernels.multiply(x, laid_out, y)
    with pytest.raises(ExactnessError, match="a native kernel takes"):
        kernels.dots(words, torch.zeros(3, 5, dtype=torch.int32))
    with pytest.raises(ExactnessError, match="a native kernel takes"):
        kernels.unmasking(torch.zeros(3, 4, dtype=torch.int32), words[:1], words, None)
    one_row = Scaling(torch.ones(1, 1, dtype=torch.float64), torch.ones(4))
    with pytest.raises(ExactnessError, match="a native kernel takes"):
        kernels.unmasking(torch.zeros(3, 4, dtype=torch.int32), None, words.clone(), one_row)
    with pytest.raises(ExactnessError, match="a native kernel takes"):
        kernels.unmasking(torch.zeros(3, 4, dtype=torch.int32), None, words.clone(), None)(words[:1])
    with pytest.raises(ExactnessError, match="a native kernel takes"):
        kernels.dequantize(words, Scaling(torch.zeros(2, 1), torch.zeros(4)), torch.zeros(2, 4))
    with pytest.raises(ExactnessError, match="a native kernel takes"):
        kernels.quantize(torch.zeros(2, 4, dtype=torch.float64), 1.0)


def by_floats(xs: list[float], largest: float) -> tuple[list[int], float]:
    """Quantise one row in Python's floats, which are float64, in the stated order."""
    lanes = [0.0] * 16
    for index, x in enumerate(xs):
        lanes[index % 16] += x * x
    for half in (8, 4, 2, 1):
        lanes = [lanes[lane] + lanes[lane + half] for lane in range(half)]
    room = quantize.L - largest * math.sqrt(len(xs)) / 2
    scale = math.sqrt(lanes[0]) * (largest / room) or 1.0
    inverse = 1 / scale if largest else 0.0
    return [round(x * inverse) for x in xs], scale


@SHARED
@given(st.lists(ADVERSARIAL, min_size=1, max_size=70), st.sampled_from([0.0, 1.0, 127.0, 2931.5, 2.0**24]))
@example([1e-45] * 17, 1.0)
@example([3.4028235e38] * 33, 2.0**24)
@example([0.0] * 5, 127.0)
def test_activations_are_quantised_as_stated(kernels: native.Kernels, values: list[float], largest: float) -> None:
    x_1K = torch.tensor([values], dtype=torch.float32)
    integers, scale = by_floats(x_1K[0].tolist(), largest)
    with pytest.MonkeyPatch.context() as patch:
        for chosen in (kernels, None):
            patch.setattr(native, "kernels", lambda chosen=chosen: chosen)
            xq_1K, scale_11 = quantize_activations(x_1K, largest)
            assert xq_1K.tolist() == [integers]
            assert scale_11.item() == scale


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 15), (4, 16), (9, 577), (130, 2048)])
def test_quantising_is_the_same_everywhere(kernels: native.Kernels, threads: int, shape: tuple[int, int]) -> None:
    x_MK = torch.randn(shape, generator=torch.Generator().manual_seed(threads)) ** 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "kernels", lambda: kernels)
        ours = quantize_activations(x_MK, 3000.0)
        strided = quantize_activations(x_MK.T.contiguous().T, 3000.0)
    theirs = twin(quantize_activations, x_MK, 3000.0)
    for got in (ours, strided):
        assert torch.equal(got[0], theirs[0])  # type: ignore[index]
        assert bits(got[1]) == bits(theirs[1])  # type: ignore[index]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("largest", [0.0, 127.0])
@pytest.mark.parametrize("where", [(0, 0), (4, 36), (2, 16)])
def test_what_is_not_finite_is_refused(
    kernels: native.Kernels, bad: float, largest: float, where: tuple[int, int]
) -> None:
    x_MK = torch.ones(5, 37)
    x_MK[where] = bad
    assert kernels.quantize(x_MK, largest)[2] == 1
    for chosen in (kernels, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "kernels", lambda chosen=chosen: chosen)
            with pytest.raises(InputError, match="infinite or not a number"):
                quantize_activations(x_MK, largest)


@SHARED
@given(st.data(), st.integers(0, 5), st.integers(0, 40), st.sampled_from(["biased", "plain"]), st.sampled_from("io"))
def test_integers_are_scaled_back_the_same(
    kernels: native.Kernels,
    data: st.DataObject,
    rows: int,
    outputs: int,
    biased: str,
    place: str,
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    y_MN = torch.randint(-(1 << 31), 1 << 31, (rows, outputs), generator=generator).int()
    scale_M1 = torch.rand(rows, 1, generator=generator, dtype=torch.float64) * 10.0 ** data.draw(st.integers(-44, 30))
    scale_N, bias_N = torch.rand(2, outputs, generator=generator)
    scaling = Scaling(scale_M1, scale_N, bias_N if biased == "biased" else None)
    theirs = twin(dequantize, y_MN, scaling)
    assert isinstance(theirs, Tensor)
    with pytest.MonkeyPatch.context() as patch:
        for chosen in (kernels, None):
            patch.setattr(native, "kernels", lambda chosen=chosen: chosen)
            words_MN = y_MN.clone()
            out_MN = words_MN.view(torch.float32) if place == "i" else None
            ours = dequantize(words_MN, scaling, out_MN)
            assert bits(ours) == bits(theirs)
            assert (ours.data_ptr() == words_MN.data_ptr()) == (place == "i") or not ours.numel()


def rounded(value: float) -> float:
    """Round to float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def test_scaling_back_rounds_after_each_operation(kernels: native.Kernels) -> None:
    """A fused multiplication and addition would give other last bits."""
    y_MN = torch.arange(16777000, 16778000, dtype=torch.int32).view(1, -1)
    scale_N = torch.rand(1000, generator=torch.Generator().manual_seed(5)) + 0.5
    bias_N = -y_MN[0].float() * scale_N
    out_MN = torch.empty(1, 1000)
    kernels.dequantize(y_MN, Scaling(torch.tensor([[1 / 3]], dtype=torch.float64), scale_N, bias_N), out_MN)
    third = rounded(1 / 3)
    for word, scale, bias, got in zip(
        y_MN[0].tolist(), scale_N.tolist(), bias_N.tolist(), out_MN[0].tolist(), strict=True
    ):
        assert got == rounded(rounded(rounded(rounded(word) * third) * scale) + bias)


def test_calls_at_the_same_time_are_right(kernels: native.Kernels) -> None:
    """One has the threads, the others work alone."""
    x_MK, w_NK = ring.adversarial(64, 600, 400)
    codes = ring.lay_out(w_NK, ring.NativeKernel(kernels))
    want = ring.multiply(x_MK, codes)
    with using_threads(3), ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda _: ring.multiply(x_MK, codes), range(24)))
    assert all(torch.equal(result, want) for result in results)


IN_A_FORK = """
import os, sys, torch
from tsqp.arith import native, ring
torch.set_num_threads(2)
x, w = ring.adversarial(64, 600, 400)
codes = ring.lay_out(w)
want = ring.multiply(x, codes)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(ring.multiply(x, codes), want) else 1)
status = os.waitpid(child, 0)[1]
sys.exit(os.waitstatus_to_exitcode(status) or not torch.equal(ring.multiply(x, codes), want))
"""


def test_a_fork_multiplies_too() -> None:
    """Threads do not live on in a child: it must not wait for them."""
    environment = {**os.environ, native.VARIABLE: native.available()[-1]}
    subprocess.run([sys.executable, "-W", "ignore", "-c", IN_A_FORK], check=True, timeout=120, env=environment)


@pytest.mark.parametrize("asked", ["off", *native.available()])
def test_the_variable_chooses(fresh: pytest.MonkeyPatch, asked: str) -> None:
    fresh.setenv(native.VARIABLE, asked)
    chosen = native.kernels()
    assert (chosen.instructions if chosen else "off") == asked
    assert bool(native.notice()) == (asked == "off")


def test_the_best_instruction_set_is_the_default(fresh: pytest.MonkeyPatch) -> None:
    fresh.delenv(native.VARIABLE, raising=False)
    chosen = native.kernels()
    assert chosen is not None
    assert chosen.instructions == native.available()[-1]


def test_what_is_unknown_or_not_there_is_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(native.VARIABLE, "avx9")
    with pytest.raises(ConfigError, match="TSQP_NATIVE=avx9: expected off, portable, avx2 or avx512-vnni"):
        native.kernels()
    fresh.setattr(native, "available", lambda: ("portable",))
    fresh.setenv(native.VARIABLE, "avx512-vnni")
    with pytest.raises(ConfigError, match="this processor has portable"):
        native.kernels()


def test_without_the_extension_the_twins_serve(fresh: pytest.MonkeyPatch) -> None:
    fresh.delenv(native.VARIABLE, raising=False)
    fresh.setattr(native, "_extension", None)
    fresh.setattr(native, "_reason", "no such module")
    assert native.kernels() is None
    assert "install a C compiler" in (native.notice() or "")
    native.kernels.cache_clear()
    fresh.setenv(native.VARIABLE, "portable")
    with pytest.raises(ConfigError, match=r"not built \(no such module\)"):
        native.kernels()


OFF = """
import sys, torch
from tsqp.arith import native, quantize, ring
from tsqp.enclave.freivalds import Checker
from tsqp.wire.codec import Claim
torch.manual_seed(0)
x, w = torch.randn(5, 96), torch.randint(-127, 128, (48, 96)).to(torch.int8)
codes = ring.lay_out(w)
xq, scale = quantize.quantize_activations(x, quantize.largest_norm(w))
y = ring.multiply(xq, codes)
checker = Checker("a", 48, 96)
checker.absorb(w)
scaling = native.Scaling(scale, torch.rand(48), torch.rand(48))
real = checker.verified(Claim(y, ""), checker.expect(xq, (), scaling), ())
print(codes.kernel.name, real.view(torch.int32).tolist())
"""


def test_a_whole_product_has_the_same_bits_without_native_kernels(tmp_path: Path) -> None:
    printed = {}
    for asked in ("off", *native.available()):
        environment = {**os.environ, native.VARIABLE: asked}
        done = subprocess.run(
            [sys.executable, "-c", OFF], check=True, capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        name, _, printed[asked] = done.stdout.partition("[[")
        assert name.strip() == ("int8 limbs" if asked == "off" else f"native {asked}")
    assert len(set(printed.values())) == 1


def test_the_bound_holds_at_the_largest_activations(kernels: native.Kernels) -> None:
    """X along the codes, where Cauchy-Schwarz is tight: no product leaves the centred range."""
    w_NK = torch.full((1, 4096), 127, dtype=torch.int8)
    largest = largest_norm(w_NK)
    for value in (1e-45, 1.0, 3.4e38):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "kernels", lambda: kernels)
            xq_1K, _ = quantize_activations(torch.full((1, 4096), value), largest)
        assert 0 < 127 * int(xq_1K.sum()) <= quantize.L
