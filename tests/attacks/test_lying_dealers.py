"""Dealers that lie, alone or together with the worker: the one check of the result covers them all."""

from __future__ import annotations

from contextlib import suppress
from itertools import product

import pytest
import torch
from attacks.lies import LIES
from attacks.watching import assert_names, assert_nothing_followed, assert_out_of_use, watch_use
from hostile import (
    OTHER_PROMPT,
    PROMPT,
    TARGETS,
    TOKENS,
    Material,
    Rig,
    adding,
    build,
    claiming,
    fill,
    honest,
    on,
)
from torch import Tensor

from tsqp.errors import IntegrityError, TsqpError

# Their differences and sums are 0, small, or multiples of high powers of two, where a check modulo 2^32 would err.
DELTAS = (1, -1, 1 << 16, 1 << 31, (1 << 31) - 1, 0x7FC00000, (1 << 32) - (1 << 16))
PAIRS = tuple(product(DELTAS, DELTAS))
FIRST = "layers.0.qkv"


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(
    ("dealers", "liar", "target"),
    [(1, 0, "layers.1.down"), (2, 0, "head"), (2, 1, "layers.0.qkv"), (2, 1, "layers.1.down")],
)
def test_a_dealers_lie_is_found(
    material: Material, dealers: int, liar: int, target: str, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes to light in the worker's product, so everyone is named and nobody is used again."""
    rig = build(material, dealers)
    rig.prefill(OTHER_PROMPT)
    rig.outputs.clear()
    used = watch_use(monkeypatch)
    rig.dealers[liar].tamper = on(target, claiming(LIES[lie]))
    with pytest.raises(IntegrityError) as raised:
        rig.prefill(PROMPT)
    assert_nothing_followed(rig, target, used)
    assert_names(raised.value, target, rig.contributors)
    assert_out_of_use(rig, raised.value)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("liar", [0, 1])
def test_a_lie_told_ahead_of_time_is_found(
    material: Material, liar: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product may lie in the pool for long before its mask hides anything."""
    rig = build(material, 2, pool_rows=2 * TOKENS)
    rig.prefill(OTHER_PROMPT)
    rig.outputs.clear()
    rig.dealers[liar].tamper = on(target, claiming(adding(1 << 31, row=-1)))
    assert rig.pool is not None
    fill(rig.pool)
    rig.dealers[liar].tamper = honest
    used = watch_use(monkeypatch)
    with pytest.raises(IntegrityError) as raised:
        prefill_until_found(rig, used)
    assert_nothing_followed(rig, target, used)
    assert_names(raised.value, target, rig.contributors)
    assert_out_of_use(rig, raised.value)


def prefill_until_found(rig: Rig, used: list[str]) -> None:
    """Use up a pool; keep what is known of the last prefill only."""
    for _ in range(3):
        rig.outputs.clear()
        used.clear()
        rig.prefill(PROMPT)


def words_of(deltas: tuple[int, ...], rig: Rig, *, target: str = FIRST) -> None:
    """Let the last peers of a rig add to the same word."""
    for peer, delta in zip(rig.peers[-len(deltas) :], deltas, strict=True):
        peer.tamper = on(target, claiming(adding(delta, row=1, column=2)))


def first_product(rig: Rig) -> Tensor:
    """Ask for one product of small integers."""
    xq_MK = torch.arange(2 * rig.material.groups[0].in_features, dtype=torch.int32).view(2, -1)
    return rig.observed_products(FIRST, xq_MK)


@pytest.mark.parametrize(("d1", "d2"), [pair for pair in PAIRS if (pair[0] - pair[1]) % (1 << 32)])
def test_errors_of_worker_and_dealer_that_do_not_cancel_are_found(material: Material, d1: int, d2: int) -> None:
    rig = build(material, 1)
    words_of((d1, d2), rig)
    with pytest.raises(IntegrityError) as raised:
        first_product(rig)
    assert_names(raised.value, FIRST, rig.contributors)
    assert not rig.outputs


@pytest.mark.parametrize(("d1", "d2"), [pair for pair in PAIRS if sum(pair) % (1 << 32)])
def test_errors_of_two_dealers_that_do_not_cancel_are_found(material: Material, d1: int, d2: int) -> None:
    rig = build(material, 2)
    words_of((d1, d2), rig)
    with pytest.raises(IntegrityError) as raised:
        first_product(rig)
    assert_names(raised.value, FIRST, rig.contributors)
    assert not rig.outputs


@pytest.mark.parametrize(
    "deltas",
    [(d, d) for d in DELTAS] + [(d, d - 5, 5) for d in DELTAS] + [(0, d, -d) for d in DELTAS],
    ids=lambda deltas: "-".join(map(str, deltas)),
)
@pytest.mark.parametrize("target", ["layers.1.down", "head"])
def test_errors_that_cancel_change_nothing(
    material: Material, deltas: tuple[int, ...], target: str, local_logits: Tensor
) -> None:
    """The value is right, which is all that the check promises: logits have the same bits."""
    rig = build(material, len(deltas) - 1)
    words_of(deltas, rig, target=target)
    assert torch.equal(rig.prefill(PROMPT), local_logits)


@pytest.mark.parametrize("dealers", [1, 2])
def test_errors_in_different_words_do_not_cancel(material: Material, dealers: int) -> None:
    for row, column in ((0, 2), (1, 3)):
        rig = build(material, dealers)
        rig.worker.tamper = on(FIRST, claiming(adding(1, row=1, column=2)))
        rig.dealers[-1].tamper = on(FIRST, claiming(adding(1, row=row, column=column)))
        with pytest.raises(IntegrityError):
            rig.prefill(PROMPT)


@pytest.mark.parametrize("dealers", [1, 2])
@pytest.mark.parametrize("again", ["fill", "take"])
def test_after_a_lie_dealers_are_asked_for_nothing_more(material: Material, dealers: int, again: str) -> None:
    """All who contributed are out of use: neither the idle thread nor another product may go on with a dealer."""
    rig = build(material, dealers, pool_rows=8)
    rig.dealers[-1].tamper = on("layers.0.qkv", claiming(adding(1)))
    with pytest.raises(IntegrityError):
        prefill_until_found(rig, [])
    rig.dealers[-1].tamper = honest
    sent = [len(dealer.received) for dealer in rig.dealers]
    assert rig.pool is not None
    with suppress(TsqpError):
        rig.pool.fill_step() if again == "fill" else rig.pool.take("layers.0.qkv", 2)
    assert [len(dealer.received) for dealer in rig.dealers] == sent
    assert rig.pool.held == 0


def test_a_product_in_flight_during_a_lie_ends_too(material: Material) -> None:
    """Another conversation that shares the pool is told, before it uses what the same dealers made."""
    rig = build(material, 1, pool_rows=8)
    second = rig.second_enclave()
    rig.worker.tamper = on("layers.0.o", claiming(adding(1)))
    with pytest.raises(IntegrityError):
        rig.prefill(PROMPT)
    with pytest.raises(IntegrityError):
        second.prefill(PROMPT)
    assert not second.outputs


def test_peers_is_what_contributed(material: Material) -> None:
    """No dealer is blamed at `verified`, and nobody but the worker where the enclave masks."""
    for dealers in (None, 0):
        rig = build(material, dealers)
        rig.worker.tamper = on("head", claiming(adding(1)))
        with pytest.raises(IntegrityError) as raised:
            rig.prefill(PROMPT)
        assert "dealer" not in str(raised.value)
        assert f"worker {rig.worker.address}" in str(raised.value)


def test_a_dealer_that_answers_for_the_other_seed_is_found(material: Material) -> None:
    """Each of two dealers has a seed of its own; one answering with the other's products lies."""
    rig = build(material, 2)
    first, second = rig.dealers
    second.tamper = on(FIRST, claiming(lambda _exchange: first.answered[0][1].clone()))
    with pytest.raises(IntegrityError, match=FIRST):
        rig.prefill(PROMPT)
    assert first.answered[0][0] == FIRST
