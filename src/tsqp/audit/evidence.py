"""Everything the audit knows of one prompt: what was recorded at each level, and what is public.

The prompt's own ids are there to score the attacks; no attack is given them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tsqp.audit.attacks import regression
from tsqp.audit.public import FIRST_GROUP, PublicModel
from tsqp.audit.recorder import Recording
from tsqp.audit.simulate import MaskedRun
from tsqp.model.architecture import LlamaConfig

# Room that left mixing leaves for its shield rows, and membership for telling inside from outside.
_LARGEST_PART_OF_HIDDEN = 0.5
MIN_TOKENS = 8
_TRAINING_ROWS = 128
_RANDOM_SEQUENCES = 4


@dataclass(frozen=True, slots=True)
class Evidence:
    """Recordings of one prompt; a level that is not audited has none.

    Attributes:
        ids: the prompt's token ids.
        opened: `open`: float activations, which the schemes blind.
        offloaded: `open` with attention's products sent out too: queries and keys.
        verified: integers in clear.
        masked: sessions at `masked`, each with keys of its own.
        simulated: what of this was computed and not recorded.
    """

    ids: tuple[int, ...]
    opened: Recording
    offloaded: Recording | None = None
    verified: Recording | None = None
    masked: tuple[MaskedRun, ...] = ()
    simulated: tuple[str, ...] = ()


@dataclass(slots=True)
class Attacker:
    """The public model, and the maps that the attacker has trained on it.

    Attributes:
        public: weights and vocabulary.
        training_ids: public text, int64 (B, T).
        maps: by linear group, trained on first use.
    """

    public: PublicModel
    training_ids: Tensor
    maps: dict[str, regression.Ridge] = field(default_factory=dict)

    def train(self, groups: tuple[str, ...]) -> None:
        """Run the training text once and fit a map for each group."""
        inputs = self.public.runner().inputs(self.training_ids, frozenset((FIRST_GROUP, *groups)))
        targets_MD = inputs[FIRST_GROUP]
        self.maps = {group: regression.fit(inputs[group], targets_MD) for group in groups}

    def overlap(self, ids: tuple[int, ...]) -> float:
        """Return the fraction of the prompt's tokens that occur in the training text."""
        return float(torch.isin(torch.tensor(ids), self.training_ids).double().mean())


def training_ids(vocabulary: int, text_ids: list[int], generator: torch.Generator) -> Tensor:
    """Cut text into rows and add rows of random tokens, so that rare ones occur: int64 (B, T)."""
    rows = len(text_ids) // _TRAINING_ROWS
    text_BT = torch.tensor(text_ids[: rows * _TRAINING_ROWS], dtype=torch.int64).view(rows, _TRAINING_ROWS)
    random_BT = torch.randint(vocabulary, (_RANDOM_SEQUENCES, _TRAINING_ROWS), generator=generator)
    return torch.cat((random_BT, text_BT))


def token_limit(config: LlamaConfig) -> int:
    """Return how many tokens a prompt may have: beyond, the span of its rows is no longer small in the hidden space."""
    return min(config.context_length, int(_LARGEST_PART_OF_HIDDEN * config.hidden_size))


def deeper_groups(config: LlamaConfig) -> tuple[str, ...]:
    """Name the groups that regression looks at: the second layer, the middle and the last that sees every position."""
    layers = sorted({min(1, config.layers - 1), config.layers // 2, config.layers - 1} - {0})
    return tuple(f"layers.{layer}.qkv" for layer in layers)


def word_groups(config: LlamaConfig) -> tuple[str, ...]:
    """Name the groups whose words are tested: all of the first layer, and those of ``deeper_groups``."""
    first = tuple(f"layers.0.{name}" for name in ("qkv", "o", "gate_up", "down"))
    return first + deeper_groups(config)
