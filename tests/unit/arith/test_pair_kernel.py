"""Two products and the norm between them in one call: the bits of three, in whatever rows they lie, or a refusal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsqp.arith import native, panels
from tsqp.arith.pair_kernel import PairKernel, Weights
from tsqp.errors import ExactnessError

K, D, N, EPS = 24, 20, 35, 1e-5


@pytest.fixture(params=[name for name in native.available() if native.Kernels(name).multiplies_floats])
def kernels(request: pytest.FixtureRequest) -> native.Kernels:
    return native.Kernels(request.param)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def weights(inputs: int, outputs: int, *, bias: bool) -> Weights:
    return Weights(panels.lay_out(randn(outputs, inputs)), randn(outputs) if bias else None, outputs)


def one_by_one(kernels: native.Kernels, first: Weights, norm_D: Tensor, second: Weights, x_MC: Tensor) -> Tensor:
    y_MD, y_MN, normed_MD = torch.empty(len(x_MC), D), torch.empty(len(x_MC), N), torch.empty(len(x_MC), D)
    kernels.multiply_floats(x_MC[:, :K], first.panels, first.bias_N, y_MD)
    kernels.rms_norm((x_MC[:, K:] + y_MD), norm_D, EPS, normed_MD)
    kernels.multiply_floats(normed_MD, second.panels, second.bias_N, y_MN)
    return torch.cat((y_MD, y_MN), dim=1)


@pytest.mark.parametrize("rows", [0, 1, 2, 17])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_a_pair_has_the_bits_of_its_parts(kernels: native.Kernels, rows: int, *, bias: bool) -> None:
    first, norm_D, second = weights(K, D, bias=bias), randn(D), weights(D, N, bias=bias)
    pair = PairKernel(kernels, first, norm_D, EPS, second)
    wide, memory = randn(rows, K + D + 3), torch.full((rows + 2, D + N + 5), torch.nan)
    for x_MC in (wide[:, 2:-1], wide[:, 2:-1].clone(), wide[:, 2:-1].T.contiguous().T):
        out = memory[1:-1, 1:-4]
        pair.multiply(x_MC, out)
        assert torch.equal(out, one_by_one(kernels, first, norm_D, second, x_MC.contiguous()))
    memory[1:-1, 1:-4] = torch.nan
    assert memory.isnan().all(), "nothing else is written"


def test_what_does_not_fit_is_refused(kernels: native.Kernels) -> None:
    first, norm_D, second = weights(K, D, bias=True), randn(D), weights(D, N, bias=True)
    for wrong in (
        (first._replace(panels=first.panels.double()), norm_D, second),
        (first._replace(outputs=D + 16), norm_D, second),
        (first._replace(bias_N=randn(D + 1)), norm_D, second),
        (first, norm_D[:-1], second),
        (first, norm_D.double(), second),
        (first, norm_D, weights(D + 1, N, bias=True)),
        (first, norm_D, second._replace(bias_N=second.panels[0, 0])),
    ):
        with pytest.raises(ExactnessError, match="a native kernel takes"):
            PairKernel(kernels, wrong[0], wrong[1], EPS, wrong[2])
    pair = PairKernel(kernels, first, norm_D, EPS, second)
    x_MC, out = randn(3, K + D), torch.empty(3, D + N)
    for operands in (
        (x_MC[:, :-1], out),
        (x_MC.double(), out),
        (x_MC, out[:2]),
        (x_MC, out[:, :-1]),
        (x_MC, out.double()),
        (x_MC, torch.empty(D + N, 3).T),
        (x_MC, torch.empty(1, D + N).expand(3, D + N)),
    ):
        with pytest.raises(ExactnessError, match="a native kernel takes"):
            pair.multiply(*operands)
