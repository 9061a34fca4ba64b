"""What takes the place of a model's linear layers: it asks a worker, and gives its part of the answer.

A layer keeps its class's name, its bias and its place in the tree; only its weight is gone. Members of a group read the
same tensor: the first one that is called asks for all, the others take their parts.

Shapes: M rows (all but the last dimension), K inputs, N outputs, D hidden, E experts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from tsqp.errors import InputError, TransportClosedError
from tsqp.model.architecture import LinearGroup
from tsqp.model.overlap import Pending

# Products of experts that are under way at once: well below what a worker takes of one client.
_EXPERTS_AT_ONCE = 16


class GroupProducts(Protocol):
    """Who computes the products of a model's groups."""

    def linear(self, group: str, x_MK: Tensor) -> Pending:
        """Ask for a group's product with float32 rows; gives a fresh float32 (M, N)."""

    def abandon(self) -> None:
        """Forget what has been asked for and will not be collected."""


class Products:
    """The products of one attached model, for any of its threads.

    Args:
        source: who computes them; None once the model is detached.
        paused: during a ``with`` block masks are not made ahead.
    """

    def __init__(self, source: GroupProducts, paused: Callable[[], AbstractContextManager[None]]) -> None:
        self.lock = threading.RLock()
        self._source: GroupProducts | None = source
        self._paused = paused

    def compute(self, asked: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """Compute several groups' products, all under way at once.

        Args:
            asked: names of groups and their inputs (M, K), of any float dtype.

        Returns:
            float32 (M, N) each, in memory that nobody else uses.

        Raises:
            TsqpError: the worker failed or lied; nothing of its answer has been used.
        """
        with self.lock, self._paused():
            source = self._source
            if source is None:
                raise TransportClosedError("this layer was used after its model was detached: use the model itself.")
            try:
                pending = [source.linear(name, x_MK.float().contiguous()) for name, x_MK in asked]
                return [collect() for collect in pending]
            except BaseException:
                source.abandon()
                raise

    def end(self) -> None:
        """Compute nothing from now on."""
        with self.lock:
            self._source = None


class GroupCall:
    """One group as its members call it.

    What has been asked for is kept until every member has taken its part, or another input comes. It is given only for
    the same tensor, looked at again: a tensor may have been changed in place since, and only a copy tells at any rate,
    since tensors of inference mode count no versions.

    Args:
        group: the group.
        products: who computes.
    """

    def __init__(self, group: LinearGroup, products: Products) -> None:
        self._group, self._products = group, products
        self._x: Tensor | None = None
        self._copy: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, member: int, x: Tensor) -> Tensor:
        """Return a member's part of the group's product with ``x`` (..., K): float32 (..., N_i), contiguous."""
        with self._products.lock:
            if not self._holds(member, x):
                self._ask(x)
            part_MN = self._parts.pop(member)
            if not self._parts:
                self._x = self._copy = None
        return part_MN.contiguous().view(*x.shape[:-1], part_MN.shape[-1])

    def _holds(self, member: int, x: Tensor) -> bool:
        return self._x is x and member in self._parts and self._copy is not None and torch.equal(x, self._copy)

    def _ask(self, x: Tensor) -> None:
        x_MK = x.reshape(-1, self._group.in_features)
        (y_MN,) = self._products.compute([(self._group.name, x_MK)])
        self._parts = dict(enumerate(y_MN.split(self._group.out_features, dim=1)))
        if len(self._parts) > 1:
            self._x, self._copy = x, x.clone()


class RemoteLayer(nn.Module):
    """Mixed into the class of a linear layer. ``remote`` and ``member`` are set when it is attached."""

    remote: GroupCall
    member: int
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  as torch.nn.Linear calls it
        """Return what the layer would: (..., K) to (..., N), in the input's dtype.

        Raises:
            InputError: a gradient is wanted.
            TsqpError: as ``Products.compute``.
        """
        refuse_gradients(self, input)
        y = self.remote.part(self.member, input).to(input.dtype)
        return y if self.bias is None else y + self.bias


class RemoteExperts(nn.Module):
    """Mixed into the class of a layer of experts, whose weights were stacked in two parameters (transformers 5).

    Only experts that have a token are asked for: the worker sees which, and how many tokens each has.
    """

    products: Products
    experts: list[tuple[str, str]]  # names of the groups: gate_up and down
    has_bias: bool
    gate_up_proj_bias: Tensor
    down_proj_bias: Tensor
    _apply_gate: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum of the chosen experts' outputs, by their weights.

        Args:
            hidden_states: (M, D).
            top_k_index: which experts each row goes to, (M, k); a number that is no expert's means none.
            top_k_weights: by how much, (M, k).

        Raises:
            InputError: a gradient is wanted.
            TsqpError: as ``Products.compute``.
        """
        refuse_gradients(self, hidden_states)
        out_MD = torch.zeros_like(hidden_states)
        used = [index for index in top_k_index.unique().tolist() if 0 <= index < len(self.experts)]
        for first in range(0, len(used), _EXPERTS_AT_ONCE):
            self._add(out_MD, used[first : first + _EXPERTS_AT_ONCE], hidden_states, top_k_index, top_k_weights)
        return out_MD

    def _add(self, out_MD: Tensor, used: list[int], x_MD: Tensor, index_Mk: Tensor, weight_Mk: Tensor) -> None:
        places = [torch.where(index_Mk == expert) for expert in used]
        names = [self.experts[expert] for expert in used]
        inputs = [x_MD[rows] for rows, _ in places]
        ups = self.products.compute([(up, x) for (up, _), x in zip(names, inputs, strict=True)])
        gated = [self._gated(expert, up.to(x_MD.dtype)) for expert, up in zip(used, ups, strict=True)]
        downs = self.products.compute([(down, x) for (_, down), x in zip(names, gated, strict=True)])
        for expert, (rows, choice), down in zip(used, places, downs, strict=True):
            y = down.to(x_MD.dtype) + self.down_proj_bias[expert] if self.has_bias else down.to(x_MD.dtype)
            y = y * weight_Mk[rows, choice, None]
            out_MD.index_add_(0, rows, y.to(out_MD.dtype))

    def _gated(self, expert: int, up: Tensor) -> Tensor:
        return self._apply_gate(up + self.gate_up_proj_bias[expert] if self.has_bias else up)


def refuse_gradients(layer: nn.Module, x: Tensor) -> None:
    """Refuse to compute where a gradient would be lost.

    Raises:
        InputError: the layer is in training mode, or the input asks for a gradient.
    """
    if layer.training or (x.requires_grad and torch.is_grad_enabled()):
        what = "is in training mode" if layer.training else "is asked for a gradient"
        raise InputError(
            f"an attached model {what}, but its weights are elsewhere: run it after model.eval() and within "
            "torch.no_grad(), or tsqp.detach(model) first."
        )
