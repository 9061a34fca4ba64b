"""What must not have happened after a lie, and what an error must say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hostile import PROMPT, Rig

from tsqp.errors import HostileError, IntegrityError
from tsqp.model import llama
from tsqp.wire import codec, messages


def watch_use(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note each call of what uses products: attention and SwiGLU."""
    calls: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(name)
            return function(*args)

        return call

    for name in ("causal_attention", "swiglu"):
        monkeypatch.setattr(llama, name, watched(name, getattr(llama, name)))
    return calls


def uses_before(rig: Rig, target: str) -> list[str]:
    """List the calls that ``watch_use`` notes before the product of a group is there."""
    after = {"qkv": ["causal_attention"], "gate_up": ["swiglu"]}
    calls: list[str] = []
    for group in rig.material.groups:
        if group.name == target:
            return calls
        calls += after.get(group.name.rpartition(".")[2], [])
    raise AssertionError(target)


def assert_nothing_followed(rig: Rig, target: str, used: list[str]) -> None:
    """Fail if anything of a wrong product of ``target`` was used, or anything was sent to anybody after it."""
    names = [group.name for group in rig.material.groups]
    before = names[: names.index(target)]
    assert [group for group, _ in rig.outputs] == before
    assert used == uses_before(rig, target)
    last = rig.journal[-1]
    assert isinstance(last.header, messages.LinearExact)
    assert (last.peer, last.group) == (rig.worker.address, target)


def assert_names(error: BaseException, group: str, contributors: tuple[str, ...]) -> None:
    """Fail unless a message names a linear group and everyone who contributed."""
    text = str(error)
    assert group in text
    for contributor in contributors:
        assert contributor in text


def assert_out_of_use(rig: Rig, error: BaseException) -> None:
    """Fail unless everything is refused from now on, with the first error's text, without a word to anybody."""
    sent = len(rig.journal)
    for group, xq_MK in rig.inputs[:1] + rig.inputs[-1:]:
        with pytest.raises(IntegrityError, match="out of use") as refused:
            rig.products.start(group, xq_MK)()
        assert str(error) in str(refused.value)
    with pytest.raises(HostileError):
        rig.prefill(PROMPT)
    assert len(rig.journal) == sent
    if rig.pool is not None:
        assert rig.pool.held == 0


def assert_only_words_that_may_leave(rig: Rig) -> None:
    """Fail unless all that left are exact products: of the integers at `verified`, of none of them at `masked`."""
    allowed = {"Hello", "Codes", "MaskProduct", "LinearExact"}
    assert {type(sent.header).__name__ for sent in rig.journal} <= allowed
    rows = {bytes(codec.frame_of(row)) for _, xq_MK in rig.inputs for row in xq_MK}
    sent = [bytes(codec.frame_of(row)) for _, x_MK in rig.worker.tensors for row in x_MK]
    assert rig.worker.tensors
    assert all(x_MK.dtype == torch.int32 for _, x_MK in rig.worker.tensors)
    assert not any(dealer.tensors for dealer in rig.dealers)
    assert all((row in rows) == (rig.pool is None) for row in sent)
