"""Messages between enclave and worker: one MessagePack header each; tensors travel as raw frames beside it.

Every header is a map with the protocol version ``v``, the request id ``id`` and a tag (``op`` in requests, ``kind``
in replies). Unknown fields are refused. docs/protocol.md describes each message.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

PROTOCOL_VERSION = 3

MAX_NAME = 256
MAX_GROUPS = 8192
MAX_RANK = 4
MAX_DIMENSION = 1 << 31
MAX_STATE_TENSORS = 4096
SEED_BYTES = 32
# What a request that brings no tensor may make its receiver allocate; but one row may always be asked for.
MAX_UNPAID_BYTES = 1 << 20
_WORD_BYTES = 4

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
RequestId = Annotated[int, Meta(ge=0, lt=1 << 62)]
Dimension = Annotated[int, Meta(ge=0, le=MAX_DIMENSION)]
Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
DtypeName = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8"]
# What a process answers: `open` float products, `exact` products modulo 2^32, `masks` a dealer's mask products.
Service = Literal["open", "exact", "masks"]
ErrorCode = Literal["protocol", "version", "input", "memory", "busy", "internal"]


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """Element type and shape of one tensor frame; the bytes are C-contiguous and little-endian."""

    dtype: DtypeName
    shape: Annotated[tuple[Dimension, ...], Meta(max_length=MAX_RANK)]


class GroupSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """One linear group of a model: modules that share their input and are multiplied in one call."""

    name: Name
    members: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=16)]
    in_features: Dimension
    out_features: Annotated[tuple[Dimension, ...], Meta(min_length=1, max_length=16)]


class Request(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="op"):
    """What every request carries."""

    id: RequestId
    v: int = PROTOCOL_VERSION


class Hello(Request, frozen=True, tag="hello"):
    """Ask who the worker is. Answered with ``Welcome``."""

    software: Name


class Linear(Request, frozen=True, tag="linear"):
    """Multiply the frame ``x`` of shape (M, K) by one group's weights. Answered with shape (M, N)."""

    group: Name
    x: TensorSpec


class LinearChain(Request, frozen=True, tag="linear_chain"):
    """Compute what stands between two layers' attention: o, gate_up, down and what follows, and norms and SwiGLU.

    The frame ``x`` of shape (M, K + D) has what the first group reads and the residual stream beside it. Answered with
    shape (M, 2D + N): the products of o and down, which are added to the stream, and beside them the last group's.
    Served at ``open`` only.
    """

    groups: Annotated[tuple[Name, ...], Meta(min_length=4, max_length=4)]
    x: TensorSpec


class LinearExact(Request, frozen=True, tag="linear_exact"):
    """Multiply the int32 frame ``x`` (M, K) by one group's int8 codes modulo 2^32. Answered with int32 (M, N)."""

    group: Name
    x: TensorSpec


def most_code_rows(inputs: int) -> int:
    """Return how many rows of a group's K codes one request may ask for: a kernel's layout is undone beside them."""
    return max(1, MAX_UNPAID_BYTES // max(1, 2 * inputs))


def most_mask_rows(inputs: int, outputs: int) -> int:
    """Return how many mask rows of K words one request may ask a group's N products of; kernels need as much again."""
    return max(1, MAX_UNPAID_BYTES // max(1, 2 * _WORD_BYTES * (inputs + outputs)))


class Codes(Request, frozen=True, tag="codes"):
    """Ask for ``rows`` rows of one group's int8 codes from row ``first`` on. Answered with int8 (rows, K).

    At most ``most_code_rows`` at once.
    """

    group: Name
    first: Dimension
    rows: Dimension


class MaskProduct(Request, frozen=True, tag="mask_product"):
    """Ask a dealer for the products of ``count`` mask rows with one group's codes. Answered with int32 (count, N).

    At most ``most_mask_rows`` at once. The rows are keystream of ``seed`` (``tsqp.arith.keystream``), from row number
    ``first`` on; the group's number is its place in ``Welcome.groups``. The seed is a secret between enclave and
    dealer: it is not shown.
    """

    group: Name
    seed: Annotated[bytes, Meta(min_length=SEED_BYTES, max_length=SEED_BYTES)]
    first: Annotated[int, Meta(ge=0, lt=1 << 62)]
    count: Dimension

    def __repr__(self) -> str:
        return (
            f"MaskProduct(id={self.id}, group={self.group!r}, first={self.first}, count={self.count}, seed not shown)"
        )

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("id", self.id), ("group", self.group), ("first", self.first), ("count", self.count)]


class Embedding(Request, frozen=True, tag="embedding"):
    """Look up the rows of the embedding table for the int64 frame ``ids`` of shape (M,). Answered with (M, D)."""

    ids: TensorSpec
    dtype: DtypeName


class MatMul(Request, frozen=True, tag="matmul"):
    """Multiply the frames ``a`` (..., M, K) and ``b`` (..., K, N), both activations. Answered with (..., M, N)."""

    a: TensorSpec
    b: TensorSpec


class State(Request, frozen=True, tag="state"):
    """Ask for the non-linear parameters (norm weights), float32. Served at ``open`` only."""


class Stats(Request, frozen=True, tag="stats"):
    """Ask for the worker's counters."""


AnyRequest = Hello | Linear | LinearChain | LinearExact | Codes | MaskProduct | Embedding | MatMul | State | Stats


class Reply(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """What every reply carries: the id of the request it answers."""

    id: RequestId
    v: int = PROTOCOL_VERSION


class Welcome(Reply, frozen=True, tag="welcome"):
    """Who the worker is and what it can compute; at `open`, in which dtypes activations may travel.

    ``instance`` is drawn anew by every process, so that two addresses of one process can be told apart from two.
    """

    software: Name
    instance: Name
    serves: Service
    model: Name
    model_digest: Name
    device: Name
    dtype: DtypeName
    module_count: Annotated[int, Meta(ge=0, le=1 << 20)]
    groups: Annotated[tuple[GroupSpec, ...], Meta(max_length=MAX_GROUPS)]
    wire_dtypes: Annotated[tuple[DtypeName, ...], Meta(max_length=16)] = ()


class Result(Reply, frozen=True, tag="result"):
    """One tensor frame follows.

    ``compute_ns`` is the worker's own account of its time and ``started_ns`` of when it began, by a clock of its own; 0
    if it does not say. ``copy_ns`` is the part of its time in which tensors went to its device and back, over PCIe. All
    are for display only.
    """

    y: TensorSpec
    compute_ns: Annotated[int, Meta(ge=0, lt=1 << 62)]
    started_ns: Annotated[int, Meta(ge=0, lt=1 << 62)] = 0
    copy_ns: Annotated[int, Meta(ge=0, lt=1 << 62)] = 0


class StateResult(Reply, frozen=True, tag="state"):
    """One frame per named tensor follows."""

    names: Annotated[tuple[Name, ...], Meta(max_length=MAX_STATE_TENSORS)]
    tensors: Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_STATE_TENSORS)]


class StatsResult(Reply, frozen=True, tag="stats"):
    """What the worker has done since it started and what it holds now; its own account, for display only.

    ``products`` were computed for ``product_requests`` together, of ``rows`` rows, in ``compute_s`` seconds, of which
    ``copy_s`` went on copies to its device and back. ``waiting`` requests of ``waiting_bytes`` wait to be computed, of
    ``clients`` clients that are connected; ``refused`` counts what was turned away because others were served first.
    ``device_memory_bytes`` is what is taken of its GPU, by whomever, or the resident memory of its process on a CPU,
    and ``device_memory_total_bytes`` what there is.
    """

    uptime_s: Seconds
    requests: Annotated[dict[Name, Count], Meta(max_length=64)]
    errors: Count
    bytes_received: Count
    bytes_sent: Count
    compute_s: Seconds
    products: Count = 0
    product_requests: Count = 0
    rows: Count = 0
    copy_s: Seconds = 0.0
    clients: Count = 0
    refused: Count = 0
    waiting: Count = 0
    waiting_bytes: Count = 0
    device_memory_bytes: Count = 0
    device_memory_total_bytes: Count = 0


class Failure(Reply, frozen=True, tag="failure"):
    """The request was not carried out. ``message`` is a sentence for people and carries no tensor value."""

    code: ErrorCode
    message: Annotated[str, Meta(max_length=2048)]


AnyReply = Welcome | Result | StateResult | StatsResult | Failure


class Envelope(Struct, frozen=True):
    """The part of any header, of any protocol version, that is read before the rest is trusted to parse."""

    v: int
    id: RequestId = 0


encode = msgspec.msgpack.Encoder().encode
