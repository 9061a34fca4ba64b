"""A tiny public model, and what its worker would see of one prompt at each level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models import load_linears
from torch import Tensor

from tsqp.audit import simulate
from tsqp.audit.evidence import Attacker, Evidence, training_ids, word_groups
from tsqp.audit.public import FIRST_GROUP, PublicModel
from tsqp.audit.recorder import Recording, Seen
from tsqp.audit.simulate import MaskedRun
from tsqp.model.architecture import read_config
from tsqp.model.llama import Llama
from tsqp.model.ops import LocalOps, read_state
from tsqp.model.weights import Checkpoint

TOKENS = 20


@dataclass(frozen=True)
class Case:
    """A model, a prompt, and its recordings; made in this process, without a worker."""

    public: PublicModel
    ids_T: Tensor
    opened: Recording
    verified: Recording
    offloaded: Recording

    @property
    def x_TK(self) -> Tensor:
        """What layer 0's q, k and v read."""
        return self.opened.first(FIRST_GROUP)

    def masked(self, seed: int, dealers: int = 2, repeats: int = 2) -> MaskedRun:
        """Mask with keys from a seeded generator."""
        return simulate.masked(self.verified, self.public, dealers, seeded_bytes(seed), repeats)

    def attacker(self) -> Attacker:
        ids_BT = training_ids(len(self.public.table), [], generator(1))
        return Attacker(self.public, ids_BT)

    def evidence(self) -> Evidence:
        runs = tuple(self.masked(seed) for seed in (1, 2))
        return Evidence(tuple(self.ids_T.tolist()), self.opened, self.offloaded, self.verified, runs)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded_bytes(seed: int) -> Callable[[int], bytes]:
    drawn = generator(seed)

    def draw(count: int) -> bytes:
        return bytes(torch.randint(256, (count,), generator=drawn).tolist())

    return draw


def record(directory: Path, ids_T: Tensor) -> Case:
    """Run a prompt through a model in this process and keep what a worker would see."""
    public = PublicModel(directory)
    groups = word_groups(public.config)
    inputs = public.runner().inputs(ids_T[None], frozenset(groups))
    opened = Recording("worker", tuple(Seen("linear", group, inputs[group]) for group in groups))
    return Case(public, ids_T, opened, simulate.integers(opened, public, groups), _offloaded(directory, ids_T))


class _MatmulOps(LocalOps):
    """Keeps the operands of attention's products."""

    def __init__(self, directory: Path) -> None:
        linears = load_linears(directory)
        super().__init__(linears, read_state(linears, Checkpoint(directory)))
        self.operands: list[Tensor] = []

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        self.operands += [a.clone(), b.clone()]
        return super().matmul(a, b)


def _offloaded(directory: Path, ids_T: Tensor) -> Recording:
    """Keep the attention products that `open` sends when attention is off-loaded."""
    ops = _MatmulOps(directory)
    Llama(read_config(directory), ops, offload_attention=True).prefill(ids_T[None])
    return Recording("worker", tuple(Seen("matmul", "", operand) for operand in ops.operands))
