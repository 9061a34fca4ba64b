"""What clients got, and whether it is what the same request gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from soak.asked import Asked


@dataclass
class Answer:
    """One choice, whole.

    Attributes:
        text, finish: of the choice.
        tokens: its tokens' texts; empty without log-probabilities.
        logprobs: of the tokens, None where nothing predicts one.
        gaps: how much likelier, in logarithms, the likeliest token was than the second.
    """

    text: str = ""
    finish: str | None = None
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def add_completion(self, choice: Any) -> None:
        """Take a choice of a completion, or of a chunk of one."""
        self.text += choice.text
        self.finish = choice.finish_reason or self.finish
        if choice.logprobs is not None:
            self.tokens += choice.logprobs.tokens
            self.logprobs += choice.logprobs.token_logprobs
            self.gaps += [_gap(list((top or {}).values())) for top in choice.logprobs.top_logprobs]

    def add_chat(self, choice: Any) -> None:
        """Take a choice of a chat, or of a chunk of one."""
        said = choice.delta if hasattr(choice, "delta") else choice.message
        self.text += said.content or ""
        self.finish = choice.finish_reason or self.finish
        if choice.logprobs is not None:
            for entry in choice.logprobs.content:
                self.tokens.append(entry.token)
                self.logprobs.append(entry.logprob)
                self.gaps.append(_gap([each.logprob for each in entry.top_logprobs]))


def _gap(logprobs: Sequence[float]) -> float:
    first, second = (sorted(logprobs, reverse=True) + [float("-inf")] * 2)[:2]
    return first - second if second > float("-inf") else float("inf")


def float32_error(layers: int, inputs: int) -> float:
    """Return by how much two float32 computations of the same logits may differ, relative to the largest logit.

    They differ in the order in which sums are taken; u = 2^-24 bounds the rounding of one operation. Rounding errors
    of a sum of K products behave as independent ones: it is off by at most sqrt(K) u of its size (Higham and Mary
    2019), two such sums by sqrt(2 K) u from each other, and that bounds the few operations between products too. A
    branch of a layer passes through two products one after the other, and attention errs in its weights by what its
    queries and keys are off: 2 + 2 + 2 such errors a layer, as for bfloat16 in tests/unit/model/test_llama.py. Taking
    every branch as large as the residual stream bounds its part in it; over L layers independent errors grow as a
    random walk, and the head adds one: sqrt(2 K (6 L + 1)) u in all.

    Args:
        layers: L.
        inputs: K, the most of any product.
    """
    return float((2 * inputs * (6 * layers + 1)) ** 0.5 * 2.0**-24)


@dataclass(frozen=True)
class Tolerance:
    """What may differ at `open`, as absolute errors of logits; nothing may where it is 0.

    A logit is off by at most ``logit``, so the largest and the second may change places where their gap is below twice
    that; a log-probability is a logit less a mean of exponents, so it too is off by at most twice that.
    """

    logit: float = 0.0

    @property
    def gap(self) -> float:
        """Below this gap the likeliest token may be another."""
        return 2 * self.logit


@dataclass(frozen=True)
class Verdict:
    """How an answer compares with the same request alone.

    Attributes:
        problem: what must not be; empty if nothing is.
        position: of the first other token, where there may be one.
        gap: the lone run's there.
        off: the largest difference of two log-probabilities before it.
    """

    problem: str = ""
    position: int | None = None
    gap: float = 0.0
    off: float = 0.0


def judged(asked: Asked, alone: Answer, found: Answer, tolerance: Tolerance) -> Verdict:
    """Compare an answer with that of the request alone, which has log-probabilities."""
    if not tolerance.logit:
        return Verdict(_difference(alone, found))
    if not found.tokens and alone.tokens:
        return Verdict("an answer came without log-probabilities")
    pairs = list(zip(alone.tokens, found.tokens, strict=False))
    at = next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))
    both = zip(alone.logprobs[:at], found.logprobs[:at], strict=True)
    off = max((abs(one - other) for one, other in both if one is not None and other is not None), default=0.0)
    if off > tolerance.gap:
        return Verdict(f"log-probabilities are off by {off:.2e}, allowed are {tolerance.gap:.2e}", off=off)
    if at == len(alone.tokens) == len(found.tokens):
        same = (alone.text, alone.finish) == (found.text, found.finish)
        return Verdict("" if same else "the same tokens with another text or end", off=off)
    gap = alone.gaps[at] if at < len(alone.gaps) else 0.0
    sure = asked.takes_the_likeliest and gap > tolerance.gap
    problem = f"token {at} differs, where the gap is {gap:.2e} and not below {tolerance.gap:.2e}" if sure else ""
    return Verdict(problem, at, gap, off)


def _difference(alone: Answer, found: Answer) -> str:
    """Say what differs of two answers that must be the same."""
    for name in ("text", "finish"):
        if getattr(alone, name) != getattr(found, name):
            return f"{name} differs from that of the request alone"
    if found.tokens and (found.tokens, found.logprobs) != (alone.tokens, alone.logprobs):
        return "tokens or log-probabilities differ from those of the request alone"
    return ""
