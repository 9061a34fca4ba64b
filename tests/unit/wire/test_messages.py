"""Every message type survives encoding, and every declared bound is enforced when it is read."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.wire import messages
from tsqp.wire.messages import AnyReply, AnyRequest, GroupSpec, TensorSpec

names = st.text(min_size=1, max_size=messages.MAX_NAME)
ids = st.integers(0, (1 << 62) - 1)
dimensions = st.integers(0, messages.MAX_DIMENSION)
dtypes: st.SearchStrategy[messages.DtypeName] = st.sampled_from(get_args(messages.DtypeName))
specs = st.builds(TensorSpec, dtypes, st.lists(dimensions, max_size=messages.MAX_RANK).map(tuple))
counts = st.integers(0, (1 << 62) - 1)
seconds = st.floats(0, 1e12)
groups = st.builds(
    GroupSpec,
    names,
    st.lists(names, min_size=1, max_size=3).map(tuple),
    dimensions,
    st.lists(dimensions, min_size=1, max_size=3).map(tuple),
)
requests = st.one_of(
    st.builds(messages.Hello, id=ids, software=names),
    st.builds(messages.Linear, id=ids, group=names, x=specs),
    st.builds(messages.LinearChain, id=ids, groups=st.tuples(names, names, names, names), x=specs),
    st.builds(messages.LinearExact, id=ids, group=names, x=specs),
    st.builds(messages.Codes, id=ids, group=names, first=dimensions, rows=dimensions),
    st.builds(
        messages.MaskProduct,
        id=ids,
        group=names,
        seed=st.binary(min_size=32, max_size=32),
        first=ids,
        count=dimensions,
    ),
    st.builds(messages.Embedding, id=ids, ids=specs, dtype=dtypes),
    st.builds(messages.MatMul, id=ids, a=specs, b=specs),
    st.builds(messages.State, id=ids),
    st.builds(messages.Stats, id=ids),
)
replies = st.one_of(
    st.builds(
        messages.Welcome,
        id=ids,
        software=names,
        instance=names,
        serves=st.sampled_from(get_args(messages.Service)),
        model=names,
        model_digest=names,
        device=names,
        dtype=dtypes,
        module_count=st.integers(0, 1 << 20),
        groups=st.lists(groups, max_size=3).map(tuple),
    ),
    st.builds(messages.Result, id=ids, y=specs, compute_ns=ids, copy_ns=ids),
    st.builds(
        messages.StateResult,
        id=ids,
        names=st.lists(names, max_size=3).map(tuple),
        tensors=st.lists(specs, max_size=3).map(tuple),
    ),
    st.builds(
        messages.StatsResult,
        id=ids,
        uptime_s=seconds,
        requests=st.dictionaries(names, counts, max_size=3),
        errors=counts,
        bytes_received=counts,
        bytes_sent=counts,
        compute_s=seconds,
        copy_s=seconds,
        waiting_bytes=counts,
        device_memory_bytes=counts,
    ),
    st.builds(
        messages.Failure,
        id=ids,
        code=st.sampled_from(["protocol", "version", "input", "memory", "internal"]),
        message=st.text(max_size=2048),
    ),
)
LINEAR: dict[str, Any] = {"v": 3, "id": 1, "op": "linear", "group": "g", "x": {"dtype": "float32", "shape": [1]}}
COUNTERS: dict[str, Any] = {"v": 3, "id": 1, "kind": "stats", "uptime_s": 1.0, "requests": {"linear": 1}, "errors": 0}
COUNTERS |= {"bytes_received": 0, "bytes_sent": 0, "compute_s": 0.0}


def read(kind: Any, raw: bytes) -> Any:
    return msgspec.msgpack.decode(raw, type=kind)


@settings(deadline=None)
@given(request=requests)
def test_requests_survive_encoding(request: AnyRequest) -> None:
    assert read(AnyRequest, messages.encode(request)) == request


@settings(deadline=None)
@given(reply=replies)
def test_replies_survive_encoding(reply: AnyReply) -> None:
    assert read(AnyReply, messages.encode(reply)) == reply


@settings(deadline=None)
@given(message=requests | replies)
def test_the_envelope_of_any_message_can_be_read(message: AnyRequest | AnyReply) -> None:
    envelope = read(messages.Envelope, messages.encode(message))
    assert (envelope.v, envelope.id) == (messages.PROTOCOL_VERSION, message.id)


def test_a_request_is_no_reply_and_a_reply_no_request() -> None:
    with pytest.raises(msgspec.ValidationError):
        read(AnyReply, messages.encode(messages.State(id=1)))
    with pytest.raises(msgspec.ValidationError):
        read(AnyRequest, messages.encode(messages.StateResult(id=1, names=(), tensors=())))


@pytest.mark.parametrize(
    "change",
    [
        {"id": -1},
        {"id": 1 << 62},
        {"id": "1"},
        {"id": 1.5},
        {"id": True},
        {"op": "no such"},
        {"group": ""},
        {"group": "g" * 257},
        {"group": b"g"},
        {"extra": 1},
        {"x": {"dtype": "float64", "shape": [1]}},
        {"x": {"dtype": "float32", "shape": [-1]}},
        {"x": {"dtype": "float32", "shape": [2**31 + 1]}},
        {"x": {"dtype": "float32", "shape": [1] * 5}},
        {"x": {"dtype": "float32", "shape": [1.0]}},
        {"x": {"dtype": "float32", "shape": [1], "strides": [1]}},
        {"x": {"dtype": "float32"}},
        {"x": None},
    ],
    ids=str,
)
def test_a_field_out_of_bounds_is_refused(change: dict[str, Any]) -> None:
    assert isinstance(read(AnyRequest, msgspec.msgpack.encode(LINEAR)), messages.Linear)
    with pytest.raises(msgspec.ValidationError):
        read(AnyRequest, msgspec.msgpack.encode(LINEAR | change))


@pytest.mark.parametrize(
    "change",
    [
        {"uptime_s": float("nan")},
        {"uptime_s": float("inf")},
        {"compute_s": -1.0},
        {"copy_s": float("nan")},
        {"errors": -1},
        {"bytes_sent": 1 << 62},
        {"waiting": 1.5},
        {"clients": "1"},
        {"device_memory_bytes": -1},
        {"requests": {"linear": -1}},
        {"requests": {"": 1}},
        {"requests": {"x" * 257: 1}},
        {"requests": {str(number): 1 for number in range(65)}},
        {"extra": 1},
    ],
    ids=lambda change: str(change)[:40],
)
def test_counters_out_of_bounds_are_refused(change: dict[str, Any]) -> None:
    assert isinstance(read(AnyReply, msgspec.msgpack.encode(COUNTERS)), messages.StatsResult)
    with pytest.raises(msgspec.ValidationError):
        read(AnyReply, msgspec.msgpack.encode(COUNTERS | change))


@pytest.mark.parametrize("missing", ["id", "op", "group", "x"])
def test_a_missing_field_is_refused(missing: str) -> None:
    header = {key: value for key, value in LINEAR.items() if key != missing}
    with pytest.raises(msgspec.ValidationError):
        read(AnyRequest, msgspec.msgpack.encode(header))


@pytest.mark.parametrize(
    "reply",
    [
        messages.Failure(id=1, code="internal", message="x" * 2049),
        messages.Result(id=1, y=TensorSpec("float32", ()), compute_ns=-1),
        messages.Result(id=1, y=TensorSpec("float32", ()), compute_ns=0, started_ns=1 << 62),
        messages.Result(id=1, y=TensorSpec("float32", ()), compute_ns=0, copy_ns=-1),
        messages.StateResult(id=1, names=("n",) * (messages.MAX_STATE_TENSORS + 1), tensors=()),
        messages.StateResult(id=1, names=(), tensors=(TensorSpec("float32", ()),) * (messages.MAX_STATE_TENSORS + 1)),
    ],
    ids=["long failure", "negative time", "late start", "negative copies", "many names", "many specs"],
)
def test_a_reply_out_of_bounds_is_refused(reply: AnyReply) -> None:
    with pytest.raises(msgspec.ValidationError):
        read(AnyReply, messages.encode(reply))


def test_messages_cannot_be_changed() -> None:
    request: Any = messages.State(id=1)
    with pytest.raises(AttributeError):
        request.id = 2
