"""``tsqp doctor``: look at this machine and say what would stop TSQP, and what to do about it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tsqp import config as settings
from tsqp.cli.reporting import print_json, reported
from tsqp.config import WorkerConfig
from tsqp.errors import SetupError

_SIGNS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "fail": "[red]fail[/]"}


def doctor(
    model: Annotated[
        str | None, typer.Option(help="smollm2, a Hugging Face directory or a .gguf file.", show_default="smollm2")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="float32")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check Python, torch, CUDA, the model, port, memory, shared memory, SGX and Gramine, and advise on each."""
    with reported(as_json=json):
        config = settings.load(WorkerConfig, {"model": model, "dtype": dtype})
        from tsqp.doctor import examine

        report = examine(config)
        if json:
            print_json(report)
        else:
            table = Table("check", "", "found", "what to do", show_lines=False)
            for check in report.checks:
                table.add_row(check.name, _SIGNS[check.status], escape(check.found), escape(check.advice))
            Console(highlight=False).print(table)
        if not report.ok:
            raise typer.Exit(SetupError.exit_code)
