"""Four products and what lies between in one call: the bits of seven, in whatever rows they lie, or a refusal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsqp.arith import native, panels
from tsqp.arith.chain_kernel import ChainKernel, ChainWeights, Weights
from tsqp.errors import ExactnessError

K, D, F, N, EPS = 24, 20, 28, 35, 1e-5


@pytest.fixture(params=[name for name in native.available() if native.Kernels(name).multiplies_floats])
def kernels(request: pytest.FixtureRequest) -> native.Kernels:
    return native.Kernels(request.param)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def product_weights(inputs: int, outputs: int, *, bias: bool) -> Weights:
    return Weights(panels.lay_out(randn(outputs, inputs)), randn(outputs) if bias else None, outputs)


def chain_weights(*, bias: bool) -> ChainWeights:
    return ChainWeights(
        o=product_weights(K, D, bias=bias),
        norm_D=randn(D),
        gate_up=product_weights(D, 2 * F, bias=bias),
        down=product_weights(F, D, bias=bias),
        next_norm_D=1 + randn(D),
        following=product_weights(D, N, bias=bias),
    )


def one_by_one(kernels: native.Kernels, chain: ChainWeights, x_MC: Tensor) -> Tensor:
    rows = len(x_MC)

    def product(x_MK: Tensor, weights: Weights) -> Tensor:
        y_MN = torch.empty(rows, weights.outputs)
        kernels.multiply_floats(x_MK, weights.panels, weights.bias_N, y_MN)
        return y_MN

    def normed(x_MD: Tensor, weight_D: Tensor) -> Tensor:
        out_MD = torch.empty(rows, D)
        kernels.rms_norm(x_MD, weight_D, EPS, out_MD)
        return out_MD

    y1_MD = product(x_MC[:, :K].contiguous(), chain.o)
    h_MD = x_MC[:, K:] + y1_MD
    activated_MF = torch.empty(rows, F)
    kernels.swiglu(product(normed(h_MD, chain.norm_D), chain.gate_up), activated_MF)
    y2_MD = product(activated_MF, chain.down)
    return torch.cat((y1_MD, y2_MD, product(normed(h_MD + y2_MD, chain.next_norm_D), chain.following)), dim=1)


@pytest.mark.parametrize("rows", [0, 1, 2, 17])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_a_chain_has_the_bits_of_its_parts(kernels: native.Kernels, rows: int, *, bias: bool) -> None:
    weights = chain_weights(bias=bias)
    chain = ChainKernel(kernels, weights, EPS)
    wide, memory = randn(rows, K + D + 3), torch.full((rows + 2, 2 * D + N + 5), torch.nan)
    for x_MC in (wide[:, 2:-1], wide[:, 2:-1].clone(), wide[:, 2:-1].T.contiguous().T):
        out = memory[1:-1, 1:-4]
        chain.multiply(x_MC, out)
        assert torch.equal(out, one_by_one(kernels, weights, x_MC.contiguous()))
    memory[1:-1, 1:-4] = torch.nan
    assert memory.isnan().all(), "nothing else is written"


def test_weights_that_do_not_fit_are_refused(kernels: native.Kernels) -> None:
    chain = chain_weights(bias=True)
    for wrong in (
        chain._replace(o=chain.o._replace(panels=chain.o.panels.double())),
        chain._replace(o=chain.o._replace(outputs=D + 16)),
        chain._replace(o=chain.o._replace(bias_N=randn(D + 1))),
        chain._replace(norm_D=chain.norm_D[:-1]),
        chain._replace(norm_D=chain.norm_D.double()),
        chain._replace(gate_up=product_weights(D + 1, 2 * F, bias=True)),
        chain._replace(gate_up=product_weights(D, 2 * F + 1, bias=True)),
        chain._replace(gate_up=product_weights(D, 2 * F + 2, bias=True)),
        chain._replace(down=product_weights(F, D + 1, bias=True)),
        chain._replace(next_norm_D=chain.next_norm_D[:-1]),
        chain._replace(following=product_weights(D + 1, N, bias=True)),
        chain._replace(following=chain.following._replace(bias_N=chain.following.panels[0, 0])),
    ):
        with pytest.raises(ExactnessError, match=r"a (native kernel|chain) takes"):
            ChainKernel(kernels, wrong, EPS)


def test_operands_that_do_not_fit_are_refused(kernels: native.Kernels) -> None:
    chain = ChainKernel(kernels, chain_weights(bias=True), EPS)
    x_MC, out = randn(3, K + D), torch.empty(3, 2 * D + N)
    for operands in (
        (x_MC[:, :-1], out),
        (x_MC.double(), out),
        (x_MC, out[:2]),
        (x_MC, out[:, :-1]),
        (x_MC, out.double()),
        (x_MC, torch.empty(2 * D + N, 3).T),
        (x_MC, torch.empty(1, 2 * D + N).expand(3, 2 * D + N)),
    ):
        with pytest.raises(ExactnessError, match="a native kernel takes"):
            chain.multiply(*operands)
