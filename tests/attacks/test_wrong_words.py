"""A worker that multiplies wrongly: every wrong word is found before use, and ends the use of its peers."""

from __future__ import annotations

import pytest
import torch
from attacks.lies import LIES
from attacks.watching import assert_names, assert_nothing_followed, assert_out_of_use, watch_use
from hostile import OTHER_PROMPT, PROMPT, SETUPS, TARGETS, Material, Rig, adding, build, claiming, fill, on
from torch import Tensor

from tsqp.errors import IntegrityError


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found_before_anything_uses_it(
    rig: Rig, target: str, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.prefill(OTHER_PROMPT)
    if rig.pool is not None:
        fill(rig.pool)
    rig.inputs.clear()
    rig.outputs.clear()
    used = watch_use(monkeypatch)
    rig.worker.tamper = on(target, claiming(LIES[lie]))
    with pytest.raises(IntegrityError) as raised:
        rig.prefill(PROMPT)
    assert_nothing_followed(rig, target, used)
    assert_names(raised.value, target, rig.contributors)
    assert_out_of_use(rig, raised.value)


def test_without_a_lie_logits_are_the_local_ones(rig: Rig, local_logits: Tensor) -> None:
    """And they still are when the pool has been used up."""
    assert all(torch.equal(rig.prefill(PROMPT), local_logits) for _ in range(3))


@pytest.mark.parametrize("dealers", SETUPS.values(), ids=SETUPS)
def test_a_lie_in_any_linear_is_found(material: Material, dealers: int | None) -> None:
    for group in material.groups:
        rig = build(material, dealers)
        rig.worker.tamper = on(group.name, claiming(adding(1, row=-1, column=-1)))
        with pytest.raises(IntegrityError, match=group.name):
            rig.prefill(PROMPT, all_logits=False)
        assert rig.journal[-1].group == group.name


def test_every_wrong_row_is_counted(rig: Rig) -> None:
    def lie_in_two_rows(y_MN: Tensor) -> Tensor:
        y_MN[[1, 4], 3] += 7
        return y_MN

    rig.worker.tamper = on("layers.0.o", claiming(lambda exchange: lie_in_two_rows(exchange.result)))
    with pytest.raises(IntegrityError, match="2 of 6 rows"):
        rig.prefill(PROMPT)


def test_no_word_of_a_row_is_left_out(material: Material) -> None:
    """A fresh check for each word, since a check that has failed refuses everything."""
    xq_MK = torch.arange(48, dtype=torch.int32)[None]
    for column in range(material.groups[0].rows):
        fresh = build(material, None)
        fresh.worker.tamper = on("layers.0.qkv", claiming(adding(1 << 31, column=column)))
        with pytest.raises(IntegrityError):
            fresh.products.start("layers.0.qkv", xq_MK)()


def test_a_lie_in_the_second_half_of_a_run_ends_it(rig: Rig, local_logits: Tensor) -> None:
    """A worker may behave for a while."""
    assert torch.equal(rig.prefill(PROMPT), local_logits)
    rig.worker.tamper = on("layers.2.down", claiming(adding(1)))
    with pytest.raises(IntegrityError) as raised:
        rig.prefill(PROMPT)
    rig.worker.tamper = lambda exchange: [exchange.reply]
    assert_out_of_use(rig, raised.value)
