"""``LinearOps`` at the level `open`: products by a worker, in clear and unchecked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tsqp.enclave.session import Session
from tsqp.errors import ProtocolError
from tsqp.model.architecture import LlamaConfig, linear_groups, norm_shapes
from tsqp.wire import codec, messages
from tsqp.wire.messages import AnyRequest, TensorSpec


class OpenOps:
    """Sends every product to the worker as it is; takes what comes back without a check of its values.

    Args:
        session: a session whose worker has been checked to hold the model.
        config: the model's architecture.
        wire_dtype: dtype in which activations travel both ways.
    """

    def __init__(self, session: Session, config: LlamaConfig, wire_dtype: torch.dtype) -> None:
        self._session = session
        self._config = config
        self._dtype = wire_dtype
        self._wire = codec.dtype_name(wire_dtype)
        self._rows = {group.name: group.rows for group in linear_groups(config)}

    def embedding(self, ids_M: Tensor) -> Tensor:
        """See ``LinearOps.embedding``. The worker sees the token ids."""
        expect = TensorSpec(self._wire, (len(ids_M), self._config.hidden_size))
        ids_M = ids_M.contiguous()
        return self._product(
            lambda i: messages.Embedding(id=i, ids=codec.spec_of(ids_M), dtype=self._wire),
            (ids_M,),
            expect,
            "embedding",
        )

    def linear(self, group: str, x_MK: Tensor) -> Tensor:
        """See ``LinearOps.linear``. The worker sees the activations."""
        x_MK = x_MK.to(self._dtype).contiguous()
        expect = TensorSpec(self._wire, (len(x_MK), self._rows[group]))
        return self._product(
            lambda i: messages.Linear(id=i, group=group, x=codec.spec_of(x_MK)),
            (x_MK,),
            expect,
            f"linear {group}",
        )

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``LinearOps.matmul``. The worker sees both activations."""
        a, b = a.to(self._dtype).contiguous(), b.to(self._dtype).contiguous()
        expect = TensorSpec(self._wire, (*a.shape[:-1], b.shape[-1]))
        return self._product(
            lambda i: messages.MatMul(id=i, a=codec.spec_of(a), b=codec.spec_of(b)), (a, b), expect, "matmul"
        )

    def state(self) -> dict[str, Tensor]:
        """Fetch the norm weights from the worker; their names and shapes must be the model's."""
        reply, frames = self._session.result(self._session.submit(lambda i: messages.State(id=i)), messages.StateResult)
        state = codec.state_tensors(reply, frames, f"state from {self._session.peer}")
        found = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
        wanted = {name: (shape, torch.float32) for name, shape in norm_shapes(self._config).items()}
        if found != wanted:
            raise ProtocolError(f"state from {self._session.peer}: not the norm weights of this model.")
        return {name: value.clone() for name, value in state.items()}

    def _product(
        self,
        make: Callable[[int], AnyRequest],
        operands: tuple[Tensor, ...],
        expect: TensorSpec,
        operation: str,
    ) -> Tensor:
        request_id = self._session.submit(make, [codec.frame_of(x) for x in operands], operation)
        reply, frames = self._session.result(request_id, messages.Result)
        claim = codec.claim(reply, frames, expect, f"{operation} from {self._session.peer}")
        return claim.unverified().float()
