"""What every command shares: errors as one sentence, JSON on standard output, progress on standard error."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as RichProgress
from rich.progress import TaskID

from tsqp import logs, reports
from tsqp.errors import ConfigError, TsqpError
from tsqp.reports import ErrorDetail, ErrorReport

INTERRUPTED = 130

notes = Console(stderr=True, highlight=False)
_notices = logging.getLogger(logs.NOTICES)


def notice(sentence: str) -> None:
    """Tell who started the program something: in the log, where there is one, else as a line on standard error."""
    if logs.form():
        _notices.info("%s", sentence)
    else:
        notes.print(escape(sentence), soft_wrap=True)


def print_json(report: msgspec.Struct) -> None:
    """Print a report as one line on standard output and pass it on at once."""
    sys.stdout.write(reports.dumps(report) + "\n")
    sys.stdout.flush()


def error_report(error: TsqpError) -> ErrorReport:
    """Return an error as ``--json`` prints it."""
    return ErrorReport(error=ErrorDetail(type=type(error).__name__, message=str(error), exit_code=error.exit_code))


@contextmanager
def reported(*, as_json: bool) -> Iterator[None]:
    """Turn errors raised on purpose into one sentence and an exit code; anything else is a bug and shows as one."""
    try:
        yield
    except TsqpError as error:
        if as_json:
            print_json(error_report(error))
        if logs.form() == "json":
            _notices.error("%s", error)
        else:
            notes.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        notice("stopped.")
        raise typer.Exit(INTERRUPTED) from error


def pool_rows(text: str | None) -> int | None:
    """Read ``--mask-pool``; a name of a file gets an answer of its own."""
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    if text.removeprefix("-").isdecimal():
        raise ConfigError(f"--mask-pool {text}: expected a number of rows, 0 or more.")
    raise ConfigError(
        f"--mask-pool {text}: expected a number of rows. The pool is key material: it lives in memory only and cannot "
        "be kept in a file."
    )


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """Show named steps: bars on a terminal, one line per step that takes over a second elsewhere."""
    if not notes.is_terminal:
        yield _Lines().step
        return
    with RichProgress(console=notes, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def step(name: str, done: float) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=1.0)
            bars.update(tasks[name], completed=done, visible=done < 1.0)

        yield step


class _Lines:
    """Progress for logs: says that a step goes on once it has taken a second, and when it is done."""

    _QUIET_S = 1.0

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._shown: set[str] = set()

    def step(self, name: str, done: float) -> None:
        started = self._started.setdefault(name, time.monotonic())
        elapsed = time.monotonic() - started
        if name not in self._shown and done < 1.0 and elapsed > self._QUIET_S:
            self._shown.add(name)
            notice(f"{name} … {done:.0%}")
        if name in self._shown and done >= 1.0:
            notice(f"{name}: done in {elapsed:.1f} s")
