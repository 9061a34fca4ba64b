"""What an attack found, against what was expected of it; and what counts as chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.audit.simulate import uniform_words
from tsqp.reports import AuditFinding

# An attack on something unprotected has to recover this part of the tokens, or it is broken.
MUST_RECOVER = 0.95
# Chance is what independent guesses exceed once in a million runs.
_CHANCE_LEVEL = 1e-6
# Tests of an honest run fail once in this many; each finding has combined its tests already (Bonferroni).
SIGNIFICANCE = 1e-6
_NULL_RUNS = 6

# A token id per position of the prompt; None where the attack names none.
Guesses = tuple[int | None, ...]
InOrder = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Result:
    """A finding; the tokens behind it where the attack names some; the tensor attacked where it is worth a look."""

    finding: AuditFinding
    guesses: Guesses | None = None
    seen: Tensor | None = None


def score_in_order(guessed_T: Tensor, ids: Sequence[int]) -> float:
    """Return the fraction of positions whose token was recovered."""
    hits = sum(int(guess == token) for guess, token in zip(guessed_T.tolist(), ids, strict=True))
    return hits / len(ids)


def recovered(subject: str, attack: str, guessed_T: Tensor, ids: Sequence[int], note: str = "") -> Result:
    """Report an attack that has to recover the tokens in order."""
    value = score_in_order(guessed_T, ids)
    finding = AuditFinding(
        subject=subject,
        attack=attack,
        measures="tokens in order",
        value=value,
        p_value=None,
        expected=f"at least {MUST_RECOVER:.0%}",
        ok=value >= MUST_RECOVER,
        note=note,
    )
    return Result(finding, tuple(guessed_T.tolist()))


def measured(subject: str, attack: str, guessed_T: Tensor, ids: Sequence[int], note: str) -> Result:
    """Report an attack of which nothing particular is expected."""
    finding = AuditFinding(
        subject=subject,
        attack=attack,
        measures="tokens in order",
        value=score_in_order(guessed_T, ids),
        p_value=None,
        expected="reported only",
        ok=None,
        note=note,
    )
    return Result(finding, tuple(guessed_T.tolist()))


def at_chance(
    subject: str, attack: str, seen: Tensor, recover: InOrder, ids: Sequence[int], generator: torch.Generator
) -> Result:
    """Run an attack that must fail on words, and compare it with itself on words that know nothing.

    Args:
        subject: what is attacked.
        attack: its name.
        seen: int32 words, as observed.
        recover: the attack: words to a token per position.
        ids: the prompt.
        generator: draws the words to compare with.
    """
    guessed_T = recover(seen)
    value = score_in_order(guessed_T, ids)
    blind = sum(score_in_order(recover(uniform_words(seen, generator)), ids) for _ in range(_NULL_RUNS))
    probability = (blind * len(ids) + 1) / (_NULL_RUNS * len(ids))
    limit = chance_limit(len(ids), probability)
    finding = AuditFinding(
        subject=subject,
        attack=attack,
        measures="tokens in order",
        value=value,
        p_value=None,
        expected=f"chance: at most {limit} of {len(ids)}",
        ok=round(value * len(ids)) <= limit,
        note="",
    )
    return Result(finding, tuple(guessed_T.tolist()))


def members(
    subject: str, attack: str, found_U: Tensor, ids: Sequence[int], *, must_find: bool, vocabulary: int
) -> Result:
    """Report an attack that names a set of tokens: all of the prompt's and no other, or none beyond chance."""
    found, wanted = set(found_U.tolist()), set(ids)
    value, false = len(found & wanted) / len(wanted), len(found - wanted)
    limit = chance_limit(len(wanted), (len(found) + 1) / vocabulary)
    expected = "all, and no other" if must_find else f"chance: at most {limit} of {len(wanted)}"
    finding = AuditFinding(
        subject=subject,
        attack=attack,
        measures="distinct tokens",
        value=value,
        p_value=None,
        expected=expected,
        ok=found == wanted if must_find else len(found & wanted) <= limit,
        note=f"{len(found & wanted)} of {len(wanted)} distinct tokens, {false} false ones",
    )
    return Result(finding, tuple(token if token in found else None for token in ids))


def statistic(subject: str, attack: str, p_value: float, note: str, *, reject: bool = False) -> Result:
    """Report a statistical test: the words must pass it, or with ``reject`` fail it."""
    rejected = p_value < SIGNIFICANCE
    finding = AuditFinding(
        subject=subject,
        attack=attack,
        measures="p-value",
        value=p_value,
        p_value=p_value,
        expected=f"p {'below' if reject else 'at least'} {SIGNIFICANCE:g}",
        ok=rejected == reject,
        note=note,
    )
    return Result(finding)


def counted(subject: str, attack: str, count: int, measures: str, note: str, *, none: bool) -> Result:
    """Report a count that must be zero, or with ``none`` False must not be."""
    finding = AuditFinding(
        subject=subject,
        attack=attack,
        measures=measures,
        value=count,
        p_value=None,
        expected="none" if none else "some",
        ok=(count == 0) == none,
        note=note,
    )
    return Result(finding)


def chance_limit(trials: int, probability: float) -> int:
    """Return the smallest count that a binomial variable exceeds with a probability below one in a million."""
    p = min(max(probability, 0.0), 1.0)
    tail = 1.0
    for count in range(trials):
        tail -= math.comb(trials, count) * p**count * (1 - p) ** (trials - count)
        if tail < _CHANCE_LEVEL:
            return count
    return trials
