"""A peer whose replies are not what the request asked for: refused by their form, whatever they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import pytest
import torch
from attacks.watching import assert_nothing_followed, watch_use
from hostile import (
    PROMPT,
    SETUPS,
    TARGETS,
    Exchange,
    HostilePeer,
    Material,
    Message,
    Rig,
    Tamper,
    build,
    on,
    result_message,
)
from torch import Tensor

from tsqp.errors import HostileError, ProtocolError
from tsqp.wire import messages

Change = Callable[[Exchange], Message]


def of_tensor(change: Callable[[Tensor], Tensor]) -> Change:
    """Send a well-formed result that holds another kind of tensor."""
    return lambda exchange: result_message(exchange, change(exchange.result))


def of_frames(change: Callable[[list[bytes]], Sequence[bytes]]) -> Change:
    """Keep the header and change the frames after it."""
    return lambda exchange: [exchange.reply[0], *change([bytes(frame) for frame in exchange.reply[1:]])]


def of_header(change: Callable[[Exchange], bytes]) -> Change:
    return lambda exchange: [change(exchange), *exchange.reply[1:]]


def labelled(dtype: str, *, shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape) -> Change:
    """Keep the frame and lie about it."""

    def change(exchange: Exchange) -> bytes:
        spec = {"dtype": dtype, "shape": shape(tuple(exchange.result.shape))}
        return packed(kind="result", y=spec, id=exchange.request.id)

    return of_header(change)


def packed(**fields: object) -> bytes:
    return msgspec.msgpack.encode({"v": messages.PROTOCOL_VERSION, "compute_ns": 1, **fields})


def reply(message: Callable[[int], messages.Reply]) -> Change:
    """Answer with a reply of another kind."""
    return lambda exchange: [messages.encode(message(exchange.request.id))]


def welcome(request_id: int) -> messages.Reply:
    return messages.Welcome(
        id=request_id,
        software="tsqp 9",
        instance="x",
        serves="exact",
        model="m",
        model_digest="d",
        device="cpu",
        dtype="int8",
        module_count=1,
        groups=(),
    )


# Replies to the right request: their messages name it.
MALFORMED: dict[str, Change] = {
    "a row less": of_tensor(lambda y_MN: y_MN[1:]),
    "a row more": of_tensor(lambda y_MN: torch.cat((y_MN, y_MN[:1]))),
    "no rows": of_tensor(lambda y_MN: y_MN[:0]),
    "a column less": of_tensor(lambda y_MN: y_MN[:, 1:]),
    "transposed": of_tensor(lambda y_MN: y_MN.T.contiguous()),
    "flat": of_tensor(torch.flatten),
    "rank 3": of_tensor(lambda y_MN: y_MN[None]),
    "float32": of_tensor(lambda y_MN: y_MN.view(torch.float32)),
    "int64": of_tensor(lambda y_MN: y_MN.long()),
    "int8": of_tensor(lambda y_MN: y_MN.view(torch.int8)),
    "labelled float32": labelled("float32"),
    "labelled int8": labelled("int8", shape=lambda shape: (shape[0], shape[1] * 4)),
    "labelled larger": labelled("int32", shape=lambda shape: (shape[0] + 1, shape[1])),
    "no frame": of_frames(lambda _frames: []),
    "two frames": of_frames(lambda frames: [*frames, *frames]),
    "an empty frame more": of_frames(lambda frames: [*frames, b""]),
    "a frame cut by a word": of_frames(lambda frames: [frames[0][:-4]]),
    "a frame cut by a byte": of_frames(lambda frames: [frames[0][:-1]]),
    "a frame with a byte more": of_frames(lambda frames: [frames[0] + b"\0"]),
    "an empty frame": of_frames(lambda _frames: [b""]),
    "a welcome": reply(welcome),
    "a state": reply(lambda i: messages.StateResult(id=i, names=(), tensors=())),
    "counters": reply(
        lambda i: messages.StatsResult(
            id=i, uptime_s=0.0, requests={}, errors=0, bytes_received=0, bytes_sent=0, compute_s=0.0
        )
    ),
    "a protocol failure": reply(lambda i: messages.Failure(id=i, code="protocol", message="no")),
    "a version failure": reply(lambda i: messages.Failure(id=i, code="version", message="no")),
}

# Bytes that cannot be matched to a request.
UNMATCHED: dict[str, Change] = {
    "another id": of_header(lambda exchange: _with_id(exchange, exchange.request.id + 1)),
    "an answered id": of_header(lambda exchange: _with_id(exchange, 1)),
    "id 0": of_header(lambda exchange: _with_id(exchange, 0)),
    "no frames at all": lambda _exchange: [],
    "an empty header": of_header(lambda _exchange: b""),
    "a header of zeros": of_header(lambda _exchange: bytes(64)),
    "a header that ends early": of_header(lambda exchange: bytes(exchange.reply[0])[:-1]),
    "a header with a byte more": of_header(lambda exchange: bytes(exchange.reply[0]) + b"\0"),
    "another version": of_header(lambda exchange: packed(v=2, kind="result", id=exchange.request.id)),
    "an unknown kind": of_header(lambda exchange: packed(kind="trust me", id=exchange.request.id)),
    "an unknown field": of_header(lambda exchange: _with_fields(exchange, checked=True)),
    "an unknown dtype": labelled("complex64"),
    "a negative shape": labelled("int32", shape=lambda shape: (-shape[0], -shape[1])),
    "an endless shape": labelled("int32", shape=lambda _shape: (1 << 40, 1 << 40)),
    "deep nesting": of_header(lambda _exchange: b"\x91" * 100_000),
    "tensors beside a failure": of_header(
        lambda exchange: messages.encode(messages.Failure(id=exchange.request.id, code="internal", message="no"))
    ),
    "only the tensor": lambda exchange: exchange.reply[1:],
}


FORMS: dict[str, Change] = {**MALFORMED, **UNMATCHED}


def _with_fields(exchange: Exchange, **fields: object) -> bytes:
    y = exchange.result
    return packed(kind="result", y={"dtype": "int32", "shape": tuple(y.shape)}, **{"id": exchange.request.id, **fields})


def _with_id(exchange: Exchange, request_id: int) -> bytes:
    return _with_fields(exchange, id=request_id)


def sending(change: Change) -> Tamper:
    return lambda exchange: [change(exchange)]


def twice(exchange: Exchange) -> list[Message]:
    return [exchange.reply, exchange.reply]


@pytest.mark.parametrize(
    ("form", "target"),
    [(form, "layers.1.down") for form in MALFORMED] + [("float32", target) for target in TARGETS],
)
def test_a_workers_malformed_reply_is_refused(
    rig: Rig, form: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = watch_use(monkeypatch)
    rig.worker.tamper = on(target, sending(MALFORMED[form]))
    with pytest.raises(ProtocolError) as raised:
        rig.prefill(PROMPT)
    assert_nothing_followed(rig, target, used)
    assert target in str(raised.value)
    assert rig.worker.address in str(raised.value)


@pytest.mark.parametrize("form", UNMATCHED)
def test_a_workers_unreadable_reply_is_refused(rig: Rig, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = watch_use(monkeypatch)
    rig.worker.tamper = on("layers.1.down", sending(UNMATCHED[form]))
    with pytest.raises(ProtocolError):
        rig.prefill(PROMPT)
    assert_nothing_followed(rig, "layers.1.down", used)


@pytest.mark.parametrize("form", UNMATCHED)
@pytest.mark.parametrize("by", ["worker", "dealer"])
def test_an_unreadable_reply_names_who_sent_it(material: Material, form: str, by: str) -> None:
    """Of several peers the operator must know which to stop using."""
    rig = build(material, 2)
    liar = rig.worker if by == "worker" else rig.dealers[1]
    liar.tamper = on("layers.1.down", sending(UNMATCHED[form]))
    with pytest.raises(ProtocolError) as raised:
        rig.prefill(PROMPT)
    assert liar.address in str(raised.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dealers", "liar"), [(1, 0), (2, 1)])
def test_a_dealers_malformed_reply_is_refused(material: Material, dealers: int, liar: int, form: str) -> None:
    """The worker is never asked for that product: there is no mask to hide its input."""
    rig, target = build(material, dealers), "layers.1.down"
    rig.dealers[liar].tamper = on(target, sending(FORMS[form]))
    with pytest.raises(ProtocolError) as raised:
        rig.prefill(PROMPT)
    assert all(group != target for group, _ in rig.worker.tensors)
    assert all(group != target for group, _ in rig.outputs)
    if form in MALFORMED:
        assert target in str(raised.value)
        assert rig.dealers[liar].address in str(raised.value)


def test_a_second_reply_is_refused(rig: Rig) -> None:
    """It comes to light with the next message: the group after."""
    rig.worker.tamper = on("layers.0.qkv", twice)
    with pytest.raises(ProtocolError, match="not in flight") as raised:
        rig.prefill(PROMPT)
    assert rig.worker.address in str(raised.value)
    assert [group for group, _ in rig.outputs] == ["layers.0.qkv"]
    assert rig.journal[-1].group == "layers.0.o"


@pytest.mark.parametrize("liar", [0, 1])
def test_a_dealers_second_reply_is_refused(material: Material, liar: int) -> None:
    rig = build(material, 2)
    rig.dealers[liar].tamper = on("layers.0.qkv", twice)
    with pytest.raises(ProtocolError, match="not in flight") as raised:
        rig.prefill(PROMPT)
    assert rig.dealers[liar].address in str(raised.value)


def test_replies_may_come_in_any_order(material: Material, local_logits: Tensor) -> None:
    """Dealers work on several products at once: that one answers late is no lie."""
    rig = build(material, 2)
    kept: list[Message] = []

    def late(exchange: Exchange) -> list[Message]:
        if exchange.group == "layers.0.qkv":
            kept.append(exchange.reply)
            return []
        return [exchange.reply, kept.pop()] if kept else [exchange.reply]

    rig.dealers[0].tamper = late
    assert torch.equal(rig.prefill(PROMPT), local_logits)
    assert not kept


@pytest.mark.parametrize("dealers", SETUPS.values(), ids=SETUPS)
@pytest.mark.parametrize("form", ["a row less", "float32", "a welcome", "another id", "an empty header"])
def test_after_a_malformed_reply_its_sender_is_out_of_use(material: Material, dealers: int | None, form: str) -> None:
    """``HostileError`` means: stop using it."""
    rig = build(material, dealers, pool_rows=8)
    rig.worker.tamper = on("layers.1.down", sending(FORMS[form]))
    with pytest.raises(ProtocolError):
        rig.prefill(PROMPT)
    rig.worker.tamper = lambda exchange: [exchange.reply]
    assert_refuses(rig, rig.worker)


@pytest.mark.parametrize("dealers", [1, 2])
def test_after_a_malformed_mask_product_its_sender_is_out_of_use(material: Material, dealers: int) -> None:
    rig = build(material, dealers)
    rig.dealers[-1].tamper = on("layers.1.down", sending(MALFORMED["a row less"]))
    with pytest.raises(ProtocolError):
        rig.prefill(PROMPT)
    rig.dealers[-1].tamper = lambda exchange: [exchange.reply]
    assert_refuses(rig, rig.dealers[-1])


def assert_refuses(rig: Rig, liar: HostilePeer) -> None:
    """Fail if the enclave goes on with a peer that broke the protocol."""
    sent = len(liar.received)
    with pytest.raises(HostileError):
        rig.prefill(PROMPT)
    assert len(liar.received) == sent
