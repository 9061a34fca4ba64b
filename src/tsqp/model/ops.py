"""The seam between the model and whoever computes its large products."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tsqp.model.architecture import norm_shapes
from tsqp.model.linears import Linears
from tsqp.model.overlap import Pending
from tsqp.model.weights import Checkpoint


class LinearOps(Protocol):
    """What the forward pass asks for. Inputs and outputs are float32 on the CPU, whatever happens between.

    What may take a while is asked for first and collected later, by calling what ``embedding`` and ``linear`` return.
    """

    def embedding(self, ids_M: Tensor) -> Pending:
        """Look up int64 token ids of shape (M,); gives (M, D)."""

    def linear(self, group: str, x_MK: Tensor) -> Pending:
        """Multiply (M, K) by the stacked weights of a group (``architecture.linear_groups``); gives a fresh (M, N)."""

    def linear_chain(self, groups: tuple[str, ...], x_MK: Tensor, residual_MD: Tensor) -> Pending | None:
        """Compute all that stands between two layers' attention: four products, two norms and SwiGLU.

        Args:
            groups: of ``architecture.chains``.
            x_MK: what attention makes; the first group reads it.
            residual_MD: contiguous; left alone by the caller until the result is collected, which adds the products
                of o and down to it in place.

        Returns:
            For the last product, a fresh (M, N); None where the groups must be asked for one by one.
        """

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply activations (..., M, K) and (..., K, N)."""

    def state(self) -> dict[str, Tensor]:
        """Return the non-linear parameters by checkpoint name, float32."""

    def abandon(self) -> None:
        """Forget what has been asked for and will not be collected."""


class LocalOps:
    """Computes everything in this process: the baseline that the split is compared with.

    Args:
        linears: the model's weights on the CPU.
        state: the non-linear parameters.
    """

    def __init__(self, linears: Linears, state: dict[str, Tensor]) -> None:
        self._linears = linears
        self._state = state

    def embedding(self, ids_M: Tensor) -> Pending:
        """See ``LinearOps.embedding``."""
        return partial(self._embedding, ids_M)

    def _embedding(self, ids_M: Tensor) -> Tensor:
        return self._linears.embedding(ids_M).float()

    def linear(self, group: str, x_MK: Tensor) -> Pending:
        """See ``LinearOps.linear``."""
        return partial(self._linear, group, x_MK)

    def _linear(self, group: str, x_MK: Tensor) -> Tensor:
        return self._linears.linear(group, x_MK).float()

    def linear_chain(self, groups: tuple[str, ...], x_MK: Tensor, residual_MD: Tensor) -> None:
        """See ``LinearOps.linear_chain``: nothing is saved by it here."""

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``LinearOps.matmul``."""
        return self._linears.matmul(a, b)

    def state(self) -> dict[str, Tensor]:
        """See ``LinearOps.state``."""
        return self._state

    def abandon(self) -> None:
        """See ``LinearOps.abandon``. Nothing is on its way: products are computed when they are collected."""


def read_state(linears: Linears, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Read the non-linear parameters (norm weights) of a model, float32 on the CPU."""
    state = {}
    for name, shape in norm_shapes(linears.config).items():
        state[name] = torch.empty(shape)
        checkpoint.read_into(name, state[name])
    return state
