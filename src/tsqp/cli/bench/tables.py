"""What the commands of ``tsqp bench`` show on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tsqp.measurements import (
    BenchReport,
    DecodeReport,
    Floor,
    LevelsReport,
    OverlapReport,
    Ratio,
    ScalingPoint,
    ScalingReport,
    TransportReport,
    Variant,
)

Report: TypeAlias = BenchReport | LevelsReport | ScalingReport | OverlapReport | DecodeReport | TransportReport

_PARTS = ("quantise", "mask", "ahead", "check", "rest")


def show(report: Report) -> None:
    """Print a report as tables, then its ratios, then the machine."""
    console = Console(highlight=False)
    tables: dict[type[Any], Callable[[Any], Sequence[Table | str]]] = {
        BenchReport: _prefill,
        LevelsReport: _levels,
        ScalingReport: _scaling,
        OverlapReport: _overlap,
        DecodeReport: _decode,
        TransportReport: _transport,
    }
    for table in tables[type(report)](report):
        console.print(table)
    if report.ratios:
        console.print(_ratios(report.ratios))
    machine = report.hardware
    gpu = f"; {escape(machine.gpu)}" if machine.gpu else ""
    console.print(
        f"{escape(machine.cpu)}, {machine.cores} cores, {machine.memory_gb:g} GB{gpu}; torch {machine.torch}; "
        f"commit {report.commit}\n{escape(report.command)}",
        soft_wrap=True,
    )


def _table(*headings: str, title: str | None = None) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _spread(low_s: float, high_s: float) -> str:
    return f"{_ms(low_s)} to {_ms(high_s)}"


def _ratios(ratios: Sequence[Ratio]) -> Table:
    table = _table("ratio", "value", "limit", "")
    for ratio in ratios:
        verdict = "" if ratio.ok is None else "holds" if ratio.ok else "[red]missed[/]"
        table.add_row(escape(ratio.name), f"{ratio.value:.2f}", ratio.limit, verdict)
    return table


def _prefill(report: BenchReport) -> list[Table | str]:
    title = f"{report.model}, prefill of {report.tokens} tokens, {report.dtype}, {report.threads} threads per process"
    table = _table(
        "variant", "median ms", "p10 to p90", "enclave", "waiting", "worker", "KB/token", "trips", title=escape(title)
    )
    for variant in report.variants:
        parts = (variant.enclave_s, variant.waited_s, variant.worker_s)
        split = map(_ms, parts) if variant.worker_s else ("", "", "")
        moved = [f"{variant.bytes_per_token / 1e3:.0f}", str(variant.round_trips)] if variant.round_trips else ["", ""]
        table.add_row(variant.name, _ms(variant.median_s), _spread(variant.p10_s, variant.p90_s), *split, *moved)
    return [table, _what_a_gpu_changes(report)]


def _what_a_gpu_changes(report: BenchReport) -> str:
    by_name = {variant.name: variant for variant in report.variants}
    masked, local = by_name.get("masked") or by_name["masked-dealer"], by_name["local"]
    stays_s = masked.enclave_s + masked.wire_s
    return (
        f"masked takes {masked.median_s / local.median_s:.1f} times as long as local here, where the worker has no GPU "
        f"and shares the enclave's cores. A GPU takes away most of the worker's {masked.worker_s * 1e3:.0f} ms; the "
        f"enclave's and the wire's {stays_s * 1e3:.0f} ms stay ({stays_s / local.median_s:.1f} times local). They grow "
        "with inputs plus outputs of the layers, local's time with their product, so the larger the model the more a "
        "GPU gains: docs/performance.md has the model."
    )


def _levels(report: LevelsReport) -> list[Table | str]:
    title = f"{report.model}, prefill of {report.tokens} tokens, {report.dtype}, {report.threads} threads per process"
    has_pcie = any(variant.pcie_s for variant in report.variants)  # a part of the worker's time
    times = _table(
        "level",
        "median ms",
        "p10 to p90",
        "enclave",
        "waiting",
        "worker",
        "wire",
        *_PARTS,
        *(("PCIe",) if has_pcie else ()),
        title=escape(title),
    )
    floors = _table(
        "floor, ms (distance)", "enclave", "worker", "wire", *_PARTS, "largest part", "sum", title="floors of the parts"
    )
    for variant in report.variants:
        whole = (variant.enclave_s, variant.waited_s, variant.worker_s, variant.wire_s) if variant.worker_s else ()
        shown = [*map(_ms, whole)] if whole else [""] * 4
        inner = [_ms(value) if value else "" for value in _inner(variant)] if variant.worker_s else [""] * len(_PARTS)
        pcie = (_ms(variant.pcie_s),) if has_pcie else ()
        times.add_row(variant.name, _ms(variant.median_s), _spread(variant.p10_s, variant.p90_s), *shown, *inner, *pcie)
        if variant.floor:
            floors.add_row(variant.name, *_distances(variant, variant.floor))
    wire = (
        f"wire: {report.copy_bytes_per_s / 1e9:.1f} GB/s of memory copied, "
        f"{report.round_trip_s * 1e6:.0f} us per round trip of 4 KB."
    )
    return [times, floors, wire]


def _inner(variant: Variant) -> tuple[float, ...]:
    """Return the parts of the enclave's time; waiting for masks is none of them."""
    rest_s = variant.enclave_s - variant.protection_s - variant.mask_wait_s
    return (variant.quantise_s, variant.mask_s, variant.ahead_s, variant.check_s, rest_s)


def _distances(variant: Variant, floor: Floor) -> list[str]:
    """Write each part's floor, and how many times as long the part takes."""
    actual = (variant.enclave_s, variant.worker_s, variant.wire_s, *_inner(variant))
    least = (
        *(floor.enclave_s, floor.worker_s, floor.wire_s),
        *(floor.quantise_s, floor.mask_s, floor.ahead_s, floor.check_s, floor.rest_s),
    )
    whole = ((variant.median_s, floor.overlapped_s), (variant.median_s, floor.serial_s))
    return [
        f"{_ms(floor_s)} ({actual_s / floor_s:.1f})" if floor_s and actual_s else _ms(floor_s) if floor_s else ""
        for actual_s, floor_s in (*zip(actual, least, strict=True), *whole)
    ]


def _scaling(report: ScalingReport) -> list[Table | str]:
    title = f"{report.model}, {report.dtype}, {report.threads} threads per process: "
    ready = f"masks were ready for {report.mask_pool} tokens; beyond that (*) they were made within the prefill."
    return [
        _points(report.lengths, escape(f"{title}one prompt of so many tokens"), lambda point: point.tokens),
        _points(
            report.batches,
            escape(f"{title}so many prompts of {report.batch_tokens} tokens"),
            lambda point: point.batch,
        ),
        ready,
    ]


def _points(points: Sequence[ScalingPoint], title: str, size: Callable[[ScalingPoint], int]) -> Table:
    levels = list(dict.fromkeys(point.level for point in points))
    table = _table(
        "", *(f"{level} tok/s" for level in levels), "KB/token open", "masked", "trips open", "masked", title=title
    )
    for value in dict.fromkeys(map(size, points)):
        row = {point.level: point for point in points if size(point) == value}
        rates = [f"{row[level].tokens_per_s:.0f}{'' if row[level].masks_ready else '*'}" for level in levels]
        split = [row[level] for level in ("open", "masked")]
        moved = [f"{point.bytes_per_token / 1e3:.0f}" for point in split]
        table.add_row(str(value), *rates, *moved, *(str(point.round_trips) for point in split))
    return table


def _overlap(report: OverlapReport) -> list[Table | str]:
    title = f"{report.model}, level {report.level}, prefill of {report.batch} x {report.tokens} tokens, {report.dtype}"
    table = _table(
        "delay each way, ms",
        *("micro-batches", "median ms", "p10 to p90", "enclave", "waiting", "worker", "hidden", "/ serial, no delay"),
        title=escape(title),
    )
    for point in report.points:
        table.add_row(
            f"{point.delay_ms:g}",
            f"{point.micro_batches}{' (serial)' if point.micro_batches == 1 else ''}",
            _ms(point.median_s),
            _spread(point.p10_s, point.p90_s),
            *map(_ms, (point.enclave_s, point.waited_s, point.worker_s)),
            "" if point.hidden is None else f"{point.hidden:.0%}",
            f"{point.times_undelayed:.2f}",
        )
    return [table]


def _decode(report: DecodeReport) -> list[Table | str]:
    from tsqp.bench.decode_page import PARTS, parts

    title = f"{report.model}, answers of {report.tokens} tokens, {report.dtype}, {report.threads} threads per process"
    rates = _table("variant", "requests", "tokens/s", "/ 1", "ms/step", "p10 to p90", title=escape(title))
    alone = {point.name: point.tokens_per_s for point in report.points if point.batch == 1}
    for point in report.points:
        gain = f"{point.tokens_per_s / alone[point.name]:.1f}" if point.batch > 1 else ""
        spread = _spread(point.p10_s, point.p90_s)
        rates.add_row(point.name, str(point.batch), f"{point.tokens_per_s:.1f}", gain, _ms(point.median_s), spread)
    names = [step.name if step.sampling == "greedy" else f"{step.name}, {step.sampling}" for step in report.steps]
    steps = _table("ms", *names, title=f"a step of {report.steps[0].batch} requests by part, with clocks inside")
    inner = [dict(parts(step)) for step in report.steps]
    for part in PARTS:
        steps.add_row(part, *(f"{values[part]:.2f}" for values in inner))
    steps.add_row("overhead, median", *(f"{step.overhead_s * 1e3:.2f}" for step in report.steps))
    pool = (
        f"masked had a pool of {report.mask_pool} tokens ({report.mask_pool_bytes / 1e6:,.0f} MB at most), full before "
        "each run and not filled during it. Sustained: the engine's own pool, filled as it always is."
    )
    return [rates, steps, pool]


def _transport(report: TransportReport) -> list[Table | str]:
    from tsqp.bench.transport_suite import SIZES, size_text

    table = _table(
        "round trip, us (p10 to p90)", *map(size_text, SIZES), title=f"medians, {report.rounds} turns of each"
    )
    for row in report.rows:
        cells = [f"{p.median_s * 1e6:.0f} ({p.p10_s * 1e6:.0f} to {p.p90_s * 1e6:.0f})" for p in row.points]
        table.add_row(escape(row.name), *(cells or [escape(row.missing)]))
    return [table]
