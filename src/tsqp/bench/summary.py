"""From samples to what is reported: medians, spread, the run nearest the median, and ratios with their limits."""

from __future__ import annotations

import datetime as dt
import statistics
from collections.abc import Sequence
from typing import Any

from tsqp.bench import hardware
from tsqp.bench.child import Sample
from tsqp.bench.children import Child
from tsqp.config import EnclaveConfig
from tsqp.measurements import Floor, Ratio, Variant


def spread(values: Sequence[float], part: float) -> float:
    """Return the value that this part of all lies below, between two of them where need be."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def typical(samples: Sequence[Sample]) -> Sample:
    """Return the run whose time is nearest the median."""
    median_s = statistics.median(sample.total_s for sample in samples)
    return min(samples, key=lambda sample: abs(sample.total_s - median_s))


def variant(child: Child, tokens: int, floor: Floor | None = None) -> Variant:
    """Summarise one variant's runs."""
    seconds = [sample.total_s for sample in child.samples]
    one = typical(child.samples)
    return Variant(
        name=child.plan.name,
        settings=child.plan.settings,
        median_s=statistics.median(seconds),
        p10_s=spread(seconds, 0.1),
        p90_s=spread(seconds, 0.9),
        p95_s=spread(seconds, 0.95),
        all_s=seconds,
        bytes_per_token=one.bytes_moved / tokens,
        round_trips=one.round_trips,
        enclave_s=one.enclave_s,
        waited_s=one.waited_s,
        worker_s=one.worker_s,
        wire_s=one.wire_s,
        pcie_s=one.pcie_s,
        micro_batches=one.micro_batches,
        protection_s=one.protection_s,
        mask_wait_s=one.mask_wait_s,
        quantise_s=one.quantise_s,
        mask_s=one.mask_s,
        ahead_s=one.ahead_s,
        check_s=one.check_s,
        peak_bytes=max(sample.peak_bytes for sample in child.samples),
        floor=floor,
    )


def ratio(name: str, value: float, at_most: float | None = None, at_least: float | None = None) -> Ratio:
    """Return a ratio and whether it keeps its limit, if it has one."""
    if at_most is not None:
        return Ratio(name=name, value=value, limit=f"at most {at_most:g}", ok=value <= at_most)
    if at_least is not None:
        return Ratio(name=name, value=value, limit=f"at least {at_least:g}", ok=value >= at_least)
    return Ratio(name=name, value=value, limit="", ok=None)


def model_heading(command: str, config: EnclaveConfig, threads: int, rounds: int, warm_up: int) -> dict[str, Any]:
    """Return what every report of a model begins with, but for its ratios."""
    ours = {"model": config.model, "dtype": config.dtype, "threads": threads, "warm_up": warm_up, "rounds": rounds}
    return heading(command) | ours


def heading(command: str) -> dict[str, Any]:
    """Return what every report begins with, but for its ratios."""
    return {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "commit": hardware.commit(),
        "command": command,
        "hardware": hardware.describe(),
    }
