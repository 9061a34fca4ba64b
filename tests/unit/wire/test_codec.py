"""Any bytes give a message or ``ProtocolError``; tensors come out as they went in."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsqp.errors import ProtocolError
from tsqp.wire import codec, messages
from tsqp.wire.messages import AnyRequest, TensorSpec

unhurried = settings(deadline=None)

shapes = st.lists(st.integers(0, 5), max_size=messages.MAX_RANK).map(tuple)
dtypes = st.sampled_from(list(codec.TORCH_DTYPES))
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4))
specs = st.fixed_dictionaries({"dtype": dtypes, "shape": st.lists(st.integers(0, 2**31), max_size=4)})
fields = ("group", "x", "a", "b", "ids", "dtype", "software", "y", "compute_ns", "names", "tensors", "code", "message")
tags = [kind.__struct_config__.tag for kind in (*messages.AnyRequest.__args__, *messages.AnyReply.__args__)]
headers = st.fixed_dictionaries(
    {"v": st.just(messages.PROTOCOL_VERSION) | values, "id": st.integers(0, 9) | values},
    optional={"op": st.sampled_from(tags) | values, "kind": st.sampled_from(tags) | values}
    | dict.fromkeys(fields, specs | values),
)
LINEAR = messages.Linear(id=7, group="head", x=TensorSpec("float32", (2, 3)))
RESULT = messages.Result(id=7, y=TensorSpec("float32", (2, 3)), compute_ns=5)


def counting(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor whose bytes count up, so that a swapped or dropped byte shows."""
    kind = codec.TORCH_DTYPES[dtype]
    size = math.prod(shape) * kind.itemsize
    return (torch.arange(size) % 251).to(torch.uint8).view(kind).view(shape) if size else torch.empty(shape, dtype=kind)


def request_or_protocol_error(frames: list[bytes]) -> None:
    try:
        decoded = codec.decode_request(frames)
    except ProtocolError:
        return
    assert isinstance(decoded.header, messages.AnyRequest)
    assert len(decoded.tensors) == len(frames) - 1


def reply_or_protocol_error(frames: list[bytes]) -> None:
    """Read a reply in every way an enclave may, whatever it asked for."""
    try:
        reply, rest = codec.decode_reply(frames)
    except ProtocolError:
        return
    assert isinstance(reply, messages.AnyReply)
    try:
        if isinstance(reply, messages.Result):
            codec.claim(reply, rest, reply.y, "test")
        elif isinstance(reply, messages.StateResult):
            codec.state_tensors(reply, rest, "test")
    except ProtocolError:
        pass


both_sides = pytest.mark.parametrize("read", [request_or_protocol_error, reply_or_protocol_error])


@both_sides
@unhurried
@given(frames=st.lists(st.binary(max_size=64), max_size=4))
def test_any_bytes_give_a_message_or_a_protocol_error(read: Callable[[list[bytes]], None], frames: list[bytes]) -> None:
    read(frames)


@both_sides
@unhurried
@given(header=headers, tensors=st.lists(st.binary(max_size=16), max_size=3))
def test_any_map_gives_a_message_or_a_protocol_error(
    read: Callable[[list[bytes]], None], header: dict[str, Any], tensors: list[bytes]
) -> None:
    read([msgspec.msgpack.encode(header), *tensors])


@both_sides
@unhurried
@given(data=st.data())
def test_a_mutated_header_gives_a_message_or_a_protocol_error(
    read: Callable[[list[bytes]], None], data: st.DataObject
) -> None:
    raw = bytearray(messages.encode(LINEAR if read is request_or_protocol_error else RESULT))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    read([bytes(raw), bytes(24)])


@both_sides
@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x91" * 3000 + b"\xc0",
        b"\x82\xa1v\x03\xa2op" + b"\x91" * 3000 + b"\xc0",
        b"\x82\xa1v\x03\xa4kind" + b"\x91" * 100_000,
        b"\x82\xa1v\x03\xa4kind\xa3\xff\xff\xff",
        b"\x82\xa1v\x03\xa3\xff\xff\xff\x01",
        b"\xdf\xff\xff\xff\xff",
    ],
    ids=["empty", "nested", "nested op", "nested kind", "tag not UTF-8", "key not UTF-8", "map of 2^32 entries"],
)
def test_awkward_headers_give_a_protocol_error(read: Callable[[list[bytes]], None], header: bytes) -> None:
    read([header])
    with pytest.raises(ProtocolError):
        codec.decode_request([header])
    with pytest.raises(ProtocolError):
        codec.decode_reply([header])


@unhurried
@given(dtype=dtypes, shape=shapes)
def test_tensors_survive_the_wire(dtype: str, shape: tuple[int, ...]) -> None:
    sent = counting(dtype, shape)
    frame = codec.frame_of(sent)
    for buffer in (bytes(frame), bytearray(frame), memoryview(bytes(frame)), memoryview(bytearray(frame))):
        came = codec.tensor_of(codec.spec_of(sent), buffer)
        assert (came.dtype, came.shape) == (sent.dtype, sent.shape)
        assert bytes(codec.frame_of(came)) == bytes(frame)


def test_strided_tensors_travel_in_row_order() -> None:
    x = torch.arange(6.0).view(2, 3).T
    assert torch.equal(codec.tensor_of(codec.spec_of(x), bytes(codec.frame_of(x))), x)


@unhurried
@given(shape=shapes, group=st.text(min_size=1, max_size=40), data=st.data())
def test_requests_survive_the_wire(shape: tuple[int, ...], group: str, data: st.DataObject) -> None:
    x = counting(data.draw(dtypes), shape)
    spec = codec.spec_of(x)
    sent: dict[AnyRequest, tuple[Tensor, ...]] = {
        messages.Hello(id=1, software=group): (),
        messages.Linear(id=2, group=group, x=spec): (x,),
        messages.Embedding(id=3, ids=spec, dtype="float16"): (x,),
        messages.MatMul(id=4, a=spec, b=spec): (x, x),
        messages.State(id=5): (),
        messages.Stats(id=6): (),
        messages.LinearChain(id=7, groups=(group,) * 4, x=spec): (x,),
    }
    for header, tensors in sent.items():
        came = codec.decode_request([messages.encode(header), *map(codec.frame_of, tensors)])
        assert came.header == header
        assert [bytes(codec.frame_of(y)) for y in came.tensors] == [bytes(codec.frame_of(y)) for y in tensors]


@unhurried
@given(shape=st.lists(st.integers(0, 2**31), max_size=4).map(tuple), frame=st.binary(max_size=32))
def test_a_frame_of_the_wrong_size_is_refused(shape: tuple[int, ...], frame: bytes) -> None:
    spec = TensorSpec("float32", shape)
    if math.prod(shape) * 4 == len(frame):
        return
    with pytest.raises(ProtocolError, match=f"the frame has {len(frame)}"):
        codec.tensor_of(spec, frame)


def test_an_empty_tensor_whose_strides_overflow_is_refused() -> None:
    with pytest.raises(ProtocolError, match="too large"):
        codec.tensor_of(TensorSpec("float32", (0, 2**31, 2**31, 2**31)), b"")
    assert codec.tensor_of(TensorSpec("float32", (0, 2**31)), b"").shape == (0, 2**31)


@pytest.mark.parametrize("count", [0, 2])
def test_a_request_with_another_number_of_frames_is_refused(count: int) -> None:
    with pytest.raises(ProtocolError, match=f"needs 1 tensor frames, {count} came"):
        codec.decode_request([messages.encode(LINEAR), *[bytes(24)] * count])


def test_request_bounds_are_checked_before_the_header_is_read() -> None:
    with pytest.raises(ProtocolError, match="at most 2 are allowed"):
        codec.decode_request([b"not a header", b"", b"", b""])
    with pytest.raises(ProtocolError, match="at most 4096 are allowed"):
        codec.decode_request([bytes(codec.MAX_REQUEST_HEADER_BYTES + 1)])
    with pytest.raises(ProtocolError, match="reply header of 4194305 bytes"):
        codec.decode_reply([bytes(codec.MAX_REPLY_HEADER_BYTES + 1)])


@pytest.mark.parametrize(("version", "advice"), [(2, "upgrade the enclave"), (4, "upgrade this side")])
def test_a_request_of_another_version_names_both_and_whom_to_upgrade(version: int, advice: str) -> None:
    header = msgspec.msgpack.encode({"v": version, "id": 9, "op": "hello", "fresh": "field"})
    with pytest.raises(
        codec.VersionError, match=f"enclave speaks .* {version}, this side speaks 3: {advice}"
    ) as caught:
        codec.decode_request([header])
    assert (caught.value.theirs, caught.value.request_id) == (version, 9)


def test_dtypes_that_do_not_travel_are_refused() -> None:
    with pytest.raises(ProtocolError, match=r"torch\.float64 does not travel"):
        codec.spec_of(torch.zeros(1, dtype=torch.float64))


def test_errors_quote_little_of_what_came_and_no_control_characters() -> None:
    tag = "\x1b[2J" * 5000
    with pytest.raises(ProtocolError) as caught:
        codec.decode_reply([msgspec.msgpack.encode({"v": 3, "id": 1, "kind": tag})])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def claim_of(frames: list[bytes], expect: TensorSpec = RESULT.y) -> codec.Claim:
    return codec.claim(RESULT, frames, expect, "linear head from worker:1")


def test_a_claim_shows_no_values_and_has_no_arithmetic() -> None:
    x = torch.full((2, 3), 1234.5)
    claim: Any = claim_of([bytes(codec.frame_of(x))])
    assert torch.equal(claim.unverified(), x)
    assert "1234" not in f"{claim!r} {claim} {[claim]}"
    assert "shape=(2, 3)" in repr(claim)
    for operation in (operator.add, operator.sub, operator.mul, operator.matmul, operator.truediv):
        for left, right in ((claim, 1.0), (1.0, claim), (claim, x), (x, claim), (claim, claim)):
            with pytest.raises(TypeError):
                operation(left, right)
    with pytest.raises(TypeError):
        claim[0]
    for conversion in (float, int, len, iter, torch.relu, torch.as_tensor):
        with pytest.raises((TypeError, RuntimeError)):
            conversion(claim)


@pytest.mark.parametrize(
    "expect", [TensorSpec("float16", (2, 3)), TensorSpec("float32", (3, 2)), TensorSpec("float32", (2, 3, 1))]
)
def test_a_claim_of_another_spec_is_refused(expect: TensorSpec) -> None:
    with pytest.raises(ProtocolError, match=r"linear head from worker:1: expected .* got float32 \[2, 3\]"):
        claim_of([bytes(24)], expect)


@pytest.mark.parametrize("frames", [[], [bytes(24)] * 2, [bytes(23)], [bytes(25)]])
def test_a_claim_of_other_frames_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        claim_of(frames)


def test_state_needs_distinct_names_with_a_spec_and_a_frame_each() -> None:
    one = TensorSpec("float32", (1,))
    frame = bytes(codec.frame_of(torch.tensor([2.0])))

    def state(names: tuple[str, ...], count: int, frames: list[bytes]) -> dict[str, Tensor]:
        return codec.state_tensors(messages.StateResult(id=1, names=names, tensors=(one,) * count), frames, "state")

    assert state(("a", "b"), 2, [frame] * 2) == {"a": torch.tensor([2.0]), "b": torch.tensor([2.0])}
    for names, count, frames in [(("a",), 2, 2), (("a", "b"), 1, 2), (("a", "b"), 2, 1)]:
        with pytest.raises(ProtocolError, match="do not match"):
            state(names, count, [frame] * frames)
    with pytest.raises(ProtocolError, match="comes twice"):
        state(("a", "a"), 2, [frame] * 2)
    with pytest.raises(ProtocolError, match="takes 4 bytes"):
        state(("a",), 1, [b"123"])
