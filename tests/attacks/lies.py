"""Lies that have the right form: other words than the product asked for."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch
from hostile import Exchange, Lie, adding
from torch import Tensor

from tsqp.arith.ring import lay_out
from tsqp.worker.services import DealerService, ExactService

Q = (1 << 61) - 1
NAN_BITS = 0x7FC00000


def _changed(change: Callable[[Tensor], Tensor]) -> Lie:
    return lambda exchange: change(exchange.result)


def _row_off_by_one(y_MN: Tensor) -> Tensor:
    y_MN[-1] += 1
    return y_MN


def _rows_that_cancel(y_MN: Tensor) -> Tensor:
    """What a check of the sum of rows would let pass."""
    y_MN[0, 0] += 1
    y_MN[1, 0] -= 1
    return y_MN


def _words_that_cancel(y_MN: Tensor) -> Tensor:
    """What a check of the sum of words would let pass."""
    y_MN[0, 0] += 1
    y_MN[0, 1] -= 1
    return y_MN


def _stale(exchange: Exchange) -> Tensor:
    """Give the result of an earlier request for the same group."""
    return next(
        y.clone() for group, y in exchange.peer.answered if group == exchange.group and y.shape == exchange.result.shape
    )


def _of_another_layer(exchange: Exchange) -> Tensor:
    """Multiply by codes of the same shape from another layer; for the head, by as many rows of wider codes."""
    twins = {"layers.0.qkv": "layers.1.qkv", "layers.1.down": "layers.0.down", "head": "layers.0.gate_up"}
    service = exchange.peer.dispatcher.service
    request = msgspec.structs.replace(exchange.request, group=twins[exchange.group])
    product_MN = service.product(request, exchange.tensors)
    return product_MN[:, : exchange.result.shape[1]].contiguous()


def _with_a_changed_weight(exchange: Exchange) -> Tensor:
    """Multiply correctly by codes of which one differs by one."""
    service = exchange.peer.dispatcher.service
    assert isinstance(service, (DealerService, ExactService))
    codes_NK = service._codes[exchange.group].plain().clone()
    codes_NK[0, 0] += 1 if codes_NK[0, 0] < 127 else -1
    other = type(service)(tuple(service.groups.values()), {exchange.group: lay_out(codes_NK)}, service.device)
    other.groups = service.groups  # a dealer numbers its groups
    return other.product(exchange.request, exchange.tensors)


def _of_other_input(exchange: Exchange) -> Tensor:
    """Multiply another tensor of the same shape: one word of the input is off by one."""
    request, tensors = exchange.request, exchange.tensors
    if tensors:
        x_MK = tensors[0].clone()
        x_MK[-1, -1] += 1
        tensors = (x_MK,)
    else:
        request = msgspec.structs.replace(request, first=getattr(request, "first") + 1)  # noqa: B009
    return exchange.peer.dispatcher.service.product(request, tensors)


# Errors of one unit in a few words: a float32 of 31 bits may not show them.
SMALL = frozenset(
    {
        "a word off by 1",
        "a word off by -1",
        "a word off by 2^32 - 1",
        "a word off by q",
        "a row off by 1",
        "two rows whose errors cancel",
        "two words whose errors cancel",
    }
)


def _input_words(exchange: Exchange) -> Tensor:
    """Send back what came, as often as fits; a dealer sends the words of its seed."""
    y_MN = exchange.result
    source = exchange.tensors[0] if exchange.tensors else _seed_words(exchange)
    return source.flatten().repeat(-(-y_MN.numel() // source.numel()))[: y_MN.numel()].view_as(y_MN)


def _seed_words(exchange: Exchange) -> Tensor:
    seed = getattr(exchange.request, "seed")  # noqa: B009
    return torch.frombuffer(bytearray(seed), dtype=torch.int32)


# Errors of one unit in a few words: a float32 of 31 bits may not show them.
SMALL = frozenset(
    {
        "a word off by 1",
        "a word off by -1",
        "a word off by 2^32 - 1",
        "a word off by q",
        "a row off by 1",
        "two rows whose errors cancel",
        "two words whose errors cancel",
    }
)
LIES: dict[str, Lie] = {
    "a word off by 1": adding(1),
    "a word off by -1": adding(-1, row=1, column=2),
    "a word off by 2^16": adding(1 << 16, row=2),
    "a word off by 2^31": adding(1 << 31, row=3),
    "a word off by 2^32 - 1": adding((1 << 32) - 1, row=-1, column=-1),
    "a word off by q": adding(Q % (1 << 32), row=2),
    "a row off by 1": _changed(_row_off_by_one),
    "two rows whose errors cancel": _changed(_rows_that_cancel),
    "two words whose errors cancel": _changed(_words_that_cancel),
    "rows swapped": _changed(lambda y_MN: y_MN[[1, 0, *range(2, len(y_MN))]]),
    "a row twice": _changed(lambda y_MN: y_MN[[0, 0, *range(2, len(y_MN))]]),
    "columns swapped": _changed(lambda y_MN: y_MN.flip(1)),
    "negated": _changed(torch.neg),
    "zeros": _changed(torch.zeros_like),
    "NaN patterns": _changed(lambda y_MN: torch.full_like(y_MN, NAN_BITS)),
    "float bits": _changed(lambda y_MN: y_MN.float().view(torch.int32)),
    "the input itself": _input_words,
    "an earlier result": _stale,
    "another layer's": _of_another_layer,
    "a changed weight": _with_a_changed_weight,
    "another input's": _of_other_input,
}
