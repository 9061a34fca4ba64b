"""What every attacker has: the model's published weights, and the vocabulary as layer 0 would see it.

Shapes: V vocabulary, D hidden, T tokens, N query heads, G key-value heads, H head size, K a linear's input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tsqp.audit.recorder import Recording, Seen
from tsqp.model.architecture import EMBEDDING_MODULE, LlamaConfig, read_config
from tsqp.model.chains import LinearChains
from tsqp.model.layers import RotaryTable, rms_norm, rotate
from tsqp.model.linears import Linears
from tsqp.model.llama import Llama
from tsqp.model.ops import LocalOps, read_state
from tsqp.model.overlap import Pending
from tsqp.model.weights import Checkpoint

FIRST_GROUP = "layers.0.qkv"
_FLOAT32_ERROR = 1e-5
# A row shorter than this is zero but for rounding: a padding token, which every subspace contains.
_NO_DIRECTION = 1e-20


class TokenTable:
    """The embedding table behind layer 0's norm: row v is what token v sends to the first linear layer.

    Args:
        vectors_VD: float32.
    """

    def __init__(self, vectors_VD: Tensor) -> None:
        self.vectors_VD = vectors_VD
        self.norms_V = torch.linalg.vector_norm(vectors_VD, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        self.directions_VD = vectors_VD / self.norms_V[:, None]

    def __len__(self) -> int:
        return len(self.vectors_VD)

    def inside(self, basis_RD: Tensor, distance: float) -> Tensor:
        """Return the tokens whose direction lies in a subspace.

        Float32 decides for most: its error in a squared distance is below 1e-5. The rest is computed in float64.

        Args:
            basis_RD: float64, orthonormal rows.
            distance: what a unit vector may be away from the subspace; at least 1e-6, float32's own rounding.

        Returns:
            int64 ids in rising order.
        """
        inside_V = (self.directions_VD @ basis_RD.float().T).square_().sum(dim=1)
        near = (1 - inside_V < distance**2 + _FLOAT32_ERROR).nonzero()[:, 0]
        x_CD = self.directions_VD[near].double()
        x_CD = x_CD / torch.linalg.vector_norm(x_CD, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        away_C = torch.linalg.vector_norm(x_CD - (x_CD @ basis_RD.T) @ basis_RD, dim=1)
        members_U: Tensor = near[(away_C < distance) & (self.norms_V[near] > _NO_DIRECTION)]
        return members_U


@dataclass(frozen=True, slots=True)
class FirstLayer:
    """Projections of layer 0's attention, float32: weights (out, D) and biases (out,), zero where there are none."""

    q_weight: Tensor
    k_weight: Tensor
    v_weight: Tensor
    q_bias: Tensor
    k_bias: Tensor
    v_bias: Tensor


class PublicModel:
    """A checkpoint as an attacker reads it.

    Args:
        directory: the model's Hugging Face directory.

    Raises:
        WeightsError: a tensor is missing or malformed.
    """

    def __init__(self, directory: Path) -> None:
        self.config: LlamaConfig = read_config(directory)
        self.checkpoint = Checkpoint(directory)
        norm_D = self._read("model.layers.0.input_layernorm.weight")
        embedding_VD = self._read(f"{EMBEDDING_MODULE}.weight")
        self.table = TokenTable(rms_norm(embedding_VD, norm_D, self.config.rms_norm_eps))
        self.first_layer = self._first_layer()
        self._rotary = RotaryTable(self.config)
        self._runner: PublicRunner | None = None

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(name).to(torch.float32, copy=True)

    def _first_layer(self) -> FirstLayer:
        parts: dict[str, Tensor] = {}
        for short in "qkv":
            module = f"model.layers.0.self_attn.{short}_proj"
            weight = parts[f"{short}_weight"] = self._read(f"{module}.weight")
            has_bias = self.config.attention_bias
            parts[f"{short}_bias"] = self._read(f"{module}.bias") if has_bias else torch.zeros(len(weight))
        return FirstLayer(**parts)

    def rotated(self, x_TXH: Tensor, positions_T: Tensor) -> Tensor:
        """Apply rotary embedding at given positions to queries or keys, shape (T, heads, H)."""
        cos, sin = self._rotary.between(0, int(positions_T.max()) + 1)
        return rotate(x_TXH[None], cos[positions_T], sin[positions_T])[0]

    def runner(self) -> PublicRunner:
        """Return the attacker's own running copy; its weights are loaded on first use."""
        if self._runner is None:
            self._runner = PublicRunner(self)
        return self._runner

    def weight(self, members: tuple[str, ...]) -> Tensor:
        """Read modules' weights stacked by rows, float32, shape (N, K)."""
        return torch.cat([self._read(f"{member}.weight") for member in members])


class _TappedOps(LocalOps):
    """``LocalOps`` that keeps the inputs of some groups."""

    def __init__(self, linears: Linears, state: dict[str, Tensor], groups: frozenset[str]) -> None:
        super().__init__(linears, state)
        self._groups = groups
        self.inputs: dict[str, Tensor] = {}

    def linear(self, group: str, x_MK: Tensor) -> Pending:
        if group in self._groups:
            self.inputs[group] = x_MK.clone()
        return super().linear(group, x_MK)


class PublicRunner:
    """The attacker's own copy of the model, which runs texts of the attacker's choice.

    Args:
        public: the checkpoint.
    """

    def __init__(self, public: PublicModel) -> None:
        cpu = torch.device("cpu")
        self._linears = Linears(public.config, public.checkpoint, torch.float32, cpu)
        self._state = read_state(self._linears, public.checkpoint)
        self.config = public.config

    def followed(self, recording: Recording) -> Recording:
        """Return what the worker has seen once it has computed the chains of groups that it was asked for.

        Of a chain it receives what the first group reads and the residual stream, and computes what the others read.
        """
        chains = LinearChains(self._linears, self._state)
        seen: list[Seen] = []
        for each in recording.seen:
            if each.group not in chains.by_name:
                seen.append(each)
                continue
            read = chains.inputs(each.group, each.tensor)
            seen += [Seen(each.operation, group, x_MK) for group, x_MK in read.items()]
        return replace(recording, seen=tuple(seen))

    def inputs(self, ids_BT: Tensor, groups: frozenset[str]) -> dict[str, Tensor]:
        """Run texts and return what each group's linear layer reads.

        Args:
            ids_BT: int64 token ids.
            groups: which groups; the last layer's have rows for the last position only.

        Returns:
            float32, shape (B T, K) by group.
        """
        ops = _TappedOps(self._linears, self._state, groups)
        Llama(self.config, ops).prefill(ids_BT, all_logits="head" in groups)
        return ops.inputs
