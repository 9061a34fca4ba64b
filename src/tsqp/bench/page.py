"""A page for people out of any report of ``tsqp bench``: what was measured, against which limits, as tables and plots.

Every text is escaped, and the page makes no request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tsqp.audit.page_style import STYLE as BASE_STYLE
from tsqp.bench import decode_page
from tsqp.bench.page_parts import ms, section, table
from tsqp.bench.page_style import SKELETON, STYLE
from tsqp.bench.svg import Axis, Bar, Line, legend, lines, log_bars, stacked_bars
from tsqp.bench.transport_suite import SIZES, size_text
from tsqp.errors import InputError
from tsqp.measurements import (
    BenchReport,
    DecodeReport,
    LevelsReport,
    Measurement,
    OverlapPoint,
    OverlapReport,
    Ratio,
    ScalingPoint,
    ScalingReport,
    TransportReport,
    Variant,
)

# In the order of their colours, so that worker, wire and what is not split have the same ones on every page.
_SIMPLE_PARTS = ("enclave", "worker", "wire", "not split", "PCIe")
_PROTECTION = ("quantise", "mask", "ahead", "check")
_PARTS = ("attention and rest", *_SIMPLE_PARTS[1:], *_PROTECTION)

Sections = Callable[[Any], list[str]]


def write(path: Path, report: Measurement) -> None:
    """Write a report's page.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.write_text(page(report), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}.") from error


def page(report: Measurement) -> str:
    """Return the page as one HTML document."""
    kinds: dict[type[Measurement], tuple[str, Sections]] = {
        BenchReport: ("Prefill at every level", _prefill),
        LevelsReport: ("Where each level's time goes", _levels),
        ScalingReport: ("Prefill by size", _scaling),
        OverlapReport: ("What overlap hides of a slow link", _overlap),
        DecodeReport: ("Generation, one request and many", decode_page.sections),
        TransportReport: ("Round trips by transport", _transport),
    }
    title, sections = kinds[type(report)]
    judged = [each for each in report.ratios if each.ok is not None]
    others = [each for each in report.ratios if each.ok is None]
    body = [
        f"<h1>{escape(title)}</h1>",
        _facts(report),
        _ratios("Limits", "Ratios between medians of this run, and what is promised of them.", judged),
        *sections(report),
        _ratios("Other ratios", "Of which nothing is promised.", others),
    ]
    return SKELETON.format(title=escape(f"TSQP: {title}"), style=BASE_STYLE + STYLE, body="\n".join(body))


def _facts(report: Measurement) -> str:
    machine = report.hardware
    facts = {
        "machine": f"{machine.cpu}, {machine.cores} cores, {machine.memory_gb:g} GB",
        **({"GPU": machine.gpu} if machine.gpu else {}),
        "software": f"torch {machine.torch}, Python {machine.python}, commit {report.commit}",
        "date": report.date,
        "command": report.command,
    }
    for name in ("model", "level", "dtype", "threads", "rounds"):
        if hasattr(report, name):
            facts[name] = str(getattr(report, name))
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<div class="card"><dl class="facts">{listed}</dl></div>'


def _ratios(title: str, text: str, ratios: Sequence[Ratio]) -> str:
    if not ratios:
        return ""
    verdicts = {True: '<span class="ok">✓ holds</span>', False: '<span class="wrongly">✗ missed</span>', None: ""}
    rows = "".join(
        f"<tr><td>{escape(each.name)}</td><td class=n>{each.value:.2f}</td><td class=n>{escape(each.limit)}</td>"
        f"<td>{verdicts[each.ok]}</td></tr>"
        for each in ratios
    )
    head = "<tr><th>ratio</th><th class=n>value</th><th class=n>limit</th><th></th></tr>"
    whole = f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    return section(title, text, whole)


def _busy(variant: Variant) -> list[tuple[str, float]]:
    """Return worker, PCIe and wire in milliseconds, as long together as the enclave waited: overlap hides the rest."""
    waited_s = variant.waited_s or variant.worker_s + variant.wire_s
    worker_s = min(variant.worker_s, waited_s)
    pcie_s = worker_s * variant.pcie_s / variant.worker_s
    found = (("worker", worker_s - pcie_s), ("PCIe", pcie_s), ("wire", waited_s - worker_s))
    return [(name, seconds * 1e3) for name, seconds in found if seconds]


def _key(parts: Sequence[str], bars: Sequence[Bar]) -> str:
    """Return the legend of those parts that occur."""
    shown = {name for bar in bars for name, value in bar.parts if value}
    return legend([name if name in shown else "" for name in parts])


def _bar(variant: Variant) -> Bar:
    if not variant.worker_s:
        return Bar(variant.name, [("not split", variant.median_s * 1e3)], f"{ms(variant.median_s)} ms")
    return Bar(variant.name, [("enclave", variant.enclave_s * 1e3), *_busy(variant)], f"{ms(variant.median_s)} ms")


def _prefill(report: BenchReport) -> list[str]:
    times = [_bar(variant) for variant in report.variants]
    moved = [each for each in report.variants if each.round_trips]
    kilobytes = [
        Bar(each.name, [("", each.bytes_per_token / 1e3)], f"{each.bytes_per_token / 1e3:.0f} KB") for each in moved
    ]
    trips = [Bar(each.name, [("", float(each.round_trips))], str(each.round_trips)) for each in moved]
    return [
        section(
            f"Prefill of {report.tokens} tokens",
            "Milliseconds. Of the worker's part only what the enclave waited for is shown.",
            stacked_bars(times, _SIMPLE_PARTS, "time by part"),
            _key(_SIMPLE_PARTS, times),
        ),
        section(
            "Bytes per token", "Kilobytes, both directions.", stacked_bars(kilobytes, ("",), "kilobytes per token")
        ),
        section("Round trips", "Of one prefill.", stacked_bars(trips, ("",), "round trips")),
        section(
            "Every variant",
            "Medians of all runs; parts are those of the run nearest the median.",
            _variants(report.variants),
        ),
    ]


def _variants(variants: Sequence[Variant]) -> str:
    rows = [
        [
            variant.name,
            ms(variant.median_s),
            f"{ms(variant.p10_s)} to {ms(variant.p90_s)}",
            *(map(ms, (variant.enclave_s, variant.waited_s, variant.worker_s)) if variant.worker_s else ("", "", "")),
            f"{variant.bytes_per_token / 1e3:.0f}" if variant.round_trips else "",
            str(variant.round_trips or ""),
        ]
        for variant in variants
    ]
    headings = ("variant", "median, ms", "p10 to p90", "enclave", "waiting", "worker", "KB per token", "round trips")
    return table(headings, rows)


def _inner(variant: Variant) -> list[tuple[str, float]]:
    """Return a level's parts, in milliseconds; they add up to its time."""
    if not variant.worker_s:
        return [("not split", variant.median_s * 1e3)]
    rest_s = variant.enclave_s - variant.protection_s
    values = (variant.quantise_s, variant.mask_s, variant.ahead_s, variant.check_s, rest_s)
    inner = zip((*_PROTECTION, _PARTS[0]), values, strict=True)
    return [*((name, value * 1e3) for name, value in inner), *_busy(variant)]


def _levels(report: LevelsReport) -> list[str]:
    bars = [
        Bar(each.name, _inner(each), f"{ms(each.median_s)} ms", each.floor.overlapped_s * 1e3 if each.floor else None)
        for each in report.variants
    ]
    floored = [(each, each.floor) for each in report.variants if each.floor]
    rows = [
        [variant.name, name, ms(actual_s), ms(floor_s), f"{actual_s / floor_s:.2f}" if floor_s and actual_s else ""]
        for variant, floor in floored
        for name, actual_s, floor_s in (
            ("quantise", variant.quantise_s, floor.quantise_s),
            ("mask", variant.mask_s, floor.mask_s),
            ("ahead", variant.ahead_s, floor.ahead_s),
            ("check", variant.check_s, floor.check_s),
            ("attention and rest", variant.enclave_s - variant.protection_s - variant.mask_wait_s, floor.rest_s),
            ("worker", variant.worker_s - variant.pcie_s, floor.worker_s),
            ("PCIe", variant.pcie_s, 0.0),
            ("wire", variant.wire_s, floor.wire_s),
            ("whole, parts overlapped", variant.median_s, floor.overlapped_s),
            ("whole, one after the other", variant.median_s, floor.serial_s),
        )
        if actual_s or floor_s
    ]
    return [
        section(
            f"Prefill of {report.tokens} tokens, by part",
            "Milliseconds. The line across a bar is the level's floor with overlap: the largest floor of its parts.",
            stacked_bars(bars, _PARTS, "time by part"),
            _key(_PARTS, bars),
        ),
        section(
            "Floors",
            "Each part alone, in one process with warm caches, in the same run. The wire's floor is computed from "
            f"{report.copy_bytes_per_s / 1e9:.1f} GB/s of memory copied and {report.round_trip_s * 1e6:.0f} us per "
            "round trip of 4 KB.",
            table(("level", "part", "measured, ms", "floor, ms", "distance"), rows, words=2),
        ),
    ]


def _lines(
    points: Sequence[ScalingPoint], size: Callable[[ScalingPoint], int], value: Callable[[ScalingPoint], float]
) -> list[Line]:
    levels = list(dict.fromkeys(point.level for point in points))
    return [
        Line(level, [(size(each), value(each)) for each in points if each.level == level and value(each)])
        for level in levels
    ]


def _scaling(report: ScalingReport) -> list[str]:
    sections = []
    for points, what, size in (
        (report.lengths, "prompt length, tokens", _tokens),
        (report.batches, f"number of prompts of {report.batch_tokens} tokens", _batch),
    ):
        x = Axis(what, log=True, write=lambda value: f"{value:g}", ticks=list(dict.fromkeys(map(size, points))))
        for title, value in (
            ("Tokens per second", lambda point: point.tokens_per_s),
            ("Kilobytes per token", lambda point: point.bytes_per_token / 1e3),
            ("Round trips of a prefill", lambda point: float(point.round_trips)),
        ):
            series = _lines(points, size, value)
            key = legend([line.name if line.points else "" for line in series])
            sections.append(section(f"{title} over {what}", "", lines(series, x, Axis(title)), key))
    rows = [
        [
            point.level,
            str(point.tokens),
            str(point.batch),
            ms(point.median_s),
            f"{ms(point.p10_s)} to {ms(point.p90_s)}",
            f"{point.tokens_per_s:.0f}",
            f"{point.bytes_per_token / 1e3:.0f}" if point.round_trips else "",
            str(point.round_trips or ""),
            "" if point.masks_ready else "made within",
        ]
        for point in (*report.lengths, *report.batches)
    ]
    headings = ("level", "tokens", "prompts", "median, ms", "p10 to p90", "tokens/s", "KB per token", "trips", "masks")
    text = f"Masks were ready for {report.mask_pool} tokens; beyond that they were made within the prefill."
    return [*sections, section("Every size", text, table(headings, rows))]


def _tokens(point: ScalingPoint) -> int:
    return point.tokens


def _batch(point: ScalingPoint) -> int:
    return point.batch


def _overlap(report: OverlapReport) -> list[str]:
    delays = list(dict.fromkeys(point.delay_ms for point in report.points))
    counts = list(dict.fromkeys(point.micro_batches for point in report.points))
    series = [
        Line(
            f"{delay:g} ms each way",
            [(each.micro_batches, each.median_s * 1e3) for each in report.points if each.delay_ms == delay],
        )
        for delay in delays
    ]
    x = Axis("micro-batches", log=True, write=lambda value: f"{value:g}", ticks=counts)
    return [
        section(
            f"Prefill of {report.batch} x {report.tokens} tokens, milliseconds",
            "One micro-batch is serial: the enclave waits for each product. With more, it computes meanwhile.",
            lines(series, x, Axis("milliseconds")),
            legend([line.name for line in series]),
        ),
        section(
            "Every delay",
            "Hidden: the part of what the delay costs a serial prefill that the micro-batches save.",
            _delays(report.points),
        ),
    ]


def _delays(points: Sequence[OverlapPoint]) -> str:
    rows = [
        [
            f"{point.delay_ms:g}",
            str(point.micro_batches),
            ms(point.median_s),
            f"{ms(point.p10_s)} to {ms(point.p90_s)}",
            *map(ms, (point.enclave_s, point.waited_s, point.worker_s)),
            "" if point.hidden is None else f"{point.hidden:.0%}",
            f"{point.times_undelayed:.2f}",
        ]
        for point in points
    ]
    parts = ("enclave", "waiting", "worker", "hidden", "/ undelayed")
    return table(("delay, ms", "parts", "median, ms", "p10 to p90", *parts), rows)


def _transport(report: TransportReport) -> list[str]:
    sections = []
    for size in SIZES:
        measured = [
            (row.name, point.median_s * 1e6) for row in report.rows for point in row.points if point.bytes == size
        ]
        bars = [(name, value, f"{value:,.0f} us") for name, value in measured]
        sections.append(
            section(f"{size_text(size)} each way", "Microseconds, logarithmic.", log_bars(bars, size_text(size)))
        )
    rows = [
        [
            f"{row.name}: {row.settings}",
            *[f"{p.median_s * 1e6:,.0f} ({p.p10_s * 1e6:,.0f} to {p.p90_s * 1e6:,.0f})" for p in row.points],
            *([row.missing, *[""] * (len(SIZES) - 1)] if not row.points else []),
        ]
        for row in report.rows
    ]
    headings = ("median, us (p10 to p90)", *map(size_text, SIZES))
    return [
        *sections,
        section("Every transport", f"{report.rounds} turns of each, four round trips a turn.", table(headings, rows)),
    ]
