"""``tsqp bench overlap``: how much of a slow link micro-batches hide."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from tsqp.bench.child import Ask
from tsqp.bench.children import WARM_UP, Child, OnStep, Peers, check_agreement, started, take_turns, without_waiting
from tsqp.bench.delay import delayed
from tsqp.bench.plans import PLANS
from tsqp.bench.prefill_suite import Prepared
from tsqp.bench.summary import model_heading, ratio, spread, typical
from tsqp.config import EnclaveConfig
from tsqp.launch import local_worker
from tsqp.measurements import OverlapPoint, OverlapReport, Ratio

DELAYS_MS = (0.0, 1.0, 3.0)
COUNTS = (1, 2, 4, 8)
_LEAST_HIDDEN = 0.7
# What is promised, is promised of these delays.
_PROMISED_MS = (1.0, 3.0)
_RUNS_PER_TURN = 2


@dataclass(frozen=True, slots=True)
class Sizes:
    """What to measure: prompts, delays each way in milliseconds, and numbers of micro-batches."""

    tokens: int
    batch: int
    delays_ms: tuple[float, ...]
    counts: tuple[int, ...]


def run(config: EnclaveConfig, sizes: Sizes, threads: int, *, rounds: int, on_step: OnStep) -> OverlapReport:
    """Measure every delay with every number of micro-batches, in turns.

    Args:
        config: a plain model, the level, the dtype where it is in floats.
        sizes: which; a delay of 0 and one micro-batch, which is serial, are always measured.
        threads: per process.
        rounds: turns of each, each of one run to warm up and two that count.
        on_step: told the fraction done.

    Raises:
        TsqpError: the worker does not start, or a variant fails.
    """
    sizes = replace(sizes, delays_ms=tuple(sorted({0.0, *sizes.delays_ms})), counts=tuple(sorted({1, *sizes.counts})))
    prepared = Prepared.of(config, sizes.tokens, on_step)
    if config.mask_pool is None:
        config = replace(config, mask_pool=sizes.tokens * sizes.batch)
    plan = next(plan for plan in PLANS if plan.name == config.level)
    model = str(prepared.packed if plan.packed else prepared.directory)
    words = ["--model", model, "--dtype", config.dtype, "--threads", str(threads), "--device", "cpu"]
    with ExitStack() as stack:
        worker = stack.enter_context(local_worker(words, "shm", environment=without_waiting()))
        places = [(delay_ms, count) for delay_ms in sizes.delays_ms for count in sizes.counts]
        children = []
        for delay_ms, count in places:
            link = Peers({plan.link: stack.enter_context(delayed(worker, delay_ms / 1e3))})
            named = replace(plan, name=f"{plan.name}, {delay_ms:g} ms, {count}")
            order = prepared.order(named, link, replace(config, micro_batches=count), threads)
            children.append(stack.enter_context(started(named, order)))
        take_turns(children, rounds, on_step, Ask(batch=sizes.batch), _RUNS_PER_TURN)
    check_agreement(children)
    points = _points(places, children)
    shown = replace(config, dtype="int8") if plan.packed else config
    return OverlapReport(
        **model_heading(_command(config, sizes, threads, rounds), shown, threads, rounds, WARM_UP),
        level=config.level,
        tokens=sizes.tokens,
        batch=sizes.batch,
        points=points,
        ratios=ratios(points),
    )


def _command(config: EnclaveConfig, sizes: Sizes, threads: int, rounds: int) -> str:
    delays = ",".join(f"{delay:g}" for delay in sizes.delays_ms)
    counts = ",".join(map(str, sizes.counts))
    return (
        f"tsqp bench overlap --model {config.model} --level {config.level} --tokens {sizes.tokens} "
        f"--batch {sizes.batch} --delay {delays} --micro-batches {counts} --dtype {config.dtype} "
        f"--threads {threads} --rounds {rounds}"
    )


def _points(places: Sequence[tuple[float, int]], children: Sequence[Child]) -> list[OverlapPoint]:
    medians = {
        place: statistics.median(sample.total_s for sample in child.samples)
        for place, child in zip(places, children, strict=True)
    }
    points = []
    for (delay_ms, count), child in zip(places, children, strict=True):
        seconds, one = [sample.total_s for sample in child.samples], typical(child.samples)
        serial_s, undelayed_s = medians[delay_ms, 1], medians[0.0, 1]
        cost_s = serial_s - undelayed_s
        points.append(
            OverlapPoint(
                delay_ms=delay_ms,
                micro_batches=count,
                median_s=medians[delay_ms, count],
                p10_s=spread(seconds, 0.1),
                p90_s=spread(seconds, 0.9),
                enclave_s=one.enclave_s,
                waited_s=one.waited_s,
                worker_s=one.worker_s,
                hidden=(serial_s - medians[delay_ms, count]) / cost_s
                if count > 1 and delay_ms and cost_s > 0
                else None,
                times_undelayed=medians[delay_ms, count] / undelayed_s,
            )
        )
    return points


def ratios(points: Sequence[OverlapPoint]) -> list[Ratio]:
    """Judge the best number of micro-batches at each delay."""
    found = []
    for delay_ms in sorted({point.delay_ms for point in points if point.delay_ms}):
        overlapped = [point for point in points if point.delay_ms == delay_ms and point.hidden is not None]
        if not overlapped:
            continue
        best = min(overlapped, key=lambda point: point.median_s)
        name = f"{delay_ms:g} ms each way, {best.micro_batches} micro-batches"
        least = _LEAST_HIDDEN if delay_ms in _PROMISED_MS else None
        found.append(ratio(f"{name}: part of the link's cost that is hidden", best.hidden or 0.0, at_least=least))
        found.append(ratio(f"{name}: time / serial without a delay", best.times_undelayed))
    return found
