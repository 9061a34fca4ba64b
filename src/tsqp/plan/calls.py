"""What a step asks of the worker: found by running the forward pass against a worker that answers zeros.

So round trips and bytes follow from the code that groups products into requests and writes them, at every level. The
forward pass runs once for two rows, of which one is kept for logits; what a request takes for other numbers of rows is
then computed from its own header.

Shapes: M rows, R kept ones, D hidden, K a request's columns, N a reply's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from msgspec import structs
from torch import Tensor

from tsqp.enclave.products import ExactWorker
from tsqp.enclave.remote_ops import OpenOps
from tsqp.enclave.session import Session
from tsqp.model.architecture import LinearGroup, LlamaConfig, linear_groups, norm_shapes
from tsqp.model.layers import Angles
from tsqp.model.llama import Llama
from tsqp.model.overlap import Pending
from tsqp.transport.base import Buffer, Delivery
from tsqp.wire import codec, messages
from tsqp.wire.messages import TensorSpec

# Of a link that has been in use for a while: numbers in headers are as long as they get.
USUAL_ID = 1 << 20
_USUAL_NS = 1 << 50
_TIMEOUT_S = 1.0

Asked = messages.Embedding | messages.Linear | messages.LinearChain | messages.LinearExact


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a step, and its reply.

    Attributes:
        header: of the request.
        groups: the linear groups that it multiplies by, in order; none for the embedding's look-up.
        is_kept: whether it has a row for each kept one only; else for each row of the step.
        sent, received: the columns of a row each way, K and N, with their dtype.
    """

    header: Asked
    groups: tuple[LinearGroup, ...]
    is_kept: bool
    sent: TensorSpec
    received: TensorSpec

    def rows(self, rows: int, kept: int) -> int:
        """Return how many rows it has in a step."""
        return kept if self.is_kept else rows

    def payload(self, rows: int) -> tuple[int, int]:
        """Return the bytes of its tensors, sent and received."""
        return rows * codec.size_of(self.sent), rows * codec.size_of(self.received)

    def headers(self, rows: int, number: int = USUAL_ID, spent_ns: int = _USUAL_NS) -> tuple[int, int]:
        """Return the bytes of its headers, sent and received.

        Args:
            rows: of its tensors.
            number: the request's.
            spent_ns: what the worker says of its time.
        """
        name = "ids" if isinstance(self.header, messages.Embedding) else "x"
        spec = TensorSpec(self.sent.dtype, (rows, *self.sent.shape))
        request = structs.replace(self.header, id=number, **{name: spec})
        y = TensorSpec(self.received.dtype, (rows, *self.received.shape))
        reply = messages.Result(id=number, y=y, compute_ns=spent_ns, started_ns=spent_ns)
        return len(messages.encode(request)), len(messages.encode(reply))


@dataclass(frozen=True, slots=True)
class Traffic:
    """What crosses the link: round trips, and bytes with their headers."""

    round_trips: int
    sent: int
    received: int


def asked(calls: Sequence[Call], kept: int) -> list[Call]:
    """Return those of a step that are made: where no row is kept, none that is for kept ones."""
    return [call for call in calls if kept or not call.is_kept]


def traffic(calls: Sequence[Call], rows: int, kept: int) -> Traffic:
    """Return what a step moves.

    Args:
        calls: the level's.
        rows: of the step, M.
        kept: of how many of them logits are computed, R.
    """
    made = asked(calls, kept)
    sizes = [(*call.payload(call.rows(rows, kept)), *call.headers(call.rows(rows, kept))) for call in made]
    return Traffic(len(made), sum(a + c for a, _, c, _ in sizes), sum(b + d for _, b, _, d in sizes))


@cache
def calls(architecture: LlamaConfig, level: str, dtype: str) -> tuple[Call, ...]:
    """Return the requests of a step, in order.

    Args:
        architecture: the model's.
        level: `open`, `verified` or `masked`.
        dtype: in which activations travel at `open`.
    """
    short = replace(architecture, context_length=16)
    groups = {group.name: group for group in linear_groups(short)}
    worker = _Zeros(groups, short.hidden_size)
    session = Session(worker, _TIMEOUT_S)
    state = {name: torch.ones(shape) for name, shape in norm_shapes(short).items()}
    ops: OpenOps | _Exact
    if level == "open":
        ops = _Open(session, short, codec.TORCH_DTYPES[dtype], state)
    else:
        ops = _Exact(ExactWorker(lambda: session, groups, 0), groups, short, state)
    Llama(short, ops).run([_TwoRows(short)])
    return tuple(worker.calls)


class _Zeros:
    """A link to a worker whose every product is zero; it notes what it is asked for.

    Args:
        groups: the model's, by name.
        hidden: D.
    """

    peer = "nobody"

    def __init__(self, groups: Mapping[str, LinearGroup], hidden: int) -> None:
        self._groups, self._hidden = groups, hidden
        self._replies: deque[list[Buffer]] = deque()
        self.calls: list[Call] = []

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:  # noqa: ARG002  there are no slots
        return None

    def discard(self, slot: memoryview) -> None:
        """Nothing was given."""

    def send(self, frames: Sequence[Buffer]) -> None:
        request = codec.decode_request(frames)
        header, x = request.header, request.tensors[0]
        if not isinstance(header, Asked):
            raise TypeError(type(header).__name__)
        names = header.groups if isinstance(header, messages.LinearChain) else (getattr(header, "group", None),)
        groups = tuple(self._groups[name] for name in names if name)
        columns = groups[-1].rows if groups else self._hidden
        if isinstance(header, messages.LinearChain):
            columns += 2 * self._hidden
        dtype = header.dtype if isinstance(header, messages.Embedding) else codec.dtype_name(x.dtype)
        y, frame = codec.empty(TensorSpec(dtype, (len(x), columns)))
        y.zero_()
        sent = TensorSpec(codec.dtype_name(x.dtype), tuple(x.shape[1:]))
        self.calls.append(Call(header, groups, len(x) == 1, sent, TensorSpec(dtype, (columns,))))
        self._replies.append([messages.encode(messages.Result(id=header.id, y=codec.spec_of(y), compute_ns=0)), frame])

    def receive(self, timeout_s: float) -> Delivery:  # noqa: ARG002  it is there
        return Delivery(self._replies.popleft())

    def close(self) -> None:
        """Nothing is open."""


class _Open(OpenOps):
    """`open`, but the norms are no worker's."""

    def __init__(
        self, session: Session, config: LlamaConfig, wire_dtype: torch.dtype, state: dict[str, Tensor]
    ) -> None:
        super().__init__(session, config, wire_dtype)
        self._state = state

    def state(self) -> dict[str, Tensor]:
        return self._state


class _Exact:
    """``LinearOps`` of the exact levels: what is quantised and masked is sent as it would be, as zeros."""

    def __init__(
        self,
        worker: ExactWorker,
        groups: Mapping[str, LinearGroup],
        config: LlamaConfig,
        state: dict[str, Tensor],
    ) -> None:
        self._worker, self._groups, self._config, self._state = worker, groups, config, state

    def embedding(self, ids_M: Tensor) -> Pending:
        return lambda: torch.zeros(len(ids_M), self._config.hidden_size)

    def linear(self, group: str, x_MK: Tensor) -> Pending:
        answered = self._worker.start(group, len(x_MK), _no_words)

        def collect() -> Tensor:
            answered().release()
            return torch.zeros(len(x_MK), self._groups[group].rows)

        return collect

    def linear_chain(self, groups: tuple[str, ...], x_MK: Tensor, residual_MD: Tensor) -> None:
        """See ``ExactOps.linear_chain``."""

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)

    def state(self) -> dict[str, Tensor]:
        return self._state

    def abandon(self) -> None:
        """Nothing is on its way."""


class _TwoRows:
    """Two rows of which one is kept, with an attention that computes nothing."""

    def __init__(self, config: LlamaConfig) -> None:
        self._width = config.heads * config.head_size
        self.ids_M = torch.zeros(2, dtype=torch.int64)
        self.positions_M = torch.arange(2)
        self.kept = torch.tensor([1])

    def attend(self, layer: int, qkv_MXH: Tensor, angles: Angles, *, last: bool) -> Tensor:  # noqa: ARG002
        return torch.zeros(1 if last else len(qkv_MXH), self._width)


def _no_words(out_MK: Tensor) -> None:
    out_MK.zero_()
