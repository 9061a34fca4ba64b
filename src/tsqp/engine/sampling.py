"""Chooses one request's next token from its logits, and says how likely tokens were.

Everything here is of one request: its logits, its seed, its history. Neither who else is in the batch nor how many
rows are computed together can change a choice. A native kernel draws (``native/sampling.c``); where it is not there,
NumPy does, whose weights have other last bits: a token that lies so close to a bound may be chosen or not. NumPy works
on one row several times faster than PyTorch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tsqp.arith import native
from tsqp.arith.layer_kernels import Filters
from tsqp.engine.api import LogitsError, Sampling, TokenLogprobs
from tsqp.errors import InternalError

Floats: TypeAlias = npt.NDArray[np.float32]
Ids: TypeAlias = npt.NDArray[np.int64]

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)
# Sums over so many weights are what a draw looks up first.
_DRAW_BLOCK = 256
# The nucleus is looked for among weights of at least this part of 1 - p first; the largest weight is 1.
_LIKELY = 2.0**-9
# Temporary float32 values of ``prompt_logprobs``: 16 MiB.
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Chosen:
    """A chosen token, and the log-probabilities at its position if they were asked for."""

    token: int
    logprobs: TokenLogprobs | None


class Sampler:
    """Chooses the tokens of one request.

    Args:
        sampling: how.
        prompt_ids: the prompt, which the repetition penalty counts too. Ids beyond the vocabulary are ignored.
        vocab: number of logits V.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], vocab: int) -> None:
        self._sampling = sampling
        self._vocab = vocab
        self._filters = Filters(
            max(sampling.temperature, _SMALLEST),
            sampling.top_k if sampling.top_k < vocab else 0,
            sampling.top_p,
            sampling.min_p,
        )
        self._generator = _generator(sampling.seed) if sampling.temperature > 0 else None
        self._seen_V: npt.NDArray[np.bool_] | None = None
        if sampling.repetition_penalty != 1:
            ids = np.asarray(prompt_ids, dtype=np.int64)
            self._seen_V = np.zeros(vocab, dtype=np.bool_)
            self._seen_V[ids[ids < vocab]] = True

    def choose(self, logits_V: Tensor) -> Chosen:
        """Choose the next token: penalise repetition, then draw from what temperature, top-k, top-p and min-p leave.

        Args:
            logits_V: float32, on the CPU; left as they are.

        Raises:
            LogitsError: a logit is not a number, or the largest is infinite.
            InternalError: logits of another shape or dtype.
        """
        if (logits_V.dtype, tuple(logits_V.shape)) != (torch.float32, (self._vocab,)):
            raise InternalError(
                f"logits are {logits_V.dtype} {list(logits_V.shape)}; expected float32 [{self._vocab}]."
            )
        raw_V: Floats = logits_V.numpy()
        token = _require_numbers(raw_V)
        scores_V = raw_V
        if self._seen_V is not None:
            scores_V = self._penalised(raw_V, self._seen_V)
            token = int(scores_V.argmax())
        if self._generator is not None:
            uniform = torch.rand((), dtype=torch.float64, generator=self._generator).item()
            token = draw(scores_V, float(scores_V[token]), self._filters, uniform)
        if self._seen_V is not None:
            self._seen_V[token] = True
        top = self._sampling.logprobs
        logprobs = None if top is None else _logprobs(logits_V[None], (token,), top)[0]
        return Chosen(token, logprobs)

    def _penalised(self, raw_V: Floats, seen_V: npt.NDArray[np.bool_]) -> Floats:
        ids = np.flatnonzero(seen_V)
        seen = raw_V[ids]
        penalty = max(self._sampling.repetition_penalty, _SMALLEST)
        with np.errstate(over="ignore"):
            changed = np.where(seen < 0, seen * penalty, seen / penalty)
        scores_V = raw_V.copy()
        scores_V[ids] = changed.clip(-_LARGEST, _LARGEST)
        return scores_V


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _require_numbers(raw_V: Floats) -> int:
    """Return where the largest logit is, and refuse one that is not finite; ``argmax`` stops at the first NaN."""
    likeliest = int(raw_V.argmax())
    if not math.isfinite(raw_V[likeliest]):
        raise LogitsError(
            "the model's logits are infinite or not numbers: its weights are damaged, its dtype has too small a range "
            "(try float32), or at level open the worker computes wrongly."
        )
    return likeliest


def draw(scores_V: Floats, largest: float, filters: Filters, uniform: float) -> int:
    """Draw a token: invert the distribution function, by ascending ids, of what ``kept_tokens`` leaves.

    Args:
        scores_V: logits after the repetition penalty.
        largest: of the scores; finite.
        filters: of the request.
        uniform: in [0, 1).
    """
    kernels = native.kernels()
    if kernels and kernels.draws:
        return kernels.draw(torch.from_numpy(scores_V), largest, filters, uniform)
    ids, weights = kept_tokens(scores_V, largest, filters)
    position = _position(weights, uniform)
    return position if ids is None else int(ids[position])


def kept_tokens(scores_V: Floats, largest: float, filters: Filters) -> tuple[Ids | None, Floats]:
    """Apply temperature, top-k, top-p and min-p, in this order.

    Definitions and order are those of transformers, each filter taking the probabilities that the one before leaves.
    Top-k keeps every token as likely as the k-th; top-p keeps those of the lowest ids where several are as likely as
    the last it keeps.

    Args:
        scores_V: logits after the repetition penalty.
        largest: of the scores; finite.
        filters: of the request.

    Returns:
        The kept token ids, ascending, or None for all of them; and weights proportional to their probabilities, the
        largest 1.
    """

    def weigh(scores: Floats) -> Floats:
        with np.errstate(over="ignore"):
            scores = scores - largest
            scores /= filters.temperature
        weights: Floats = np.exp(scores, out=scores)
        return weights

    ids, scores = None, scores_V
    if filters.top_k:
        ids = np.flatnonzero(scores >= _largest(scores, filters.top_k))
        scores = scores[ids]
    if filters.top_p < 1:
        kept = _nucleus(scores, weigh, filters.top_p)
        ids, scores = _of(ids, kept), scores[kept]
    weights = weigh(scores)
    if filters.min_p > 0:
        kept = np.flatnonzero(weights >= filters.min_p)
        ids, weights = _of(ids, kept), weights[kept]
    return ids, weights


def _of(ids: Ids | None, kept: Ids) -> Ids:
    return kept if ids is None else ids[kept]


def _largest(values: Floats, count: int) -> np.float32:
    """Return the ``count``-th largest value."""
    place = len(values) - count
    value: np.float32 = np.partition(values, place)[place]
    return value


def _nucleus(scores: Floats, weigh: Callable[[Floats], Floats], p: float) -> Ids:
    """Return where the fewest likeliest tokens are whose probabilities reach p, ascending.

    Only likely tokens are sorted. Those below (1 - p) / V together have less than 1 - p, so the nucleus is among the
    others at the latest; half of that bound leaves room for rounding.

    Args:
        scores: the higher, the likelier.
        weigh: gives weights of scores, 1 of the largest.
        p: in (0, 1).
    """
    weights = weigh(scores)
    total = float(weights.sum(dtype=np.float64))
    for least in (_LIKELY, 0.5 * total / len(scores)):
        candidates = np.flatnonzero(weights >= (1 - p) * least)
        candidate_scores = scores[candidates]
        descending = np.sort(candidate_scores)[::-1]
        reached = weigh(descending).cumsum(dtype=np.float64)
        if reached[-1] >= p * total:
            break
    # A token is kept while those above it have less than p.
    count = min(len(descending), 1 + int(reached.searchsorted(p * total)))
    last = descending[count - 1]
    above = int(np.count_nonzero(descending > last))
    kept = candidate_scores > last
    kept[np.flatnonzero(candidate_scores == last)[: count - above]] = True
    nucleus: Ids = candidates[kept]
    return nucleus


def _position(weights: Floats, uniform: float) -> int:
    """Invert the distribution function: the first position where the running sum exceeds ``uniform`` of the whole.

    Args:
        weights: not negative, not all zero.
        uniform: in [0, 1).
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _DRAW_BLOCK), dtype=np.float64)
    ends = sums.cumsum()
    target = uniform * float(ends[-1])
    block = int(ends.searchsorted(target, side="right"))
    start = block * _DRAW_BLOCK
    inside = weights[start : start + _DRAW_BLOCK]
    running = inside.cumsum(dtype=np.float64)
    position = int(running.searchsorted(target - float(ends[block] - sums[block]), side="right"))
    if position == len(inside):
        # The block's two sums were rounded differently.
        position = int(np.flatnonzero(inside)[-1])
    return start + position


def prompt_logprobs(logits_TV: Tensor, ids: Sequence[int], top: int = 0) -> tuple[TokenLogprobs, ...]:
    """Return the log-probabilities of tokens that are given, not chosen.

    Args:
        logits_TV: float32, on the CPU; any part of a prompt.
        ids: T tokens: those that each row predicts, so of a prompt the ones after the rows' own.
        top: also report so many likeliest tokens of each row.

    Raises:
        LogitsError: a logit is not a number, or a row's largest is infinite.
        InternalError: not one id per row.
    """
    rows, vocab = logits_TV.shape
    if rows != len(ids):
        raise InternalError(f"{rows} rows of logits and {len(ids)} tokens; each row predicts one.")
    step = max(1, _BLOCK_ELEMENTS // vocab)
    found: list[TokenLogprobs] = []
    for start in range(0, rows, step):
        found += _logprobs(logits_TV[start : start + step], ids[start : start + step], top)
    return tuple(found)


def _logprobs(logits_TV: Tensor, ids: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Do what ``prompt_logprobs`` does, at once. A row's results do not depend on the others: the kernel takes each."""
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1).numpy()
    own: list[float] = logprobs_TV[np.arange(len(ids)), np.asarray(ids)].tolist()
    found = []
    for raw_V, row_V, logprob in zip(logits_TV.numpy(), logprobs_TV, own, strict=True):
        _require_numbers(raw_V)
        found.append(TokenLogprobs(logprob, _top(raw_V, row_V, top)))
    return found


def _top(raw_V: Floats, logprobs_V: npt.NDArray[Any], count: int) -> tuple[tuple[int, float], ...]:
    """Return the likeliest tokens, the lowest id first where several are as likely."""
    if not count:
        return ()
    ids = np.flatnonzero(raw_V >= _largest(raw_V, min(count, len(raw_V))))
    ids = ids[np.argsort(-raw_V[ids], kind="stable")][:count]
    return tuple(zip(ids.tolist(), logprobs_V[ids].tolist(), strict=True))
