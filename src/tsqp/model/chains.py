"""Chains of linear groups: all that a layer computes after attention, up to the product that the next one begins with.

A worker at `open` computes such a chain for one request, which saves three round trips. Nothing becomes known to it by
that: what lies between is a function of products that it computes and of the embedding that it looked up.

Shapes: M rows, K inputs of the first group, D hidden, F FFN, N outputs of the last group, C = K + D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tsqp.arith.chain_kernel import ChainKernel
from tsqp.errors import InputError
from tsqp.model.architecture import LinearGroup, chain_name, chains, norm_before
from tsqp.model.layers import rms_norm, swiglu
from tsqp.model.linears import FloatGroups, Linears, bound_result, memory_errors


@dataclass(frozen=True, slots=True)
class Chain:
    """The groups o, gate_up and down of a layer, and the one that follows: qkv of the next layer, or the head.

    Attributes:
        groups: these, in order.
        norm_D: weights of the norm before the second, float32 on the device.
        next_norm_D: of the norm before the last.
        kernel: what computes all of it for float32 on the CPU, if there is such a one.
    """

    groups: tuple[LinearGroup, ...]
    norm_D: Tensor
    next_norm_D: Tensor
    kernel: ChainKernel | None = None

    @property
    def name(self) -> str:
        """What the chain is called where a group has its name."""
        return chain_name([group.name for group in self.groups])

    @property
    def widths(self) -> tuple[int, int]:
        """Columns that are read, C, and columns that are returned, 2D + N."""
        o, _, _, following = self.groups
        return o.in_features + o.rows, 2 * o.rows + following.rows

    def check(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that it cannot be computed for.

        Raises:
            InputError: another shape or dtype, or the result, or what lies between, would be too large.
        """
        columns, results = self.widths
        if len(shape) != 2 or shape[1] != columns or not dtype.is_floating_point:  # noqa: PLR2004
            raise InputError(f"linear {self.name} expects floats of shape [M, {columns}], got {dtype} {list(shape)}.")
        o, gate_up, down, _ = self.groups
        bound_result((shape[0], max(results, 2 * o.rows + gate_up.rows + down.in_features)))


class LinearChains:
    """All chains of a model: of a LLaMA; of other groups it is not known what comes between them.

    Args:
        linears: the model's large weights.
        state: its norm weights by checkpoint name, float32. Chains with a norm that is not among them are left out.
    """

    def __init__(self, linears: FloatGroups, state: dict[str, Tensor]) -> None:
        self._linears = linears
        self._chains: dict[tuple[str, ...], Chain] = {}
        if isinstance(linears, Linears):
            self._eps = linears.config.rms_norm_eps
            self._find_all(linears, state)
        self.by_name = {chain.name: chain for chain in self._chains.values()}

    def _find_all(self, linears: Linears, state: dict[str, Tensor]) -> None:
        for names in chains(linears.config):
            norms = [norm for name in names if (norm := norm_before(name))]
            if state.keys() >= set(norms):
                groups = tuple(linears.groups[name] for name in names)
                norm_D, next_norm_D = (state[norm].to(linears.device) for norm in norms)
                kernel = linears.chain_kernel(names, norm_D, next_norm_D)
                self._chains[names] = Chain(groups, norm_D, next_norm_D, kernel)

    def find(self, names: tuple[str, ...]) -> Chain:
        """Return the chain of some groups.

        Raises:
            InputError: there is none.
        """
        chain = self._chains.get(names)
        if chain is None:
            raise InputError(f"the linear groups {', '.join(map(repr, names))} are no chain of this model.")
        return chain

    def multiply(self, name: str, x_MC: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute a chain.

        Args:
            name: a chain's.
            x_MC: what the first group reads, and the residual stream beside it; any float dtype and device.
            out: where to store the result, shape (M, 2D + N); by default new memory.

        Returns:
            The two products that are added to the residual stream, and beside them the last group's; in the weights'
            dtype, on this device.

        Raises:
            DeviceMemoryError: the device has no room.
        """
        chain, linears = self.by_name[name], self._linears
        with memory_errors(f"linear {name}", linears.device):
            if out is None:
                out = torch.empty(len(x_MC), chain.widths[1], dtype=linears.dtype, device=linears.device)
            if chain.kernel and x_MC.dtype == torch.float32:
                chain.kernel.multiply(x_MC, out)
            else:
                self._multiply(chain, x_MC, out)
            return out

    @torch.inference_mode()
    def inputs(self, name: str, x_MC: Tensor) -> dict[str, Tensor]:
        """Return what each group of a chain reads, by its name."""
        chain = self.by_name[name]
        return self._multiply(chain, x_MC, torch.empty(len(x_MC), chain.widths[1], dtype=self._linears.dtype))

    @torch.inference_mode()
    def _multiply(self, chain: Chain, x_MC: Tensor, out: Tensor) -> dict[str, Tensor]:
        o, gate_up, down, following = chain.groups
        x_MK, residual_MD = x_MC.to(self._linears.device).split((o.in_features, o.rows), dim=1)
        y1_MD, y2_MD, z_MN = out.split((o.rows, down.rows, following.rows), dim=1)
        multiply = self._linears.multiply
        h_MD = residual_MD.float() + multiply(o.name, x_MK, y1_MD).float()
        normed_MD = self._normed(h_MD, chain.norm_D)
        activated_MF = self._activated(multiply(gate_up.name, normed_MD).float())
        h_MD += multiply(down.name, activated_MF, y2_MD).float()
        next_normed_MD = self._normed(h_MD, chain.next_norm_D)
        multiply(following.name, next_normed_MD, z_MN)
        read = (x_MK, normed_MD, activated_MF, next_normed_MD)
        return {group.name: x for group, x in zip(chain.groups, read, strict=True)}

    def _normed(self, x_MD: Tensor, norm_D: Tensor) -> Tensor:
        """Return the norm, float32: on the CPU with the bits that the enclave computes for itself."""
        if x_MD.is_cpu:
            return rms_norm(x_MD, norm_D, self._eps)
        return functional.rms_norm(x_MD, norm_D.shape, norm_D, self._eps)

    @staticmethod
    def _activated(gate_up_ME: Tensor) -> Tensor:
        """Return the SwiGLU, likewise."""
        if gate_up_ME.is_cpu:
            return swiglu(gate_up_ME)
        gate_MF, up_MF = gate_up_ME.chunk(2, dim=-1)
        return functional.silu(gate_MF) * up_MF
