"""A worker of an attached model that lies or listens: ``generate()`` ends, and at masked nothing of it is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attached import answer_with, peer_of
from hostile import Exchange, Tamper, honest

import tsqp
from benchmarks.any_decoder import build, logits, prompt
from tsqp.errors import IntegrityError, ProtocolError
from tsqp.wire import codec, messages

LEVELS = ("verified", "masked")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("maps") / "map"
    tsqp.export(build("Mixtral"), out)
    return out


def one_wrong_word(group: str) -> Tamper:
    """Answer products of a group with one word that is one too large."""

    def tamper(exchange: Exchange) -> Any:
        if not exchange.is_product or not exchange.group.endswith(group):
            return honest(exchange)
        reply = messages.Result(id=exchange.request.id, y=codec.spec_of(exchange.result), compute_ns=1)
        wrong = exchange.result.clone()
        wrong[-1, -1] += 1
        return [(messages.encode(reply), codec.frame_of(wrong))]

    return tamper


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("group", ["q_proj+k_proj+v_proj", "down_proj", "lm_head"])
def test_one_wrong_word_ends_generation(
    level: str, group: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, peer = build("Mixtral"), peer_of(directory, level)
    address = answer_with(peer, monkeypatch)
    with tsqp.attach(model, address, level, directory=directory, accept_expert_leak=True):
        expected = logits(model)
        peer.tamper = one_wrong_word(group)
        with pytest.raises(IntegrityError, match=group.replace("+", r"\+")):
            model.generate(prompt(), attention_mask=torch.ones_like(prompt()), max_new_tokens=4, pad_token_id=0)
        peer.tamper = honest
        with pytest.raises(IntegrityError, match="out of use since a wrong product"):
            logits(model)
    with tsqp.attach(model, address, level, directory=directory, accept_expert_leak=True):
        assert torch.equal(logits(model), expected), "the model itself took no harm"


def test_at_open_a_malformed_answer_ends_generation(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, peer = build("Mixtral"), peer_of(directory, "open")

    def shorter(exchange: Exchange) -> Any:
        if not isinstance(exchange.request, messages.Linear):
            return honest(exchange)
        spec = codec.spec_of(exchange.result[:, 1:])
        reply = messages.Result(id=exchange.request.id, y=spec, compute_ns=1)
        return [(messages.encode(reply), codec.frame_of(exchange.result[:, 1:].contiguous()))]

    with tsqp.attach(model, answer_with(peer, monkeypatch), "open", directory=directory):
        peer.tamper = shorter
        with pytest.raises(ProtocolError):
            logits(model)


def test_at_masked_no_word_is_an_input_and_none_comes_twice(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: at verified the integers of the same prompt come again, word for word."""
    sent: dict[str, list[list[int]]] = {}
    for level in LEVELS:
        model, peer = build("Mixtral"), peer_of(directory, level)
        address = answer_with(peer, monkeypatch)
        with tsqp.attach(model, address, level, directory=directory, accept_expert_leak=True):
            logits(model)
            logits(model)
        tensors = [tensor for _, tensor in peer.tensors if tensor.dtype == torch.int32]
        sent[level] = [row.tolist() for tensor in tensors for row in tensor]
        half = len(tensors) // 2
        again = [torch.equal(first, second) for first, second in zip(tensors[:half], tensors[half:], strict=True)]
        assert all(again) if level == "verified" else not any(again)
    plain = {word for row in sent["verified"] for word in row}
    words = [word for row in sent["masked"] for word in row]
    # Of the 2^32 words some thousands are inputs: a uniform one is among them with a chance of 1e-6.
    assert len(words) > 10_000
    assert sum(word in plain for word in words) < 20
