"""How ``tsqp top`` looks: a few lines that fit a small terminal, and a bar for each part of the time."""

from __future__ import annotations

from collections.abc import Iterable

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from tsqp.reports import TopReport

_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400
_WIDE = 72
_SERVES = {"open": "float products", "exact": "exact products", "masks": "mask products"}
# Of the server's parts, what others do, and where they are the enclave's own.
_PARTS = {
    "worker": "waiting: worker",
    "wire": "waiting: wire",
    "rest": "enclave: rest",
    **{name: f"enclave: {name}" for name in ("attention", "quantise", "mask", "check", "ahead", "sampling")},
    "mask_wait": "waiting: masks",
    "mask_fill": "filling masks",
}
_TINY = 0.0005

# A name, a value, and whether it is one to look at.
Line = tuple[str, str, bool]


def view(report: TopReport, width: int, trouble: str = "") -> RenderableType:
    """Return what is shown of a report.

    Args:
        report: the newest.
        width: of the terminal, in columns.
        trouble: why there is no newer one; it is shown with the old numbers.
    """
    head = Text(f"{report.kind} ", style="bold")
    head.append(report.url, style="bold cyan")
    what = f"{report.model}, {_what(report)}, up {duration(report.uptime_s)}, {report.software}"
    lines: list[RenderableType] = [head, Text(what, no_wrap=True, overflow="ellipsis")]
    if trouble:
        lines.append(Text(f"no new numbers: {trouble}", style="bold red"))
    elif not report.ready:
        lines.append(Text(f"not ready: {report.reason or 'it does not say why'}", style="bold red"))
    numbers = list(_numbers(report))
    body = Group(Text(), _grid(numbers, width), Text(), _bars(report, width))
    return Group(*lines, Styled(body, "dim") if trouble else body)


def opening(url: str, interval_s: float) -> RenderableType:
    """Return what is shown until there is a first report."""
    return Text(f"{url}: the first numbers come in {interval_s:g} s; Ctrl-C ends.")


def duration(seconds: float) -> str:
    """Return a time in two units."""
    whole = int(seconds)
    for unit_s, name, smaller_s, smaller in (
        (_DAY_S, "d", _HOUR_S, "h"),
        (_HOUR_S, "h", _MINUTE_S, "min"),
        (_MINUTE_S, "min", 1, "s"),
    ):
        if whole >= unit_s:
            return f"{whole // unit_s} {name} {whole % unit_s // smaller_s} {smaller}"
    return f"{whole} s"


def _what(report: TopReport) -> str:
    if report.kind == "server":
        return f"level {report.serves}"
    return f"{_SERVES[report.serves]} in {report.dtype} on {report.device}"


def _numbers(report: TopReport) -> Iterable[Line]:
    yield "requests/s", number(report.requests_per_s), False
    yield from _of_server(report) if report.kind == "server" else _of_worker(report)


def _of_server(report: TopReport) -> Iterable[Line]:
    yield "tokens/s", f"{number(report.tokens_per_s)} generated, {number(report.prompt_tokens_per_s)} read", False
    yield "running", f"{report.running}, last step {report.batch:.0f} rows", False
    yield "waiting", f"{report.waiting}", False
    yield "KV cache", _share(report.cache_used), False
    if report.pool_wanted:
        yield "masks", f"{_share((report.pool_held or 0) / report.pool_wanted)} of {report.pool_wanted:,} rows", False
    if report.workers and report.workers > 1:
        used = report.workers_usable or 0
        yield "workers", f"{used} of {report.workers} in use", used < report.workers
    yield "from worker", size(report.bytes_in_per_s, "/s"), False
    yield "to worker", size(report.bytes_out_per_s, "/s"), False
    yield "errors", f"{report.errors:,}, {report.failed:,} generations failed", bool(report.errors or report.failed)
    yield "integrity", f"{report.integrity_failures} failures", bool(report.integrity_failures)


def _of_worker(report: TopReport) -> Iterable[Line]:
    yield "rows/s", number(report.rows_per_s), False
    yield "batch", _batch(report.batch), False
    yield "clients", f"{report.clients}", False
    yield "waiting", f"{report.waiting}, {size(report.waiting_bytes)}", False
    yield "received", size(report.bytes_in_per_s, "/s"), False
    yield "sent", size(report.bytes_out_per_s, "/s"), False
    yield "memory", f"{size(report.memory_bytes)} of {size(report.memory_total_bytes)}", False
    yield "errors", f"{report.errors:,}, {report.refused:,} refused", bool(report.errors or report.refused)


def _batch(requests: float) -> str:
    if not requests:
        return "-"
    return "1 request a product" if requests == 1 else f"{number(requests)} requests a product"


def _grid(numbers: list[Line], width: int) -> Table:
    """Lay names and numbers out in two columns, or in one where there is no room for two."""
    table = Table.grid(padding=(0, 2))
    columns = 2 if width >= _WIDE else 1
    for _ in range(columns):
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(no_wrap=True, min_width=26 if columns > 1 else None)
    rows = (len(numbers) + columns - 1) // columns
    for place in range(rows):
        cells: list[Text] = []
        for name, value, alarming in numbers[place::rows]:
            cells += [Text(name), Text(value, style="bold red" if alarming else "")]
        table.add_row(*cells)
    return table


def _bars(report: TopReport, width: int) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True)
    for name, share in report.parts.items():
        if share < _TINY and name != "idle":
            continue
        shown = min(1.0, share)
        bar = Bar(1.0, 0.0, shown, width=max(4, min(50, width - 27)), color="default" if name == "idle" else "green")
        table.add_row(_PARTS.get(name, name), f"{share:.1%}", bar)
    return table


def number(value: float | None) -> str:
    """Return a rate with as many digits as mean something."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.2f}"  # noqa: PLR2004


def size(count: float | None, unit: str = "") -> str:
    """Return bytes, with a prefix."""
    return "-" if count is None else f"{decimal(round(count))}{unit}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
