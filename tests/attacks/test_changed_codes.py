"""A worker that streams other codes than the model's: the enclave makes no check of them, and asks for nothing else."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import torch
from attacks.test_malformed import MALFORMED, UNMATCHED, sending
from hostile import (
    TARGETS,
    Exchange,
    HostilePeer,
    Material,
    Tamper,
    adding,
    build,
    claiming,
    honest,
    met,
    result_message,
)
from torch import Tensor

from tsqp.enclave import codes
from tsqp.enclave.codes import StreamedCodes, read_codes
from tsqp.errors import HostileError, IntegrityError, ProtocolError
from tsqp.wire import messages

Edit = Callable[[Exchange], Tensor]


@pytest.fixture
def streaming(material: Material) -> HostilePeer:
    return HostilePeer("10.6.6.6:50051", material.dispatcher())


@pytest.fixture(params=[7, None], ids=["seven rows", "whole groups"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, material: Material) -> None:
    """Stream in small pieces too; ``None`` leaves the real size, which holds any group of a tiny model."""
    if request.param:
        smallest = min(group.in_features for group in material.groups)
        monkeypatch.setattr(codes, "_CHUNK_BYTES", request.param * smallest)


def of_codes(group: str, tamper: Tamper, *, last: bool = False) -> Tamper:
    """Tamper with the first or the last piece of one group's codes."""

    def tampered(exchange: Exchange) -> object:
        request = exchange.request
        if not isinstance(request, messages.Codes) or request.group != group:
            return honest(exchange)
        at_end = request.first + request.rows == exchange.peer.dispatcher.service.groups[group].rows
        return tamper(exchange) if (at_end if last else request.first == 0) else honest(exchange)

    return tampered  # type: ignore[return-value]


def changed(change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda exchange: change(exchange.result)


def _of_another_layer(exchange: Exchange) -> Tensor:
    twins = {"layers.0.qkv": "layers.1.qkv", "layers.1.down": "layers.0.down", "head": "layers.0.gate_up"}
    request = msgspec.structs.replace(exchange.request, group=twins[exchange.group])
    return exchange.peer.dispatcher.service.product(request, ())


def _bit(bit: int) -> Edit:
    def flip(codes_RK: Tensor) -> Tensor:
        codes_RK[-1, -1] ^= torch.tensor(1 << bit, dtype=torch.uint8).view(torch.int8)
        return codes_RK

    return changed(flip)


EDITS: dict[str, Edit] = {
    "a code off by 1": adding(1),
    "the lowest bit": _bit(0),
    "the sign": _bit(7),
    "zeros": changed(torch.zeros_like),
    "another layer's": _of_another_layer,
    "columns reversed": changed(lambda codes_RK: codes_RK.flip(1)),
}


def read(material: Material, peer: HostilePeer) -> None:
    read_codes(material.packed.manifest, StreamedCodes(met(material, peer, "exact")), {})


def assert_nothing_else_was_asked(material: Material, peer: HostilePeer, group: str) -> None:
    """Fail if the worker was asked for more than the groups up to this one."""
    names = [each.name for each in material.groups]
    asked = dict.fromkeys(sent.group for sent in peer.received[1:])
    assert list(asked) == names[: names.index(group) + 1]
    assert all(isinstance(sent.header, messages.Codes) for sent in peer.received[1:])


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("group", TARGETS)
@pytest.mark.parametrize("last", [False, True], ids=["in the first piece", "in the last piece"])
def test_changed_codes_are_refused(
    material: Material, streaming: HostilePeer, group: str, edit: str, *, last: bool
) -> None:
    streaming.tamper = of_codes(group, claiming(EDITS[edit]), last=last)
    with pytest.raises(IntegrityError, match=f"codes of {group}") as raised:
        read(material, streaming)
    assert streaming.address in str(raised.value)
    assert_nothing_else_was_asked(material, streaming, group)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("group", TARGETS)
def test_pieces_in_another_order_are_refused(material: Material, streaming: HostilePeer, group: str) -> None:
    """Right bytes at the wrong place: the rows of the whole group backwards."""

    def backwards(exchange: Exchange) -> Tensor:
        request = exchange.request
        assert isinstance(request, messages.Codes)
        rows = exchange.peer.dispatcher.service.groups[group].rows
        first = rows - request.first - request.rows
        asked = msgspec.structs.replace(request, first=first)
        return exchange.peer.dispatcher.service.product(asked, ()).flip(0)

    streaming.tamper = lambda exchange: claiming(backwards)(exchange) if exchange.group == group else honest(exchange)
    with pytest.raises(IntegrityError, match=f"codes of {group}"):
        read(material, streaming)
    assert_nothing_else_was_asked(material, streaming, group)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("form", MALFORMED)
def test_malformed_pieces_are_refused(material: Material, streaming: HostilePeer, form: str) -> None:
    if form == "int8":
        streaming.tamper = of_codes("layers.1.down", lambda exchange: [result_message(exchange, exchange.result.int())])
    elif form == "float32":
        streaming.tamper = of_codes(
            "layers.1.down", lambda exchange: [result_message(exchange, exchange.result.float())]
        )
    else:
        streaming.tamper = of_codes("layers.1.down", sending(MALFORMED[form]))
    with pytest.raises(ProtocolError, match=r"layers\.1\.down") as raised:
        read(material, streaming)
    assert streaming.address in str(raised.value)
    assert_nothing_else_was_asked(material, streaming, "layers.1.down")


@pytest.mark.parametrize("form", UNMATCHED)
def test_unreadable_pieces_are_refused(material: Material, streaming: HostilePeer, form: str) -> None:
    streaming.tamper = of_codes("layers.1.down", sending(UNMATCHED[form]))
    with pytest.raises(HostileError):
        read(material, streaming)
    assert_nothing_else_was_asked(material, streaming, "layers.1.down")


def test_codes_that_change_between_two_askings_are_refused(material: Material, streaming: HostilePeer) -> None:
    """What was right at one start is checked again at the next."""
    read(material, streaming)
    streaming.journal.clear()
    streaming.tamper = of_codes("head", claiming(EDITS["the lowest bit"]))
    with pytest.raises(IntegrityError, match="codes of head"):
        read(material, streaming)


def test_a_worker_that_multiplies_by_other_codes_than_it_streamed_is_found(material: Material) -> None:
    rig = build(material, None)
    codes_NK = {**material.codes, "head": material.codes["head"].roll(1, 0)}
    rig.worker.dispatcher = material.dispatcher(codes=codes_NK)
    with pytest.raises(IntegrityError, match="linear head"):
        rig.prefill()


def test_a_failure_to_stream_is_no_fallback(material: Material, streaming: HostilePeer) -> None:
    """A worker that has no codes to give is not asked for anything else."""
    streaming.tamper = of_codes(
        "layers.0.qkv",
        lambda exchange: [[messages.encode(messages.Failure(id=exchange.request.id, code="input", message="none"))]],
    )
    with pytest.raises(Exception, match=r"codes of layers\.0\.qkv"):
        read(material, streaming)
    assert_nothing_else_was_asked(material, streaming, "layers.0.qkv")
