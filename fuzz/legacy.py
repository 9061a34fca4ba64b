"""The first published protocol: the parser, and the dispatcher over a tiny model."""

from __future__ import annotations

import random
from functools import cache

import msgspec

from fuzz import framing
from fuzz.models import open_linears, open_service
from tsqp.errors import ProtocolError
from tsqp.wire import legacy
from tsqp.worker.legacy import LegacyDispatcher

_PARSE, _ANSWER = 0, 1
_BUG = "the worker failed on this request"


def run(data: bytes) -> None:
    """Parse one request, and make its tensors; odd kinds are answered with a tiny model as well."""
    frame = data[1:]
    try:
        request = legacy.decode_request(frame)
        if isinstance(request, legacy.Forward):
            legacy.tensor(request.input_buffer, request.input_shape, request.dtype)
        elif isinstance(request, legacy.Matmul):
            legacy.tensor(request.a_buffer, request.a_shape, request.dtype)
            legacy.tensor(request.b_buffer, request.b_shape, request.dtype)
    except ProtocolError:
        pass
    if data and data[0] % 2 == _ANSWER:
        (reply,) = _dispatcher().answer([frame])
        if _BUG in str(msgspec.msgpack.decode(reply).get("error")):
            raise AssertionError(_BUG)


@cache
def _dispatcher() -> LegacyDispatcher:
    return LegacyDispatcher(open_linears(), open_service().state)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change one field of the request."""
    changed = framing.changed_header(data[1:], rng)
    if rng.random() < 0.3:
        changed = _fitted(changed)
    return bytes([rng.randrange(2)]) + changed


def _fitted(frame: bytes) -> bytes:
    """Give buffers the sizes that their shapes name, so that what comes after that check is reached."""
    try:
        call = msgspec.msgpack.decode(frame)
        request = call["request"]
        for name in ("input", "a", "b"):
            if f"{name}_shape" in request:
                size = {"int64": 8, "float16": 2}.get(request["dtype"].removeprefix("torch."), 4)
                request[f"{name}_buffer"] = framing.zeros(request[f"{name}_shape"], size)
        return msgspec.msgpack.encode(call)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError, TypeError, KeyError, AttributeError):
        return frame


def seeds() -> dict[str, bytes]:
    """Return valid requests of every method."""
    head, layer = "lm_head", "model.layers.0.self_attn.q_proj"
    ids = {"module_name": "model.embed_tokens", "input_buffer": bytes(16), "input_shape": [1, 2], "dtype": "int64"}
    x = {"module_name": layer, "input_buffer": bytes(64), "input_shape": [2, 8], "dtype": "torch.float32"}
    half = {"module_name": head, "input_buffer": bytes(16), "input_shape": [1, 8], "dtype": "float16"}
    product = {"a_buffer": bytes(24), "a_shape": [1, 2, 3], "b_buffer": bytes(12), "b_shape": [1, 3, 1]}
    calls: dict[str, tuple[str, object]] = {
        "register": ("RegisterClient", {"module_names": [head, layer, "no.such"]}),
        "fetch": (
            "FetchNonLinearTensors",
            {"parameter_names": ["model.norm.weight"], "buffer_names": ["model.rotary_emb.inv_freq"]},
        ),
        "forward": ("Forward", x),
        "forward-half": ("Forward", half),
        "embedding": ("Forward", ids),
        "matmul": ("Matmul", {**product, "dtype": "torch.bfloat16"}),
    }
    return {
        name: bytes([_ANSWER]) + msgspec.msgpack.encode({"method": method, "request": request})
        for name, (method, request) in calls.items()
    }
