"""Bytes to messages and back, with every bound checked before anything is allocated or believed.

Any byte string yields a message or ``ProtocolError``. A tensor that a worker sent becomes a ``Claim``: it has the
shape and dtype that were expected, and nothing is known yet about its values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import numpy as np
import torch
from msgspec import Struct
from torch import Tensor

from tsqp.errors import ProtocolError, printable
from tsqp.wire import messages
from tsqp.wire.messages import AnyReply, AnyRequest, Envelope, TensorSpec

MAX_REQUEST_HEADER_BYTES = 4096
MAX_REPLY_HEADER_BYTES = 1 << 22
MAX_REQUEST_TENSORS = 2
_MAX_ELEMENTS = 1 << 60

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
}
# How NumPy, which makes a tensor of a buffer in one step, names them. It does not know bfloat16.
_NUMPY_DTYPES = {name: np.dtype("int16" if name == "bfloat16" else name) for name in TORCH_DTYPES}
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_DECODING_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_envelope = msgspec.msgpack.Decoder(Envelope)
_request = msgspec.msgpack.Decoder(AnyRequest)
_reply = msgspec.msgpack.Decoder(AnyReply)


class VersionError(ProtocolError):
    """A peer speaks another version of the protocol; ``request_id`` lets the worker say so in its reply."""

    def __init__(self, theirs: int, request_id: int, peer: str) -> None:
        ours = messages.PROTOCOL_VERSION
        older = peer if theirs < ours else "this side"
        super().__init__(
            f"the {peer} speaks protocol version {theirs}, this side speaks {ours}: upgrade {_article(older)}."
        )
        self.theirs = theirs
        self.request_id = request_id


def _article(side: str) -> str:
    return side if side == "this side" else f"the {side}"


class Claim:
    """A tensor as a worker sent it: right shape, right dtype, unknown values. It has no arithmetic.

    Only verification turns a claim into a value. The level ``open`` has no verification; it takes the tensor with
    ``unverified``, and that name is what a reviewer searches for.
    """

    __slots__ = ("_tensor", "source")

    def __init__(self, tensor: Tensor, source: str) -> None:
        self._tensor = tensor
        self.source = source

    def unverified(self) -> Tensor:
        """Return the tensor without any check of its values."""
        return self._tensor

    def __repr__(self) -> str:
        return f"Claim({self.source}, shape={tuple(self._tensor.shape)}, values not shown)"


class RequestFrames(Struct, frozen=True):
    """A decoded request and the tensor frames beside it, already checked against their specs."""

    header: AnyRequest
    tensors: list[Tensor]


def dtype_name(dtype: torch.dtype) -> messages.DtypeName:
    """Name a torch dtype as the wire does.

    Raises:
        ProtocolError: the wire has no such dtype.
    """
    name = _DTYPE_NAMES.get(dtype)
    if name is None:
        raise ProtocolError(f"dtype {dtype} does not travel; known: {', '.join(TORCH_DTYPES)}.")
    return name  # type: ignore[return-value]  # keys of TORCH_DTYPES are DtypeName


def spec_of(tensor: Tensor) -> TensorSpec:
    """Describe a tensor for the header."""
    return TensorSpec(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))


def frame_of(tensor: Tensor) -> memoryview:
    """Return a contiguous CPU tensor's bytes without copying them. The tensor must not change until it is sent."""
    if not tensor.numel():
        return memoryview(b"")
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:  # which NumPy does not know
        tensor = tensor.view(torch.int16)
    return tensor.numpy().data.cast("B")


def size_of(spec: TensorSpec) -> int:
    """Return how many bytes a tensor's frame has."""
    return math.prod(spec.shape) * _NUMPY_DTYPES[spec.dtype].itemsize


def tensor_of(spec: TensorSpec, frame: Buffer, source: str = "request") -> Tensor:
    """View a frame's bytes as a tensor. Only what a tensor may not be made of is copied, which no long frame is.

    Args:
        spec: the tensor's dtype and shape.
        frame: its bytes.
        source: where it came from, for messages.

    Raises:
        ProtocolError: the frame's size is not what the spec says.
    """
    dtype = _NUMPY_DTYPES[spec.dtype]
    size = math.prod(spec.shape) * dtype.itemsize
    if size != len(frame):
        raise ProtocolError(
            f"{source}: a tensor of {spec.dtype} {list(spec.shape)} takes {size} bytes, the frame has {len(frame)}."
        )
    if size == 0:
        # Strides of an empty tensor can overflow all the same: 0 by 2^31 by 2^31 by 2^31.
        if math.prod(filter(None, spec.shape)) > _MAX_ELEMENTS:
            raise ProtocolError(f"{source}: an empty tensor of shape {list(spec.shape)} is too large to have strides.")
        return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
    # Frames received are writable: libzmq's memory, a shared region, or our own.
    if isinstance(frame, bytes) or (isinstance(frame, memoryview) and frame.readonly):
        frame = bytearray(frame)
    tensor = torch.from_numpy(np.ndarray(spec.shape, dtype, frame))
    return tensor.view(torch.bfloat16) if spec.dtype == "bfloat16" else tensor


def empty(spec: TensorSpec) -> tuple[Tensor, memoryview]:
    """Return a new tensor, not initialised, and its bytes as a frame: NumPy makes both faster than PyTorch one."""
    if 0 in spec.shape:  # of an array without elements PyTorch takes over strides that no kernel takes
        return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype]), memoryview(b"")
    array = np.empty(spec.shape, _NUMPY_DTYPES[spec.dtype])
    tensor = torch.from_numpy(array)
    return (tensor.view(torch.bfloat16) if spec.dtype == "bfloat16" else tensor), array.data.cast("B")


def decode_request(frames: Sequence[Buffer]) -> RequestFrames:
    """Decode one request.

    Args:
        frames: the header and its tensor frames.

    Raises:
        VersionError: the enclave speaks another version.
        ProtocolError: anything else that is not a valid request.
    """
    if not frames:
        raise ProtocolError("a request without a header.")
    header_bytes = frames[0]
    if len(header_bytes) > MAX_REQUEST_HEADER_BYTES:
        raise ProtocolError(
            f"request header of {len(header_bytes)} bytes; at most {MAX_REQUEST_HEADER_BYTES} are allowed."
        )
    if len(frames) - 1 > MAX_REQUEST_TENSORS:
        raise ProtocolError(f"request with {len(frames) - 1} tensor frames; at most {MAX_REQUEST_TENSORS} are allowed.")
    header = _decode(_request, header_bytes, "enclave")
    specs = _specs_in_request(header)
    if len(specs) != len(frames) - 1:
        raise ProtocolError(
            f"request {type(header).__name__} needs {len(specs)} tensor frames, {len(frames) - 1} came."
        )
    return RequestFrames(header, [tensor_of(spec, frame) for spec, frame in zip(specs, frames[1:], strict=True)])


def decode_reply(frames: Sequence[Buffer]) -> tuple[AnyReply, Sequence[Buffer]]:
    """Decode a reply's header; its frames are checked by ``claim`` against what the request asked for.

    Raises:
        VersionError: the worker speaks another version.
        ProtocolError: anything else that is not a valid reply.
    """
    if not frames:
        raise ProtocolError("a reply without a header.")
    if len(frames[0]) > MAX_REPLY_HEADER_BYTES:
        raise ProtocolError(f"reply header of {len(frames[0])} bytes; at most {MAX_REPLY_HEADER_BYTES} are allowed.")
    reply = _decode(_reply, frames[0], "worker")
    if len(frames) > 1 and not isinstance(reply, (messages.Result, messages.StateResult)):
        raise ProtocolError(f"a reply of type {type(reply).__name__} carries no tensors, {len(frames) - 1} came.")
    return reply, frames[1:]


def claim(reply: messages.Result, frames: Sequence[Buffer], expect: TensorSpec, source: str) -> Claim:
    """Accept the tensor of a result if it has exactly the expected dtype and shape.

    Args:
        reply: the decoded header.
        frames: the frames after the header.
        expect: dtype and shape that the request determines.
        source: operation and peer, for messages.

    Raises:
        ProtocolError: another dtype, shape, frame count or size.
    """
    if len(frames) != 1:
        raise ProtocolError(f"{source}: expected one tensor frame, {len(frames)} came.")
    if reply.y != expect:
        raise ProtocolError(
            f"{source}: expected {expect.dtype} {list(expect.shape)}, got {reply.y.dtype} {list(reply.y.shape)}."
        )
    return Claim(tensor_of(reply.y, frames[0], source), source)


def state_tensors(reply: messages.StateResult, frames: Sequence[Buffer], source: str) -> dict[str, Tensor]:
    """Turn a state reply into named tensors.

    Raises:
        ProtocolError: names, specs and frames do not match one to one.
    """
    if not len(reply.names) == len(reply.tensors) == len(frames):
        raise ProtocolError(
            f"{source}: {len(reply.names)} names, {len(reply.tensors)} specs and {len(frames)} frames do not match."
        )
    if len(set(reply.names)) != len(reply.names):
        raise ProtocolError(f"{source}: a tensor name comes twice.")
    return {
        name: tensor_of(spec, frame, source)
        for name, spec, frame in zip(reply.names, reply.tensors, frames, strict=True)
    }


def _specs_in_request(header: AnyRequest) -> tuple[TensorSpec, ...]:
    match header:
        case messages.Linear(x=x) | messages.LinearChain(x=x) | messages.LinearExact(x=x):
            return (x,)
        case messages.Embedding(ids=ids):
            return (ids,)
        case messages.MatMul(a=a, b=b):
            return (a, b)
        case _:
            return ()


def _decode(decoder: msgspec.msgpack.Decoder[T], header: Buffer, peer: str) -> T:
    """Decode a header of this version; of another version, whatever else it holds, read only version and id."""
    try:
        message = decoder.decode(header)
    except _DECODING_ERRORS as error:
        _check_version(header, peer)
        raise ProtocolError(f"not a valid message from the {peer}: {printable(str(error))}") from error
    if message.v != messages.PROTOCOL_VERSION:  # type: ignore[attr-defined]  # every message has it
        _check_version(header, peer)
    return message


def _check_version(header: Buffer, peer: str) -> None:
    try:
        envelope = _envelope.decode(header)
    except _DECODING_ERRORS:
        return
    if envelope.v != messages.PROTOCOL_VERSION:
        raise VersionError(envelope.v, envelope.id, peer)
