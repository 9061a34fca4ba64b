"""Layers that ask a worker: one request for all that read the same input, and never another input's product."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tsqp.decoder.layers import GroupCall, Products, RemoteLayer
from tsqp.errors import InputError, TransportClosedError, TransportError
from tsqp.model.architecture import LinearGroup
from tsqp.model.overlap import Pending

GROUP = LinearGroup("qkv", ("q", "k", "v"), 4, (6, 2, 2), bias=False)
WEIGHT_NK = torch.arange(40.0).view(10, 4).sin()


class Source:
    """Multiplies here, and counts what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []
        self.abandoned = 0
        self.error: Exception | None = None

    def linear(self, group: str, x_MK: Tensor) -> Pending:
        assert (group, x_MK.dtype) == ("qkv", torch.float32)
        self.asked.append(x_MK.clone())
        return partial(self._answer, x_MK.clone())

    def _answer(self, x_MK: Tensor) -> Tensor:
        if self.error:
            raise self.error
        y_MN: Tensor = x_MK @ WEIGHT_NK.T
        return y_MN

    def abandon(self) -> None:
        self.abandoned += 1


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def call(source: Source) -> GroupCall:
    return GroupCall(GROUP, Products(source, nullcontext))


def truth(x: Tensor, member: int) -> Tensor:
    part: Tensor = (x.float() @ WEIGHT_NK.T).split(GROUP.out_features, dim=-1)[member]
    return part


def check(call: GroupCall, x: Tensor, *members: int) -> None:
    for member in members:
        torch.testing.assert_close(call.part(member, x), truth(x, member))


def some(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


def test_members_of_a_group_are_one_request(call: GroupCall, source: Source) -> None:
    check(call, some(), 0, 1, 2)
    assert len(source.asked) == 1
    assert call.part(1, some(1)).is_contiguous()


@pytest.mark.parametrize("order", [(2, 0, 1), (1,), (0, 0, 1, 1), (2, 2), (1, 0, 2, 1)])
def test_any_order_and_any_number_is_right(call: GroupCall, order: tuple[int, ...]) -> None:
    first, second = some(1), some(2)
    check(call, first, *order)
    check(call, second, *order)
    check(call, first, *reversed(order))


def test_an_input_that_was_changed_in_place_is_asked_for_again(call: GroupCall, source: Source) -> None:
    x = some()
    check(call, x, 0)
    x[0, 0, 0] += 1
    check(call, x, 1, 2)
    assert len(source.asked) == 2


def test_so_it_is_in_inference_mode_where_tensors_count_no_versions(call: GroupCall, source: Source) -> None:
    with torch.inference_mode():
        x = some() + 0
        check(call, x, 0, 1)
        x.mul_(2)
        check(call, x, 2)
    assert len(source.asked) == 2


def test_a_change_behind_the_back_of_autograd_is_seen(call: GroupCall) -> None:
    x = some()
    check(call, x, 0)
    x.data.mul_(2)  # counts no version
    check(call, x, 1)


def test_another_tensor_in_the_same_place_is_another_input(call: GroupCall) -> None:
    for seed in range(20):
        x = some(seed)
        check(call, x, seed % 3)
        del x
        gc.collect()


def test_equal_values_in_another_tensor_are_another_request(call: GroupCall, source: Source) -> None:
    """Or a worker could tell by what it is not asked that an input has come again."""
    x = some()
    check(call, x, 0)
    check(call, x.clone(), 1)
    assert len(source.asked) == 2


def test_inputs_are_not_kept_once_every_part_is_taken(call: GroupCall) -> None:
    x = some()
    kept = weakref.ref(x)
    check(call, x, 0, 1)
    assert kept() is not None
    check(call, x, 2)
    del x
    gc.collect()
    assert kept() is None


class SlowCall(GroupCall):
    """Leaves other threads time between an answer and its parts."""

    def _ask(self, x: Tensor) -> None:
        super()._ask(x)
        time.sleep(0.005)


def test_threads_get_their_own_products(source: Source) -> None:
    call = SlowCall(GROUP, Products(source, nullcontext))
    wrong: list[int] = []

    def run(seed: int) -> None:
        for number in range(5):
            x = some(10 * seed + number)
            wrong.extend(member for member in range(3) if not torch.allclose(call.part(member, x), truth(x, member)))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_after_an_error_nothing_is_left_under_way(call: GroupCall, source: Source) -> None:
    source.error = TransportError("gone")
    with pytest.raises(TransportError):
        call.part(0, some())
    assert source.abandoned == 1
    source.error = None
    check(call, some(), 0, 1, 2)


def remote(call: GroupCall) -> nn.Linear:
    layer = nn.Linear(4, 6).eval().requires_grad_(False)
    vars(layer).update(remote=call, member=0)
    layer.__class__ = type("RemoteLinear", (RemoteLayer, nn.Linear), {})
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_adds_its_bias_and_keeps_the_dtype(call: GroupCall, dtype: torch.dtype) -> None:
    layer, x = remote(call).to(dtype), some().to(dtype)
    found = layer(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, truth(x, 0).to(dtype) + layer.bias)


def test_gradients_are_refused(call: GroupCall) -> None:
    layer, x = remote(call), some().requires_grad_()
    with pytest.raises(InputError, match="asked for a gradient"):
        layer(x)
    with torch.no_grad():
        layer(x)
    with pytest.raises(InputError, match="training mode"):
        layer.train()(some())


def test_a_layer_of_a_detached_model_says_so(source: Source) -> None:
    products = Products(source, nullcontext)
    products.end()
    with pytest.raises(TransportClosedError, match="detached"):
        products.compute([("qkv", some().view(-1, 4))])
