"""The first published protocol: one MessagePack map per message, tensors inside it as ``bin``.

Kept so that clients of the published system still run. docs/legacy-protocol.md describes it. Decoding is as strict
as for the current protocol: any byte string yields a request or ``ProtocolError``.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor

from tsqp.errors import ProtocolError, printable
from tsqp.wire.codec import Buffer, frame_of, tensor_of
from tsqp.wire.messages import Dimension, DtypeName, Name, TensorSpec

MAX_NAMES = 65536
_MAX_RANK = 8

Names = Annotated[list[Name], Meta(max_length=MAX_NAMES)]
Shape = Annotated[list[Dimension], Meta(max_length=_MAX_RANK)]
LegacyDtype = Literal[
    "torch.float32",
    "torch.float16",
    "torch.bfloat16",
    "torch.int64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
]


class RegisterClient(Struct, frozen=True):
    """Which modules a client wants to call."""

    module_names: Names


class FetchNonLinearTensors(Struct, frozen=True):
    """Which parameters and buffers a client wants to have."""

    parameter_names: Names = []
    buffer_names: Names = []


class Forward(Struct, frozen=True):
    """Run one Linear or Embedding module."""

    module_name: Name
    input_buffer: bytes
    input_shape: Shape
    dtype: LegacyDtype


class Matmul(Struct, frozen=True):
    """Multiply two activations."""

    a_buffer: bytes
    a_shape: Shape
    b_buffer: bytes
    b_shape: Shape
    dtype: LegacyDtype


LegacyRequest = RegisterClient | FetchNonLinearTensors | Forward | Matmul

_METHODS: dict[str, type[LegacyRequest]] = {
    kind.__name__: kind for kind in (RegisterClient, FetchNonLinearTensors, Forward, Matmul)
}


class _Call(Struct, frozen=True):
    method: Annotated[str, Meta(max_length=64)]
    request: msgspec.Raw


_call = msgspec.msgpack.Decoder(_Call)
_bodies = {name: msgspec.msgpack.Decoder(kind) for name, kind in _METHODS.items()}
_encode = msgspec.msgpack.Encoder().encode


def decode_request(frame: Buffer) -> LegacyRequest:
    """Decode one request frame.

    Raises:
        ProtocolError: the bytes are not a request of the first protocol.
    """
    try:
        call = _call.decode(frame)
        decoder = _bodies.get(call.method)
        if decoder is None:
            raise ProtocolError(f"unknown method {call.method!r}; known: {', '.join(_METHODS)}.")
        return decoder.decode(call.request)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a valid request of the first protocol: {printable(str(error))}") from error


def tensor(buffer: bytes, shape: list[int], dtype: LegacyDtype) -> Tensor:
    """Turn a buffer of the first protocol into a tensor.

    ``bfloat16`` announces the module's dtype; its buffer holds float32, as published.

    Raises:
        ProtocolError: the buffer's size is not what shape and dtype say.
    """
    name: DtypeName = dtype.removeprefix("torch.")  # type: ignore[assignment]  # LegacyDtype has no other values
    stored: DtypeName = "float32" if name == "bfloat16" else name
    if math.prod(shape) == 0:
        raise ProtocolError(f"an empty tensor of shape {shape}.")
    return tensor_of(TensorSpec(dtype=stored, shape=tuple(shape)), buffer)


def success(response: dict[str, object]) -> bytes:
    """Encode a reply that worked."""
    return _encode({"status": "success", "response": response})


def failure(message: str) -> bytes:
    """Encode a reply that did not."""
    return _encode({"status": "error", "error": message})


def output(y: Tensor) -> bytes:
    """Encode the reply to ``Forward`` and ``Matmul``: always float32."""
    y = y.float()
    return success({"output_buffer": frame_of(y), "output_shape": list(y.shape), "dtype": "torch.float32"})


def named(tensors: dict[str, Tensor]) -> list[dict[str, object]]:
    """Encode tensors for ``FetchNonLinearTensors``."""
    return [
        {
            "name": name,
            "tensor_buffer": frame_of(value.float()),
            "shape": list(value.shape),
            "dtype": str(torch.float32),
        }
        for name, value in tensors.items()
    ]
