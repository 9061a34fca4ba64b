"""What ``tsqp plan`` shows on a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tsqp.plan.reports import PlanCheckReport, PlanReport


def show(report: PlanReport, console: Console | None = None) -> None:
    """Print a plan: what is planned, per token, the machines, how busy they are, and what they cost."""
    out = console or Console(highlight=False)
    level = f"{report.level}, {report.dtype}" if report.level == "open" else report.level
    out.print(
        f"{escape(report.model)} at {level}: {report.users:,} users, {report.tokens_s:g} tokens/s each, context "
        f"{report.context:,} ({report.prompt:,} of it prompt)",
        soft_wrap=True,
    )
    out.print(
        f"{escape(report.gpu)}, hosts with {report.enclave_cores} cores, links of {report.link_gbps:g} Gbit/s, "
        f"{report.latency_ms:g} ms there and back",
        soft_wrap=True,
    )
    for table in (_token(report), _machines(report), _loads(report), _costs(report)):
        out.print(table)
    first = report.loads[0]
    out.print(f"Saturates first: {first.name}, at {first.share:.0%}.", soft_wrap=True)
    for sentence in report.assumptions:
        out.print(f"- {escape(sentence)}", soft_wrap=True)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    return table


def _token(report: PlanReport) -> Table:
    step, table = report.step, _table("per token of an answer", "")
    table.add_row("requests that share a step", f"{step.requests}")
    table.add_row("round trips, of a step and per token", f"{step.round_trips}, {report.round_trips_per_token:.3g}")
    table.add_row("bytes to the worker", _size(report.sent_per_token))
    table.add_row("bytes from the worker", _size(report.received_per_token))
    if step.masks_received:
        table.add_row("bytes from dealers", _size(step.masks_received / step.requests))
    table.add_row("enclave, seconds of one core", _time(report.enclave_s_per_token))
    table.add_row("GPU of the worker", _time(report.gpu_s_per_token))
    table.add_row("time of a step", _time(step.time_s))
    table.add_row("tokens/s that one user could get", f"{report.most_tokens_s:.3g}")
    table.add_row("time to the first token", _time(report.first_token_s))
    return table


def _machines(report: PlanReport) -> Table:
    table = _table("machines", "")
    table.add_row("enclaves", f"{report.enclaves:,}")
    table.add_row("hosts of enclaves", f"{report.hosts:,} ({report.per_host} on each)")
    table.add_row("memory of an enclave", _size(report.enclave_bytes))
    table.add_row("of it keys and values", _size(report.kv_bytes))
    table.add_row("workers", f"{report.workers:,} of {_gpus(report)}")
    if report.dealers:
        table.add_row("dealers", f"{report.dealers:,} of {_gpus(report)}")
    if report.mask_products_s:
        table.add_row("mask products a second", f"{report.mask_products_s:.3g} ({_size(report.mask_bytes_s)}/s)")
    table.add_row("links", f"{report.links:,}")
    return table


def _loads(report: PlanReport) -> Table:
    table = _table("busy, the most first", "used", "could do")
    for load in report.loads:
        table.add_row(load.name, f"{load.share:.0%}", f"{load.times:,.3g} x")
    return table


def _costs(report: PlanReport) -> Table:
    table = _table(f"cost of an hour, {escape(report.currency)}", "count", "each", "together")
    for cost in report.costs:
        table.add_row(cost.name, f"{cost.count:,.0f}", f"{cost.price_hour:g}", f"{cost.cost_hour:,.2f}")
    table.add_row("all of it", "", "", f"{report.cost_hour:,.2f}")
    table.add_row("a million tokens", "", "", f"{report.cost_per_million_tokens:,.2f}")
    return table


def show_check(report: PlanCheckReport, console: Console | None = None) -> None:
    """Print what was predicted beside what was measured."""
    out = console or Console(highlight=False)
    table = _table("model", "level", "step", "predicted", "measured", "error", "enclave", "worker")
    for point in report.points:
        what = f"prefill of {point.size}" if point.kind == "prefill" else f"{point.size} answers"
        mark = "" if abs(point.error) <= report.limit else " [bold red]![/]"
        table.add_row(
            escape(point.model),
            point.level,
            what,
            _time(point.predicted_s),
            _time(point.measured_s),
            f"{point.error:+.0%}{mark}",
            f"{point.enclave_error:+.0%}",
            f"{point.worker_error:+.0%}",
        )
    out.print(table)
    within = sum(abs(point.error) <= report.limit for point in report.points)
    out.print(
        f"{within} of {len(report.points)} within {report.limit:.0%}; seconds of one core; {report.rounds} turns."
    )
    out.print(f"{escape(report.hardware.cpu)}; commit {report.commit}; {escape(report.command)}", soft_wrap=True)


def _gpus(report: PlanReport) -> str:
    return f"{report.gpus} x {escape(report.gpu)}" if report.gpus > 1 else escape(report.gpu)


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:,.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count:,.0f} B"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"  # noqa: PLR2004
