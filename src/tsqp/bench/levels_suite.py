"""``tsqp bench levels``: where each level's time goes, and how far each part is from its floor."""

from __future__ import annotations

import statistics
import time

import torch

from tsqp.bench.child import Sample
from tsqp.bench.children import WARM_UP, Child, OnStep, check_agreement, take_turns
from tsqp.bench.echo import echo_client, serving
from tsqp.bench.plans import LEVEL_PLANS
from tsqp.bench.prefill_suite import Prepared, command, recorded
from tsqp.bench.summary import model_heading, ratio, typical, variant
from tsqp.bench.trace import Recording
from tsqp.config import EnclaveConfig
from tsqp.launch import DEFAULT_SCHEME
from tsqp.measurements import Floor, LevelsReport, Ratio, Variant
from tsqp.paths import private_socket_directory
from tsqp.threads import using_threads

_COPIED_BYTES = 256 << 20
_COPIES = 8
_SMALL_BYTES = 4096
_ROUND_TRIPS = 300


def run(
    config: EnclaveConfig, tokens: int, threads: int, *, rounds: int, trace: bool, device: str, on_step: OnStep
) -> tuple[LevelsReport, dict[str, Recording]]:
    """Measure every level and its floors in turns.

    Args:
        config: a plain model, the dtype of the levels in floats, micro-batches.
        tokens: prompt length.
        threads: per process.
        rounds: turns of each, each of one run to warm up and four that count.
        trace: record one more prefill at each level with a worker.
        device: of the workers.
        on_step: told the fraction done.

    Returns:
        The report, and recordings by level.

    Raises:
        TsqpError: the worker does not start, or a variant fails.
    """
    prepared = Prepared.of(config, tokens, on_step, device)
    copy_bytes_per_s, round_trip_s = copy_bandwidth(threads), small_round_trip()
    with prepared.children(LEVEL_PLANS, config, threads) as children:
        take_turns(children, rounds, on_step)
        recordings = recorded(children) if trace else {}
    check_agreement(children)
    alone = {child.plan.level: typical(child.samples) for child in children if child.plan.floor}
    variants = [
        variant(child, tokens, floor_of(child, alone.get(child.plan.level), copy_bytes_per_s, round_trip_s))
        for child in children
        if not child.plan.floor
    ]
    report = LevelsReport(
        **model_heading(command("levels", config, prepared, threads, rounds), config, threads, rounds, WARM_UP),
        tokens=tokens,
        copy_bytes_per_s=copy_bytes_per_s,
        round_trip_s=round_trip_s,
        variants=variants,
        ratios=ratios(variants),
    )
    return report, recordings


def floor_of(child: Child, alone: Sample | None, copy_bytes_per_s: float, round_trip_s: float) -> Floor | None:
    """Put the floors of a level's parts together; None for a level of which no parts were measured."""
    if alone is None:
        return None
    moved = typical(child.samples)
    wire_s = moved.bytes_moved / copy_bytes_per_s + moved.round_trips * round_trip_s
    parts = (alone.enclave_s, alone.worker_s, wire_s)
    return Floor(
        worker_s=alone.worker_s,
        wire_s=wire_s,
        enclave_s=alone.enclave_s,
        rest_s=alone.enclave_s - alone.protection_s,
        quantise_s=alone.quantise_s,
        mask_s=alone.mask_s,
        ahead_s=alone.ahead_s,
        check_s=alone.check_s,
        overlapped_s=max(parts),
        serial_s=sum(parts),
    )


def ratios(variants: list[Variant]) -> list[Ratio]:
    """Compare each level with its floor and with transformers, the better of its two OpenMP settings."""
    baseline_s = min(each.median_s for each in variants if each.name.startswith("monolithic"))
    found = []
    for each in variants:
        if each.floor:
            found.append(ratio(f"{each.name} / its floor without overlap", each.median_s / each.floor.serial_s))
            found.append(ratio(f"{each.name} / its floor with overlap", each.median_s / each.floor.overlapped_s))
        if not each.name.startswith("monolithic"):
            found.append(ratio(f"{each.name} / monolithic", each.median_s / baseline_s))
    return found


def copy_bandwidth(threads: int) -> float:
    """Return how many bytes of memory are copied in a second, by one thread or by all, whichever is faster."""
    source = torch.ones(_COPIED_BYTES // 4)
    target = torch.empty_like(source)
    best_s = float("inf")
    for count in sorted({1, threads}):
        with using_threads(count):
            for _ in range(_COPIES):
                started = time.perf_counter()
                target.copy_(source)
                best_s = min(best_s, time.perf_counter() - started)
    return _COPIED_BYTES / best_s


def small_round_trip() -> float:
    """Return the median round trip of 4 KB over the fastest link of this machine, seconds."""
    with private_socket_directory() as directory:
        url = f"{DEFAULT_SCHEME}://{directory}/echo"
        with serving(url), echo_client(url) as client:
            taken = [client.seconds(_SMALL_BYTES, "in place") for _ in range(_ROUND_TRIPS)]
    return statistics.median(taken)
