"""Drawing a token, by the native kernel and by NumPy, against a slow float64 reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tsqp.arith import native
from tsqp.arith.layer_kernels import Filters
from tsqp.engine.api import Sampling
from tsqp.engine.sampling import Floats, Sampler, draw
from tsqp.errors import ExactnessError

Probabilities = npt.NDArray[np.float64]

NATIVE = [name for name in native.available() if native.Kernels(name).draws]
# Weights are float32: this much of a distribution function lies between two ways of computing it.
ROUNDING = 1e-5
# More than a vocabulary's tokens have between a bound and its neighbours.
NEAR = 1e-6
ALMOST_ONE = math.nextafter(1, 0)


@pytest.fixture(params=["numpy", *NATIVE], scope="module", autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    kernels = None if request.param == "numpy" else native.Kernels(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "kernels", lambda: kernels)
        yield request.param


def probabilities(logits_V: Floats, filters: Filters) -> Probabilities:
    """Return what is left of softmax, by the definitions of ``kept_tokens``, with everything sorted."""
    temperature, top_k, top_p, min_p = filters
    weights = np.exp((logits_V.astype(np.float64) - float(logits_V.max())) / temperature)
    # The likeliest first, and the lowest first of equals.
    order = np.argsort(-logits_V, kind="stable")
    if top_k:
        weights[logits_V < logits_V[order[top_k - 1]]] = 0
    if top_p < 1:
        sums = weights[order].cumsum()
        above = np.concatenate([[0.0], sums[:-1]])
        weights[order[above >= top_p * sums[-1]]] = 0
    weights[weights < min_p] = 0
    left: Probabilities = weights / weights.sum()
    return left


def assert_drawn(logits_V: Floats, filters: Filters, uniform: float) -> None:
    """The token is the reference's: for these bounds, or for bounds so near that rounding may confuse them."""
    token = drawn(logits_V, filters, uniform)
    near = (1.0, 1 - NEAR, 1 + NEAR)
    for p, m in itertools.product(near, near):
        left = probabilities(
            logits_V, filters._replace(top_p=min(1.0, filters.top_p * p), min_p=min(1.0, filters.min_p * m))
        )
        ends = left.cumsum()
        if left[token] > 0 and ends[token] - left[token] - ROUNDING <= uniform <= ends[token] + ROUNDING:
            return
    pytest.fail(f"token {token} of {len(logits_V)} is not the one at {uniform} for {filters}")


def drawn(logits_V: Floats, filters: Filters, uniform: float) -> int:
    return draw(logits_V, float(logits_V.max()), filters, uniform)


SHAPES: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "a model's": lambda rng, size: rng.standard_normal(size) * 3 + 8,
    "nearly flat": lambda rng, size: rng.standard_normal(size) * 1e-3,
    "equal": lambda _rng, size: np.full(size, -2.5),
    "few values": lambda rng, size: rng.integers(-9, 3, size),
    "a peak over a plain": lambda rng, size: np.where(np.arange(size) == rng.integers(size), 14.7, 0.0),
    "steep": lambda rng, size: rng.permutation(size) * -0.7,
    "impossible tokens": lambda rng, size: np.where(rng.random(size) < 0.7, -np.inf, rng.standard_normal(size)),
    "all magnitudes": lambda rng, size: rng.choice([-1, 1], size) * 2.0 ** rng.uniform(-149, 127.9, size),
    "tiny": lambda rng, size: rng.integers(-5, 5, size) * 2.0**-149,
}


def row(shape: str, size: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    logits_V = np.asarray(SHAPES[shape](rng, size), dtype=np.float32)
    if logits_V.max() == -np.inf:
        logits_V[rng.integers(size)] = 0.0
    return logits_V


@given(
    shape=st.sampled_from(list(SHAPES)),
    size=st.sampled_from([1, 2, 15, 16, 17, 255, 256, 257, 1000, 5000]),
    seed=st.integers(0, 99),
    temperature=st.sampled_from([1.0, 1.0, 0.7, 2.0, 0.01, 1e-6, 2.0**-126]),
    top_k=st.sampled_from([0, 0, 1, 2, 40, 999]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-9, 5e-324, 0.999999, ALMOST_ONE]) | st.floats(0.001, 1),
    min_p=st.sampled_from([0.0, 0.0, 1e-300, 0.0101, 0.3, 1.0]),
    uniform=st.sampled_from([0.0, ALMOST_ONE]) | st.floats(0, 1, exclude_max=True),
)
@example("a peak over a plain", 5000, 0, 1.0, 0, 0.999, 0.0, 0.0)  # nothing of the plain is likely
@example("steep", 5000, 0, 1.0, 999, 1.0, 0.0, ALMOST_ONE)  # nor are all of the k likeliest
def test_tokens_are_the_references(  # noqa: PLR0913, PLR0917
    shape: str, size: int, seed: int, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
) -> None:
    filters = Filters(temperature, top_k if top_k < size else 0, top_p, min_p)
    assert_drawn(row(shape, size, seed), filters, uniform)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "filters",
    [Filters(1, 0, 0.9, 0), Filters(1, 50, 1, 0), Filters(0.8, 0, 1, 0), Filters(1, 20_000, 0.99, 1e-4)],
    ids=str,
)
def test_tokens_of_a_large_vocabulary(shape: str, filters: Filters) -> None:
    for seed in range(3):
        for uniform in (0.0, 0.3, 0.77, ALMOST_ONE):
            assert_drawn(row(shape, 49152, seed), filters, uniform)


def test_of_equals_the_lowest_are_kept() -> None:
    logits_V = np.full(49152, 3.25, dtype=np.float32)
    assert drawn(logits_V, Filters(1, 0, 0.9, 0), 0.0) == 0
    assert drawn(logits_V, Filters(1, 0, 0.9, 0), ALMOST_ONE) == math.ceil(0.9 * 49152) - 1
    # All that are as likely as the k-th stay.
    assert drawn(logits_V, Filters(1, 5, 1, 0), ALMOST_ONE) == 49151
    logits_V[[7, 40_000]] = 4.0
    assert drawn(logits_V, Filters(1, 2, 1, 0), ALMOST_ONE) == 40_000
    assert drawn(logits_V, Filters(1e-3, 0, 0.5, 0), ALMOST_ONE) == 7
    assert drawn(logits_V, Filters(1e-3, 0, 0.51, 0), ALMOST_ONE) == 40_000


def test_a_logit_decides_where_weights_are_equal() -> None:
    """Both weights are 1 in float32, and the higher token is likelier."""
    logits_V = np.array([0.0, 1e-9, -1.0], dtype=np.float32)
    for filters in (Filters(1, 1, 1, 0), Filters(1, 0, 0.4, 0)):
        assert {drawn(logits_V, filters, uniform) for uniform in (0.0, 0.5, ALMOST_ONE)} == {1}


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_weights_are_exact_to_the_last_bits(temperature: float) -> None:
    """Where a token of weight w ends tells w: it is right to 2^-21 of itself, and to what its exponent is rounded."""
    for below in np.linspace(0, 80, 997, dtype=np.float32) * np.float32(temperature):
        logits_V = np.array([-below, 0.0], dtype=np.float32)
        exponent = float(below) / temperature
        weight, rounding = math.exp(-exponent), 2.0**-21 + exponent * 2.0**-22
        end = weight / (1 + weight)
        assert drawn(logits_V, Filters(temperature, 0, 1, 0), end * (1 - rounding)) == 0
        assert drawn(logits_V, Filters(temperature, 0, 1, 0), end * (1 + rounding)) == 1


def test_both_ways_choose_the_same() -> None:
    filters = [Filters(1, 0, 0.9, 0), Filters(0.7, 40, 0.95, 0.01), Filters(1.3, 0, 1, 0)]
    for seed, each in itertools.product(range(30), filters):
        logits_V = row("a model's", 3000, seed)
        left = probabilities(logits_V, each).cumsum()
        assert drawn(logits_V, each, 0.618) == int(left.searchsorted(0.618, side="right"))


def test_the_penalised_are_drawn() -> None:
    """Of two likely tokens the one that occurred is penalised away, whatever the layout of the logits."""
    wide_V2 = torch.zeros(1000, 2)
    wide_V2[[3, 500], 0] = 40.0
    sampler = Sampler(Sampling(seed=0, top_p=0.9, repetition_penalty=10.0), [3], 1000)
    assert sampler.choose(wide_V2[:, 0]).token == 500
    assert {Sampler(Sampling(seed=seed, top_p=0.9), [3], 1000).choose(wide_V2[:, 0]).token for seed in range(20)} == {
        3,
        500,
    }


def test_unaligned_logits() -> None:
    logits_V = row("a model's", 300, 1)
    shifted_V = np.frombuffer(bytearray(b"\0" + logits_V.tobytes()), dtype=np.float32, offset=1)
    for filters in (Filters(1, 0, 0.9, 0), Filters(1, 0, 1, 0)):
        assert drawn(shifted_V, filters, 0.4) == drawn(logits_V, filters, 0.4)


@pytest.mark.parametrize("name", NATIVE)
def test_what_a_kernel_cannot_draw_from_is_refused(name: str) -> None:
    kernels, filters = native.Kernels(name), Filters(1, 0, 0.9, 0)
    for wrong in (torch.zeros(4, dtype=torch.float64), torch.zeros(2, 2)):
        with pytest.raises(ExactnessError, match="a native kernel takes"):
            kernels.draw(wrong, 0.0, filters, 0.5)
    with pytest.raises(ExactnessError, match="at least one token"):
        kernels.draw(torch.zeros(0), 0.0, filters, 0.5)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e30, 1e30])
@pytest.mark.parametrize(
    "filters", [Filters(1, 0, 0.9, 0), Filters(1, 3, 1, 0), Filters(1, 0, 1, 0.1), Filters(1, 0, 1, 0)]
)
def test_logits_that_changed_meanwhile_give_some_token(name: str, value: float, filters: Filters) -> None:
    kernels, logits_V = native.Kernels(name), torch.full((1000,), value)
    for part in (slice(None), slice(0, None, 2), slice(999, None)):
        logits_V[part] = 5.0 if part.step else value
        assert all(0 <= kernels.draw(logits_V, 0.0, filters, uniform) < 1000 for uniform in (0.0, 0.5, ALMOST_ONE))


@pytest.mark.parametrize("name", [name for name in native.available() if name not in NATIVE])
def test_other_instruction_sets_have_no_sampling(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, filters = native.Kernels(name), Filters(1, 0, 0.9, 0)
    with pytest.raises(ExactnessError, match=f"no native sampling for {name}"):
        kernels.draw(torch.zeros(4), 0.0, filters, 0.5)
    monkeypatch.setattr(native, "kernels", lambda: kernels)
    assert drawn(np.zeros(4, dtype=np.float32), filters, 0.5) == 2
