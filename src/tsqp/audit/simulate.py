"""Makes from an `open` recording what a worker would see at the integer levels, for tests of the attacks themselves.

The forced r = 0 comes from here too: no real run sends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.arith.keystream import KEY_BYTES, keystream_rows
from tsqp.arith.quantize import largest_norm, quantize_activations, quantize_weights
from tsqp.audit.public import PublicModel
from tsqp.audit.recorder import Dealt, Recording, Seen
from tsqp.model.architecture import linear_groups

EXACT = "linear_exact"


@dataclass(frozen=True, slots=True)
class MaskedRun:
    """One session at `masked`, in which the prompt was sent twice: what the worker saw, and what each dealer saw."""

    worker: Recording
    dealers: tuple[Recording, ...]


def integers(opened: Recording, public: PublicModel, groups: Sequence[str]) -> Recording:
    """Quantise the activations of an `open` recording as `verified` would send them.

    Args:
        opened: the recording.
        public: the model's weights.
        groups: which groups to keep.
    """
    members = {group.name: group.members for group in linear_groups(public.config)}
    largest = {name: largest_norm(quantize_weights(public.weight(members[name]))[0]) for name in groups}
    seen = [
        Seen(EXACT, each.group, quantize_activations(each.tensor.float(), largest[each.group])[0])
        for each in opened.seen
        if each.group in largest
    ]
    return Recording(opened.observer, tuple(seen))


def masked(
    verified: Recording, public: PublicModel, dealers: int, random_bytes: Callable[[int], bytes], repeats: int = 2
) -> MaskedRun:
    """Mask an integer recording as `masked` would: x + r_1 + ... + r_k modulo 2^32, each row under fresh mask rows.

    Args:
        verified: integers in clear.
        public: numbers the groups.
        dealers: k, at least 1; a mask made by the enclave is one that no dealer is told.
        random_bytes: where keys come from.
        repeats: how often the prompt is sent.
    """
    numbers = {group.name: number for number, group in enumerate(linear_groups(public.config))}
    keys = [random_bytes(KEY_BYTES) for _ in range(dealers)]
    taken: dict[str, int] = {}
    seen: list[Seen] = []
    dealt: list[list[Dealt]] = [[] for _ in keys]
    for each in verified.seen * repeats:
        first, (count, inputs) = taken.get(each.group, 0), each.tensor.shape
        taken[each.group] = first + count
        words = each.tensor.clone()
        for key, orders in zip(keys, dealt, strict=True):
            words += keystream_rows(key, numbers[each.group], first, count, inputs)
            orders.append(Dealt(each.group, key, first, count))
        seen.append(Seen(EXACT, each.group, words))
    parties = tuple(Recording(f"dealer {number}", (), tuple(orders)) for number, orders in enumerate(dealt, 1))
    return MaskedRun(Recording("worker", tuple(seen)), parties)


def unmasked(verified: Recording, repeats: int = 2) -> MaskedRun:
    """Mask with r forced to 0: the attacks that must fail at `masked` must succeed here."""
    return MaskedRun(Recording("worker", verified.seen * repeats), ())


def uniform_words(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw int32 words of a tensor's shape that have nothing to do with it."""
    low, high = -(1 << 31), 1 << 31
    return torch.randint(low, high, tuple(like.shape), dtype=torch.int64, generator=generator).to(torch.int32)
