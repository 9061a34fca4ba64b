"""Rank 0's services: those of one process, but that every product with a group's weights is computed by all ranks.

What is no such product stays on rank 0: the embedding table, products of activations, norms, and what stands between
the groups of a chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tsqp.arith.ring import Codes
from tsqp.model.architecture import LinearGroup, LlamaConfig
from tsqp.model.linears import Linears, memory_errors
from tsqp.model.weights import Checkpoint
from tsqp.worker.ranks.leader import Leader
from tsqp.worker.services import ExactService


class SplitLinears(Linears):
    """A model's Linear and Embedding modules, of which other ranks have most rows. See ``Linears``.

    Args:
        leader: the other ranks; further arguments as of ``Linears``.
    """

    def __init__(
        self,
        leader: Leader,
        config: LlamaConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        self._leader = leader
        super().__init__(config, checkpoint, dtype, device, on_progress, leader.share)

    def linear(self, name: str, x_MK: Tensor, member: int | None = None) -> Tensor:
        """See ``Linears.linear``. The other members of the group are computed too."""
        y_MN = super().linear(name, x_MK)
        return y_MN if member is None else y_MN.split(self.groups[name].out_features, dim=1)[member]

    @torch.inference_mode()
    def multiply(self, name: str, x_MK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        """See ``Linears.multiply``."""
        with memory_errors(f"linear {name}", self.device):
            x_MK = x_MK.to(self.device, self.dtype).contiguous()
            y_MN = self._empty(len(x_MK), self.groups[name].rows) if out_MN is None else out_MN
            return self._leader.multiply(name, x_MK, y_MN, partial(super().multiply, name))

    def chain_kernel(self, _names: Sequence[str], _norm_D: Tensor, _next_norm_D: Tensor) -> None:
        """See ``Linears.chain_kernel``: between its groups all ranks meet."""


class SplitExactService(ExactService):
    """Exact products, of which other ranks compute most columns. See ``ExactService``.

    Args:
        leader: the other ranks.
        groups: the model's linear groups, in order.
        codes: rank 0's rows of them.
        device: where these are.
    """

    def __init__(
        self, leader: Leader, groups: Sequence[LinearGroup], codes: dict[str, Codes], device: torch.device
    ) -> None:
        super().__init__(groups, codes, device)
        self._leader = leader
        self.ranks = leader.share.ranks

    def multiply(self, name: str, x_MK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        """See ``WorkerService.multiply``."""
        group = self._group(name)
        with memory_errors(f"exact linear {name}", self.device):
            x_MK = x_MK.to(self.device).contiguous()
            if out_MN is None:
                out_MN = torch.empty(len(x_MK), group.rows, dtype=torch.int32, device=self.device)
            return self._leader.multiply(name, x_MK, out_MN, partial(super().multiply, name))

    def plain(self, name: str, first: int, rows: int) -> Tensor:
        """See ``ExactService.plain``."""
        group = self._group(name)
        out_RK = torch.empty(rows, group.in_features, dtype=torch.int8, device=self.device)
        own = self._codes[name]
        return self._leader.codes(
            name, range(first, first + rows), group.rows, out_RK, lambda some: own.plain(some.start, len(some))
        )
