"""Attacks while several micro-batches are on their way: what holds for one product holds for each of them."""

from __future__ import annotations

import pytest
import torch
from attacks.watching import assert_only_words_that_may_leave, assert_out_of_use
from hostile import (
    MASKED,
    PROMPT,
    SETUPS,
    Exchange,
    Material,
    Message,
    Rig,
    adding,
    build,
    claiming,
    honest,
    on,
)
from torch import Tensor

from tsqp.errors import InputError, IntegrityError, TransportClosedError
from tsqp.model.exact import ExactOps
from tsqp.model.llama import Llama
from tsqp.wire import messages

PARTS = 3


def overlapped(rig: Rig, ids_BT: Tensor = PROMPT) -> Tensor:
    ops = ExactOps(rig.material.packed, rig, rig.meter)
    return Llama(rig.material.packed.config, ops).prefill(ids_BT, all_logits=True, parts=PARTS)


def expected(material: Material) -> Tensor:
    honest_rig = build(material, None)
    return overlapped(honest_rig)


def after(count: int, group: str, tamper: object) -> object:
    """Tamper with a product of a group from the given one on."""
    seen = 0

    def counting(exchange: Exchange) -> object:
        nonlocal seen
        if not (isinstance(exchange.request, messages.LinearExact) and exchange.group == group):
            return honest(exchange)
        seen += 1
        return tamper(exchange) if seen > count else honest(exchange)  # type: ignore[operator]

    return counting


@pytest.mark.parametrize("dealers", SETUPS.values(), ids=SETUPS)
def test_several_micro_batches_are_in_flight_and_agree_with_one_after_the_other(
    material: Material, dealers: int | None
) -> None:
    rig = build(material, dealers, pool_rows=2)
    assert torch.equal(overlapped(rig), expected(material))
    groups = [sent.group for sent in rig.worker.received if isinstance(sent.header, messages.LinearExact)]
    assert groups[:4] == ["layers.0.qkv"] * PARTS + ["layers.0.o"]
    assert_only_words_that_may_leave(rig)


@pytest.mark.parametrize("wrong", range(PARTS))
@pytest.mark.parametrize("group", ["layers.0.qkv", "layers.1.down", "head"])
@pytest.mark.parametrize("dealers", SETUPS.values(), ids=SETUPS)
def test_a_wrong_row_in_any_of_them_ends_all(material: Material, dealers: int | None, group: str, wrong: int) -> None:
    rig = build(material, dealers, pool_rows=2)
    rig.worker.tamper = after(wrong, group, claiming(adding(1)))  # type: ignore[assignment]
    with pytest.raises(IntegrityError, match=group) as failure:
        overlapped(rig)
    assert sum(name == group for name, _ in rig.outputs) == wrong, (
        "the parts before it were right, none after it is used"
    )
    rig.worker.tamper = honest
    assert_out_of_use(rig, failure.value)


@pytest.mark.parametrize("dealers", MASKED.values(), ids=MASKED)
def test_a_lost_link_resends_the_same_words_of_every_part(material: Material, dealers: int) -> None:
    rig = build(material, dealers, pool_rows=2, retries=1)
    lost = 0

    def lose_once(exchange: Exchange) -> list[Message | TransportClosedError]:
        nonlocal lost
        lost += 1
        return [TransportClosedError("the link is gone.")] if lost == 1 else [exchange.reply]

    rig.worker.tamper = on("layers.1.qkv", lose_once)
    assert torch.equal(overlapped(rig), expected(material))
    sent = [tensor for group, tensor in rig.worker.tensors if group == "layers.1.qkv"]
    first, again = sent[0], [words for words in sent[1:] if torch.equal(words, sent[0])]
    assert len(again) == 1, "the lost part went out again as it was"
    assert sum(torch.equal(first, words) for words in sent) == 2
    assert lost > PARTS, "the others were on the same link and went out again too"
    assert_only_words_that_may_leave(rig)


def test_what_is_abandoned_does_not_disturb_what_comes_next(material: Material) -> None:
    """A failed request of one part leaves replies to the others on their way; they are dropped when they come."""
    rig = build(material, None)
    failure = messages.Failure(id=1, code="input", message="no")

    def fail(exchange: Exchange) -> list[Message]:
        rig.worker.tamper = honest
        return [[messages.encode(messages.Failure(id=exchange.request.id, code="input", message=failure.message))]]

    rig.worker.tamper = on("layers.0.o", fail)
    with pytest.raises(InputError, match=r"layers\.0\.o"):
        overlapped(rig)
    assert torch.equal(overlapped(rig), expected(material))
