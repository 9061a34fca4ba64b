"""Products of the linear modules against float64, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, load_linears, random_ids, reference_from, tiny_checkpoint
from torch import Tensor

from tsqp.arith import native
from tsqp.errors import DeviceMemoryError, InputError, WeightsError
from tsqp.model import linears as module
from tsqp.model.architecture import linear_groups, read_config
from tsqp.model.linears import Linears, memory_errors, onednn_computes, product
from tsqp.model.ops import LocalOps, read_state
from tsqp.model.weights import SINGLE_NAME, Checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def linears(checkpoint: Path) -> Linears:
    return load_linears(checkpoint)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def product_bound(x_MK: Tensor, w_NK: Tensor, b_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Bound |computed - exact| for operands already in ``dtype``.

    Sums are kept in float32 by any order of K additions: each of the K products and the bias is off by at most
    (K + 1) 2^-24 relative (Higham 2002, section 3.1), and the result is rounded to ``dtype`` once: half its eps.
    float16 kernels may round once more before the bias is added; below its normal range an absolute half step remains.
    """
    magnitude = x_MK.double().abs() @ w_NK.double().abs().T
    bias = 0.0 if b_N is None else b_N.double().abs()
    exact = (x_MK.double() @ w_NK.double().T).abs()
    rounding = torch.finfo(dtype).eps / 2 * (2 * exact + 2 * bias)
    return (x_MK.shape[1] + 1) * 2.0**-24 * (magnitude + bias) * (1 + 2.0**-7) + rounding + torch.finfo(dtype).tiny


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 64, 48), (5, 48, 101), (129, 300, 77)], ids=str)
def test_product_is_within_its_bound(dtype: torch.dtype, shape: tuple[int, int, int], *, bias: bool) -> None:
    m, k, n = shape
    x_MK, w_NK = randn(m, k).to(dtype), randn(n, k).to(dtype)
    b_N = randn(n).to(dtype) if bias else None
    exact = x_MK.double() @ w_NK.double().T + (0 if b_N is None else b_N.double())
    y_MN = product(x_MK, w_NK, b_N)
    assert y_MN.dtype == dtype
    assert ((y_MN.double() - exact).abs() <= product_bound(x_MK, w_NK, b_N, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_of_no_rows(dtype: torch.dtype) -> None:
    assert product(torch.ones(0, 64, dtype=dtype), torch.ones(48, 64, dtype=dtype), None).shape == (0, 48)


@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "torch"])
def test_both_kernels_give_the_product(monkeypatch: pytest.MonkeyPatch, *, onednn: bool) -> None:
    if onednn and not onednn_computes(torch.float32):
        pytest.skip("this build of torch has no oneDNN linear")
    monkeypatch.setattr(module, "onednn_computes", lambda _dtype: onednn)
    x_MK, w_NK, b_N = randn(7, 48), randn(5, 48), randn(5)
    exact = x_MK.double() @ w_NK.double().T + b_N.double()
    assert ((product(x_MK, w_NK, b_N) - exact).abs() <= product_bound(x_MK, w_NK, b_N, torch.float32)).all()


def test_onednn_is_asked_for_nothing_it_was_not_tried_on() -> None:
    assert not onednn_computes(torch.float16)
    assert not onednn_computes(torch.float64)


@pytest.mark.parametrize("broken", [NotImplementedError, RuntimeError, AttributeError], ids=lambda kind: kind.__name__)
def test_torch_computes_where_onednn_fails(monkeypatch: pytest.MonkeyPatch, broken: type[Exception]) -> None:
    def fail(*_args: Any) -> Tensor:
        raise broken("not here")

    monkeypatch.setattr(module, "_onednn_linear", fail)
    assert not onednn_computes.__wrapped__(torch.float32)


def test_torch_computes_where_onednn_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_onednn_linear", lambda x, w, _bias: 1.001 * (x @ w.T))
    assert not onednn_computes.__wrapped__(torch.float32)


# Linears -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["native", "without"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Load with the native kernels, and as where they are not built."""
    kernels = native.Kernels(native.available()[-1]) if request.param == "native" else None
    monkeypatch.setattr(native, "kernels", lambda: kernels)
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("either")
def test_groups_and_members_equal_the_checkpoint(checkpoint: Path, dtype: torch.dtype) -> None:
    linears = load_linears(checkpoint, dtype)
    parameters = {name: value.detach() for name, value in reference_from(checkpoint).named_parameters()}
    for group in linear_groups(linears.config):
        x_MK = randn(9, group.in_features)
        whole = linears.linear(group.name, x_MK)
        assert whole.dtype == dtype
        for index, (member, part) in enumerate(zip(group.members, whole.split(group.out_features, dim=1), strict=True)):
            w_NK = parameters[f"{member}.weight"].to(dtype)
            b_N = parameters[f"{member}.bias"].to(dtype) if group.bias else None
            x = x_MK.to(dtype)
            exact = x.double() @ w_NK.double().T + (0 if b_N is None else b_N.double())
            bound = product_bound(x, w_NK, b_N, dtype)
            assert ((part.double() - exact).abs() <= bound).all(), member
            assert ((linears.linear(group.name, x_MK, index).double() - exact).abs() <= bound).all(), member


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("either")
def test_results_are_stored_where_they_are_wanted(checkpoint: Path, dtype: torch.dtype) -> None:
    linears = load_linears(checkpoint, dtype)
    for group in linear_groups(linears.config):
        x_MK = randn(4, group.in_features)
        memory = torch.full((6, group.rows), torch.nan, dtype=dtype)
        assert linears.multiply(group.name, x_MK, memory[1:5]).data_ptr() == memory[1].data_ptr()
        assert torch.equal(memory[1:5], linears.multiply(group.name, x_MK))
        assert memory[[0, 5]].isnan().all()


def test_weights_are_held_once(either: str, checkpoint: Path) -> None:
    linears = load_linears(checkpoint)
    there = either == "native" and native.Kernels(native.available()[-1]).multiplies_floats
    assert linears._panels.keys() == (linears.groups.keys() if there else set())
    assert linears._panels.keys() | linears._weights.keys() == linears.groups.keys()
    assert not linears._panels.keys() & linears._weights.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_is_the_table(checkpoint: Path, dtype: torch.dtype) -> None:
    table = reference_from(checkpoint).model.embed_tokens.weight.detach().to(dtype)
    ids = random_ids(1, 50)[0]
    assert torch.equal(load_linears(checkpoint, dtype).embedding(ids), table[ids])


def test_embedding_of_nothing(linears: Linears) -> None:
    assert linears.embedding(torch.empty(0, dtype=torch.int64)).shape == (0, TINY["hidden_size"])


def test_matmul_is_torch_s(linears: Linears) -> None:
    a, b = randn(2, 3, 4, 5), randn(2, 3, 5, 6)
    assert torch.equal(linears.matmul(a, b), a @ b)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_only_a_tied_head_is_the_embedding(either: str, tmp_path: Path, *, tied: bool) -> None:
    linears = load_linears(tiny_checkpoint(tmp_path, tie_word_embeddings=tied))
    table = linears._embedding_VD
    if either == "native" and native.Kernels(native.available()[-1]).multiplies_floats:
        assert (table is None) is tied
    else:
        assert table is not None
        assert (linears._weights["head"].data_ptr() == table.data_ptr()) is tied


@torch.inference_mode()
def test_results_are_fresh_memory(linears: Linears) -> None:
    """The forward pass adds in place to what it gets: that must never be a weight."""
    ops = LocalOps(linears, {})
    ids, x_MK = torch.tensor([3, 3]), randn(2, TINY["hidden_size"])
    before = ops.embedding(ids)().clone(), ops.linear("head", x_MK)().clone()
    ops.embedding(ids)().zero_()
    ops.linear("head", x_MK)().zero_()
    assert torch.equal(ops.embedding(ids)(), before[0])
    assert torch.equal(ops.linear("head", x_MK)(), before[1])


def test_progress_ends_at_one(checkpoint: Path) -> None:
    steps: list[float] = []
    Linears(read_config(checkpoint), Checkpoint(checkpoint), torch.float32, CPU, steps.append)
    assert len(steps) == 4 * TINY["num_hidden_layers"] + 1
    assert steps == sorted(steps)
    assert steps[-1] == 1.0


def test_state_is_float32_whatever_is_stored(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, stored=torch.bfloat16)
    state = read_state(load_linears(directory, torch.bfloat16), Checkpoint(directory))
    expected = {name: value for name, value in reference_from(directory).named_parameters() if "norm" in name}
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name])


def test_incomplete_checkpoint_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path)
    (directory / SINGLE_NAME).write_bytes((directory / SINGLE_NAME).read_bytes()[:-1])
    with pytest.raises(WeightsError):
        load_linears(directory)


# Refusals ------------------------------------------------------------------------------------------------------------

D = TINY["hidden_size"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda it: it.linear("layers.9.qkv", randn(1, D)), "'layers.9.qkv'", id="no-such-group"),
        pytest.param(lambda it: it.linear("head", randn(1, D + 1)), rf"\[M, {D}\].*\[1, {D + 1}\]", id="wrong-width"),
        pytest.param(lambda it: it.linear("head", randn(D)), rf"\[M, {D}\].*\[{D}\]", id="one-dimension"),
        pytest.param(lambda it: it.linear("head", randn(1, 1, D)), rf"\[1, 1, {D}\]", id="three-dimensions"),
        pytest.param(lambda it: it.linear("head", torch.ones(1, D).int()), "int32", id="integers"),
        pytest.param(lambda it: it.embedding(torch.tensor([[1]])), r"\[1, 1\]", id="ids-of-two-dimensions"),
        pytest.param(lambda it: it.embedding(torch.tensor([1], dtype=torch.int32)), "int32", id="int32-ids"),
        pytest.param(lambda it: it.embedding(torch.tensor([1.0])), "float32", id="float-ids"),
        pytest.param(lambda it: it.embedding(torch.tensor([0, -1])), "vocabulary of 101", id="negative-id"),
        pytest.param(lambda it: it.embedding(torch.tensor([101, 0])), "vocabulary of 101", id="id-too-large"),
        pytest.param(lambda it: it.matmul(randn(2, 3), randn(4, 2)), "inner sizes", id="inner-sizes"),
        pytest.param(lambda it: it.matmul(randn(1, 2, 3), randn(2, 3, 4)), "inner sizes", id="batch-sizes"),
        pytest.param(lambda it: it.matmul(randn(2, 3), randn(1, 3, 4)), "inner sizes", id="ranks"),
        pytest.param(lambda it: it.matmul(randn(3), randn(3)), "inner sizes", id="vectors"),
        pytest.param(lambda it: it.matmul(randn(2, 0), randn(0, 2)), "operand is empty", id="empty-operands"),
        pytest.param(lambda it: it.matmul(randn(2, 3), randn(3, 2).double()), "float64", id="mixed-dtypes"),
        pytest.param(
            lambda it: it.matmul(torch.ones(2, 2).int(), torch.ones(2, 2).int()), "int32", id="integer-matmul"
        ),
    ],
)
def test_input_errors(linears: Linears, call: Callable[[Linears], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(linears)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda it, rows: it.linear("head", torch.ones(1, D).expand(rows, D)), id="linear"),
        pytest.param(lambda it, rows: it.embedding(torch.ones(1, dtype=torch.int64).expand(rows)), id="embedding"),
        pytest.param(lambda it, rows: it.matmul(torch.ones(1, 1).expand(rows, 1), torch.ones(1, D)), id="matmul"),
    ],
)
def test_results_have_a_largest_size(
    monkeypatch: pytest.MonkeyPatch, linears: Linears, call: Callable[[Linears, int], Tensor]
) -> None:
    """Few bytes of input must not claim all memory: the limit itself passes, one row more does not."""
    width = call(linears, 1).shape[1]
    monkeypatch.setattr(module, "MAX_RESULT_ELEMENTS", 10 * width)
    assert call(linears, 10).shape == (10, width)
    with pytest.raises(InputError, match=rf"\[11, {width}\] has {11 * width} elements; at most {10 * width}"):
        call(linears, 11)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError()], ids=["torch", "python"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_out_of_memory_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, dtype: torch.dtype, error: Exception
) -> None:
    linears = load_linears(checkpoint, dtype)

    def fail(*_args: Any) -> Tensor:
        raise error

    monkeypatch.setattr(module, "product", fail)
    monkeypatch.setattr(native.Kernels, "multiply_floats", fail)
    with pytest.raises(DeviceMemoryError, match=r"cpu is out of memory during linear head.*--batch"):
        linears.linear("head", randn(1, D))


def test_real_allocation_failure(monkeypatch: pytest.MonkeyPatch, linears: Linears) -> None:
    """A result of 2^48 bytes does not fit the address space, although its operands are one stored number each."""
    monkeypatch.setattr(module, "MAX_RESULT_ELEMENTS", 2**60)
    a, b = torch.ones(1, 1).expand(2**23, 1), torch.ones(1, 1).expand(1, 2**23)
    with pytest.raises(DeviceMemoryError, match="during matmul"):
        linears.matmul(a, b)


def test_loading_more_than_there_is(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    def huge(*_args: Any, **_settings: Any) -> Tensor:
        return torch.full((2**46,), 1.0)

    monkeypatch.setattr(Linears, "_empty", huge)
    with pytest.raises(DeviceMemoryError, match="during loading"):
        load_linears(checkpoint)


def test_other_runtime_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="a bug"), memory_errors("x", CPU):
        raise RuntimeError("a bug")
