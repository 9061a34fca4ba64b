"""The first published protocol: any frame gives a request or ``ProtocolError``, and replies are as published."""

from __future__ import annotations

from typing import Any, get_args

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.errors import ProtocolError
from tsqp.wire import legacy

unhurried = settings(deadline=None)
METHODS = {kind.__name__: kind for kind in get_args(legacy.LegacyRequest)}
FORWARD: dict[str, Any] = {
    "module_name": "lm_head",
    "input_buffer": bytes(8),
    "input_shape": [1, 2],
    "dtype": "torch.float32",
}
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4))
dtypes = st.sampled_from(get_args(legacy.LegacyDtype))
bodies = st.dictionaries(
    st.sampled_from(["module_names", "parameter_names", "module_name", "input_buffer", "input_shape", "dtype"]),
    values | st.lists(st.text()) | st.lists(st.integers(0, 2**31), max_size=9) | dtypes,
)
calls = st.fixed_dictionaries({"method": st.sampled_from([*METHODS, "NoSuch"]) | values, "request": bodies | values})


def request_or_protocol_error(frame: bytes) -> None:
    try:
        request = legacy.decode_request(frame)
    except ProtocolError:
        return
    assert isinstance(request, legacy.LegacyRequest)


@unhurried
@given(frame=st.binary(max_size=64))
def test_any_bytes_give_a_request_or_a_protocol_error(frame: bytes) -> None:
    request_or_protocol_error(frame)


@unhurried
@given(call=calls)
def test_any_map_gives_a_request_or_a_protocol_error(call: dict[str, Any]) -> None:
    request_or_protocol_error(msgpack.packb(call))


@unhurried
@given(data=st.data())
def test_a_mutated_request_gives_a_request_or_a_protocol_error(data: st.DataObject) -> None:
    raw = bytearray(msgpack.packb({"method": "Forward", "request": FORWARD}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    request_or_protocol_error(bytes(raw))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x91" * 100_000,
        b"\x82\xa6method\xa7Forward\xa7request" + b"\x91" * 100_000 + b"\xc0",
        b"\x82\xa6method\xa3\xff\xff\xff\xa7request\x80",
        msgpack.packb({"method": "NoSuch", "request": {}}),
        msgpack.packb({"method": "m" * 65, "request": {}}),
        msgpack.packb({"method": "Forward"}),
        msgpack.packb({"method": "Forward", "request": FORWARD | {"dtype": "torch.float64"}}),
        msgpack.packb({"method": "Forward", "request": FORWARD | {"input_shape": [-1]}}),
        msgpack.packb({"method": "Forward", "request": FORWARD | {"input_shape": [1] * 9}}),
        msgpack.packb({"method": "Forward", "request": FORWARD | {"module_name": ""}}),
        msgpack.packb({"method": "RegisterClient", "request": {"module_names": ["n"] * (legacy.MAX_NAMES + 1)}}),
    ],
    ids=range(12),
)
def test_awkward_frames_give_a_protocol_error(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        legacy.decode_request(frame)


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("RegisterClient", {"module_names": ["lm_head", "model.embed_tokens"]}),
        ("FetchNonLinearTensors", {"parameter_names": ["model.norm.weight"], "buffer_names": []}),
        ("Forward", FORWARD),
        ("Matmul", {"a_buffer": b"12", "a_shape": [1], "b_buffer": b"", "b_shape": [], "dtype": "float16"}),
    ],
)
def test_published_requests_are_read(method: str, body: dict[str, Any]) -> None:
    request = legacy.decode_request(memoryview(msgpack.packb({"method": method, "request": body})))
    assert isinstance(request, METHODS[method])
    assert {name: getattr(request, name) for name in body} == body


@pytest.mark.parametrize("prefix", ["torch.", ""])
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("int64", torch.int64),
        # As published: the name is the module's dtype, the buffer holds float32.
        ("bfloat16", torch.float32),
    ],
)
def test_a_buffer_is_read_in_the_dtype_it_is_stored_in(prefix: Any, dtype: Any, stored: torch.dtype) -> None:
    x = torch.arange(6).view(2, 3).to(stored)
    came = legacy.tensor(x.numpy().tobytes(), [2, 3], prefix + dtype)
    assert came.dtype == stored
    assert torch.equal(came, x)


@unhurried
@given(
    buffer=st.binary(max_size=32),
    shape=st.lists(st.integers(0, 3) | st.integers(0, 2**31), max_size=8),
    dtype=dtypes,
)
def test_any_buffer_gives_a_tensor_or_a_protocol_error(buffer: bytes, shape: list[int], dtype: Any) -> None:
    try:
        x = legacy.tensor(buffer, shape, dtype)
    except ProtocolError:
        return
    assert list(x.shape) == shape
    assert x.numel() * x.itemsize == len(buffer) > 0


def test_an_empty_tensor_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"empty tensor of shape \[0, 2\]"):
        legacy.tensor(b"", [0, 2], "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_float32(dtype: torch.dtype) -> None:
    y = torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype)
    assert msgpack.unpackb(legacy.output(y)) == {
        "status": "success",
        "response": {
            "output_buffer": y.float().numpy().tobytes(),
            "output_shape": [1, 3],
            "dtype": "torch.float32",
        },
    }


def test_named_tensors_and_failures_are_as_published() -> None:
    reply = legacy.success({"parameters": legacy.named({"w": torch.ones(2, dtype=torch.float16)})})
    assert msgpack.unpackb(reply)["response"]["parameters"] == [
        {"name": "w", "tensor_buffer": torch.ones(2).numpy().tobytes(), "shape": [2], "dtype": "torch.float32"}
    ]
    assert msgpack.unpackb(legacy.failure("no")) == {"status": "error", "error": "no"}
