"""``LinearOps`` at the level `open`: products by a worker, in clear and unchecked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tsqp.enclave.session import Session
from tsqp.errors import InputError, ProtocolError
from tsqp.model.architecture import LinearGroup, LlamaConfig, chain_name, linear_groups, norm_shapes
from tsqp.model.overlap import Pending
from tsqp.wire import codec, int8_rows, messages
from tsqp.wire.messages import AnyRequest, TensorSpec


class OpenLinears:
    """Sends inputs of linear groups to the worker as they are; takes what comes back without a check of its values.

    Args:
        session: a session whose worker has been checked to hold these groups.
        groups: the model's.
        wire_dtype: dtype in which activations travel both ways: a float dtype, or int8 with one scale per token.
    """

    def __init__(self, session: Session, groups: Sequence[LinearGroup], wire_dtype: torch.dtype) -> None:
        self._session = session
        self._dtype = wire_dtype
        self._wire = codec.dtype_name(wire_dtype)
        self._extra = int8_rows.SCALE_BYTES if wire_dtype == torch.int8 else 0
        self._rows = {group.name: group.rows for group in groups}

    def linear(self, group: str, x_MK: Tensor) -> Pending:
        """See ``LinearOps.linear``. The worker sees the activations."""
        rows, inputs = x_MK.shape
        spec = TensorSpec(self._wire, (rows, inputs + self._extra))
        expect = TensorSpec(self._wire, (rows, self._rows[group] + self._extra))
        x = int8_rows.encode(x_MK) if self._extra else x_MK
        return self._product(lambda i: messages.Linear(id=i, group=group, x=spec), (x,), expect, f"linear {group}")

    def _product(
        self, make: Callable[[int], AnyRequest], operands: tuple[Tensor, ...], expect: TensorSpec, operation: str
    ) -> Pending:
        frames: list[memoryview] = []
        try:
            for x in operands:
                dtype = self._dtype if x.is_floating_point() else x.dtype
                frames.append(self._session.framed(x, dtype))  # one by one: an error gives back those before it
        except BaseException:
            self._session.discard(*frames)
            raise
        request_id = self._session.submit(make, frames, operation)
        return partial(self._collect, request_id, expect, operation, self._decoded)

    def _collect(self, request_id: int, expect: TensorSpec, operation: str, read: Callable[..., Tensor]) -> Tensor:
        """Take a reply; ``read`` copies out of memory that is not our ``own`` or not aligned, reading once."""
        reply, delivery = self._session.delivered(request_id, messages.Result)
        try:
            y = codec.claim(reply, delivery.frames, expect, f"{operation} from {self._session.peer}").unverified()
            # In a datagram it may begin anywhere.
            return read(y, own=not (delivery.shared or y.data_ptr() % torch.float32.itemsize))
        finally:
            delivery.release()

    def _decoded(self, y: Tensor, *, own: bool) -> Tensor:
        if self._extra:
            return int8_rows.decode(y)
        return y if own and y.dtype == torch.float32 else y.to(torch.float32, copy=True)

    def abandon(self) -> None:
        """See ``LinearOps.abandon``."""
        self._session.abandon()


class OpenOps(OpenLinears):
    """Sends every product to the worker as it is; takes what comes back without a check of its values.

    Args:
        session: a session whose worker has been checked to hold the model.
        config: the model's architecture.
        wire_dtype: as ``OpenLinears`` takes it; with int8 the residual stream beside a chain is bfloat16.
    """

    def __init__(self, session: Session, config: LlamaConfig, wire_dtype: torch.dtype) -> None:
        super().__init__(session, linear_groups(config), wire_dtype)
        self._config = config

    def embedding(self, ids_M: Tensor) -> Pending:
        """See ``LinearOps.embedding``. The worker sees the token ids."""
        header = partial(messages.Embedding, ids=codec.spec_of(ids_M), dtype=self._wire)
        expect = TensorSpec(self._wire, (len(ids_M), self._config.hidden_size + self._extra))
        return self._product(lambda i: header(id=i), (ids_M,), expect, "embedding")

    def linear_chain(self, groups: tuple[str, ...], x_MK: Tensor, residual_MD: Tensor) -> Pending:
        """See ``LinearOps.linear_chain``. The worker could add up the residual stream from the products it computes."""
        (rows, inputs), hidden = x_MK.shape, residual_MD.shape[1]
        stream = hidden * int8_rows.STREAM_BYTES if self._extra else hidden
        widths = [size + self._extra for size in (hidden, hidden, self._rows[groups[-1]])]
        spec = TensorSpec(self._wire, (rows, inputs + self._extra + stream))
        expect = TensorSpec(self._wire, (rows, sum(widths)))
        wide, frame = self._session.room(spec)
        try:
            if self._extra:
                wide.copy_(int8_rows.encode_beside(x_MK, residual_MD))
            else:
                wide[:, :inputs] = x_MK
                wide[:, inputs:] = residual_MD
        except BaseException:
            self._session.discard(frame)
            raise
        operation = f"linear {chain_name(groups)}"
        header = partial(messages.LinearChain, groups=groups, x=spec)
        request_id = self._session.submit(lambda i: header(id=i), [frame], operation)

        def split(y: Tensor, *, own: bool) -> Tensor:
            parts = y.split(widths, dim=1)
            first, second, last = [int8_rows.decode(part) for part in parts] if self._extra else parts
            residual_MD.add_(first).add_(second)
            kept = (own or self._extra) and last.dtype == torch.float32 and last.is_contiguous()
            return last if kept else last.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

        return partial(self._collect, request_id, expect, operation, split)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``LinearOps.matmul``. The worker sees both activations.

        Raises:
            InputError: the wire dtype is int8, whose scales are of tokens.
        """
        if self._extra:
            raise InputError("attention's products cannot travel as int8: choose another wire dtype.")
        first, second = (TensorSpec(self._wire, tuple(x.shape)) for x in (a, b))
        expect = TensorSpec(self._wire, (*a.shape[:-1], b.shape[-1]))
        return self._product(lambda i: messages.MatMul(id=i, a=first, b=second), (a, b), expect, "matmul")()

    def state(self) -> dict[str, Tensor]:
        """Fetch the norm weights from the worker; their names and shapes must be the model's."""
        reply, frames = self._session.result(self._session.submit(lambda i: messages.State(id=i)), messages.StateResult)
        state = codec.state_tensors(reply, frames, f"state from {self._session.peer}")
        found = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
        wanted = {name: (shape, torch.float32) for name, shape in norm_shapes(self._config).items()}
        if found != wanted:
            raise ProtocolError(f"state from {self._session.peer}: not the norm weights of this model.")
        return {name: value.clone() for name, value in state.items()}
