"""``tsqp bench scaling``: prefill over prompt length and over the number of prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tsqp.bench.child import Ask
from tsqp.bench.children import Child, OnStep
from tsqp.bench.plans import SCALING_LENGTHS, SCALING_PLANS
from tsqp.bench.prefill_suite import Prepared
from tsqp.bench.summary import model_heading, ratio, spread, typical
from tsqp.config import EnclaveConfig
from tsqp.enclave.mask_pool import largest_pool
from tsqp.errors import InputError
from tsqp.levels import open_model
from tsqp.measurements import Ratio, ScalingPoint, ScalingReport
from tsqp.model.architecture import linear_groups

_BASELINE = "monolithic-active"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What to measure.

    Attributes:
        lengths: of one prompt; None for the usual ones, as far as the model's context goes.
        batches: numbers of prompts.
        batch_tokens: length of each of those.
    """

    lengths: tuple[int, ...] | None
    batches: tuple[int, ...]
    batch_tokens: int


def run(config: EnclaveConfig, sizes: Sizes, threads: int, *, rounds: int, on_step: OnStep) -> ScalingReport:
    """Measure `open`, `masked`, `local` and transformers at every size, in turns.

    Args:
        config: a plain model, the dtype of the levels in floats, the mask pool.
        sizes: which.
        threads: per process.
        rounds: runs of each level at each size, after one that does not count.
        on_step: told the fraction done.

    Raises:
        InputError: a prompt longer than the model's context.
        TsqpError: the worker does not start, or a variant fails.
    """
    architecture = open_model(config.model, "open", on_step).architecture
    lengths = sizes.lengths or tuple(length for length in SCALING_LENGTHS if length <= architecture.context_length)
    longest = max(*lengths, sizes.batch_tokens, 1)
    if longest > architecture.context_length:
        raise InputError(f"--tokens {longest}: this model takes 1 to {architecture.context_length} tokens.")
    most = max(longest, sizes.batch_tokens * max(sizes.batches, default=1))
    fitting = largest_pool(linear_groups(architecture), config.mask_memory)
    pool = min(most, fitting) if config.mask_pool is None else config.mask_pool
    asks = [Ask(tokens=count) for count in lengths]
    asks += [Ask(tokens=sizes.batch_tokens, batch=batch) for batch in sizes.batches]
    prepared = Prepared.of(config, longest, on_step)
    points: list[ScalingPoint] = []
    with prepared.children(SCALING_PLANS, replace(config, mask_pool=pool), threads) as children:
        for done, ask in enumerate(asks):
            on_step("benchmark", done / len(asks))
            points += _measured(children, ask, rounds, pool)
        on_step("benchmark", 1.0)
    cut = len(lengths) * len(children)
    return ScalingReport(
        **model_heading(_command(config, lengths, sizes, threads, rounds), config, threads, rounds, 1),
        mask_pool=pool,
        batch_tokens=sizes.batch_tokens,
        lengths=points[:cut],
        batches=points[cut:],
        ratios=ratios(points[:cut]),
    )


def _command(config: EnclaveConfig, lengths: Sequence[int], sizes: Sizes, threads: int, rounds: int) -> str:
    listed, batches = ",".join(map(str, lengths)), ",".join(map(str, sizes.batches))
    return (
        f"tsqp bench scaling --model {config.model} --tokens {listed} --batch {batches} "
        f"--batch-tokens {sizes.batch_tokens} --dtype {config.dtype} --threads {threads} --rounds {rounds}"
    )


def _measured(children: Sequence[Child], ask: Ask, rounds: int, pool: int) -> list[ScalingPoint]:
    """Let every level take turns at one size."""
    for child in children:
        child.run(ask)
        child.samples = []
    for _ in range(rounds):
        for child in children:
            child.samples.append(child.run(ask))
    return [_point(child, ask, pool) for child in children]


def _point(child: Child, ask: Ask, pool: int) -> ScalingPoint:
    seconds = [sample.total_s for sample in child.samples]
    one, count = typical(child.samples), ask.tokens * ask.batch
    return ScalingPoint(
        level="monolithic" if child.plan.name == _BASELINE else child.plan.name,
        tokens=ask.tokens,
        batch=ask.batch,
        median_s=statistics.median(seconds),
        p10_s=spread(seconds, 0.1),
        p90_s=spread(seconds, 0.9),
        tokens_per_s=count / statistics.median(seconds),
        bytes_per_token=one.bytes_moved / count,
        round_trips=one.round_trips,
        micro_batches=one.micro_batches,
        masks_ready=child.plan.level != "masked" or count <= pool,
    )


def ratios(lengths: Sequence[ScalingPoint]) -> list[Ratio]:
    """Compare `open` and `masked` with transformers at each length."""
    baseline = {point.tokens: point.median_s for point in lengths if point.level == "monolithic"}
    return [
        ratio(f"{point.level} / monolithic, {point.tokens} tokens", point.median_s / baseline[point.tokens])
        for point in lengths
        if point.level in ("open", "masked")
    ]
