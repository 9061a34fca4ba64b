"""Mask products are asked of a dealer in parts, few at once; a part that fails takes nothing of the others with it."""

from __future__ import annotations

import pytest
import torch
from hostile import DEALER_ADDRESSES, Exchange, HostilePeer, Material, Message, honest, met

from tsqp.enclave import mask_sources
from tsqp.enclave.mask_sources import DealerMasks
from tsqp.errors import ProtocolError, TransportTimeoutError, TsqpError
from tsqp.wire import messages

QKV, DOWN = "layers.0.qkv", "layers.0.down"
ROWS = 3


@pytest.fixture(autouse=True)
def parts_of_three_rows(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    widest = max(group.in_features + group.rows for group in material.groups if group.name in {QKV, DOWN})
    monkeypatch.setattr(messages, "MAX_UNPAID_BYTES", ROWS * 8 * widest)
    monkeypatch.setattr(mask_sources, "_UNDER_WAY", 4)


@pytest.fixture
def dealer(material: Material) -> HostilePeer:
    return HostilePeer(DEALER_ADDRESSES[0], material.dispatcher("masks"))


@pytest.fixture
def masks(material: Material, dealer: HostilePeer) -> DealerMasks:
    return DealerMasks(material.groups, met(material, dealer, "masks"))


def products(material: Material, masks: DealerMasks, group: str, first: int, count: int) -> torch.Tensor:
    codes_NK = material.codes[group]
    return (masks.rows(group, first, count).long() @ codes_NK.long().T).int()


def asked(dealer: HostilePeer) -> list[messages.MaskProduct]:
    return [sent.header for sent in dealer.received if isinstance(sent.header, messages.MaskProduct)]


def test_parts_make_the_whole(material: Material, dealer: HostilePeer, masks: DealerMasks) -> None:
    collect = masks.start(QKV, 5, 40)
    assert len(asked(dealer)) == 4
    assert torch.equal(collect(), products(material, masks, QKV, 5, 40))
    rows = [row for each in asked(dealer) for row in range(each.first, each.first + each.count)]
    assert rows == list(range(5, 45))
    assert max(each.count for each in asked(dealer)) < 40


def test_what_was_asked_later_may_be_wanted_first(material: Material, dealer: HostilePeer, masks: DealerMasks) -> None:
    """Also where what was asked before has all the room."""
    before, later = masks.start(QKV, 0, 30), masks.start(DOWN, 0, 10)
    assert {each.group for each in asked(dealer)} == {QKV}
    assert torch.equal(later(), products(material, masks, DOWN, 0, 10))
    assert torch.equal(before(), products(material, masks, QKV, 0, 30))


def test_a_part_that_fails_leaves_nothing_behind(material: Material, dealer: HostilePeer, masks: DealerMasks) -> None:
    """The dealer is slow once: what else was asked is given up, late answers are dropped, and room is there again."""
    held: list[Exchange] = []

    def late(exchange: Exchange) -> list[Message | TsqpError]:
        held.append(exchange)
        return []

    dealer.tamper = late
    collect = masks.start(QKV, 0, 40)
    with pytest.raises(TransportTimeoutError):
        collect()
    before = len(asked(dealer))
    dealer.tamper = lambda exchange: [*(each.reply for each in held), *honest(exchange)]
    again = masks.start(QKV, 40, 3)
    assert [each.first for each in asked(dealer)[before:]] == [40]
    dealer.tamper = honest
    assert torch.equal(again(), products(material, masks, QKV, 40, 3))
    assert torch.equal(masks.start(DOWN, 0, 40)(), products(material, masks, DOWN, 0, 40))
    assert len({(each.group, row) for each in asked(dealer) for row in range(each.first, each.first + each.count)}) == (
        sum(each.count for each in asked(dealer))
    )


def test_a_part_of_another_size_is_refused(dealer: HostilePeer, masks: DealerMasks) -> None:
    dealer.tamper = lambda exchange: [
        [
            messages.encode(
                messages.Result(id=exchange.request.id, y=messages.TensorSpec("int32", (1, 1)), compute_ns=1)
            ),
            bytes(4),
        ]
    ]
    with pytest.raises(ProtocolError, match=f"mask product {QKV}"):
        masks.start(QKV, 0, 40)()
