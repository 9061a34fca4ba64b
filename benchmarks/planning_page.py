"""Rewrite the blocks of docs/planning.md: plans by the command that each names, errors by the newest check.

python benchmarks/planning_page.py
"""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import msgspec
from rich.console import Console
from typer.testing import CliRunner

from tsqp.cli import app
from tsqp.cli.plan_tables import show, show_check
from tsqp.plan.reports import PlanCheckReport, PlanReport

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "planning.md"
PLAN = re.compile(r"(    (tsqp plan [^\n]*)\n\n<!-- plan -->\n).*?(<!-- /plan -->)", re.DOTALL)
CHECK = re.compile(r"(<!-- check -->\n).*?(<!-- /check -->)", re.DOTALL)
WIDTH = 118


def newest() -> PlanCheckReport:
    """Return the newest check."""
    path = max((ROOT / "benchmarks" / "results").glob("plan-*.json"))
    return msgspec.json.decode(path.read_bytes(), type=PlanCheckReport)


def planned(command: str) -> PlanReport:
    """Return what a command line plans."""
    words = shlex.split(command)[1:]
    done = CliRunner().invoke(app, [*words, "--json"])
    if done.exit_code:
        raise SystemExit(f"{command}: {done.stdout}")
    return msgspec.json.decode(done.stdout, type=PlanReport)


def console() -> Console:
    """Return a terminal that is a text."""
    return Console(file=io.StringIO(), width=WIDTH, highlight=False, no_color=True)


def fenced(out: Console) -> str:
    """Return what was printed as a block of a page."""
    file = out.file
    text = file.getvalue() if isinstance(file, io.StringIO) else ""
    lines = [line.rstrip() for line in text.splitlines()]
    kept = [line for at, line in enumerate(lines) if line or (at and lines[at - 1])]
    return "```text\n" + "\n".join(kept).strip("\n") + "\n```\n"


def page(text: str) -> str:
    """Return the page with its blocks made anew."""

    def plan(match: re.Match[str]) -> str:
        out = console()
        show(planned(match[2]), out)
        return match[1] + fenced(out) + match[3]

    def check(match: re.Match[str]) -> str:
        out = console()
        show_check(newest(), out)
        return match[1] + fenced(out) + match[2]

    return CHECK.sub(check, PLAN.sub(plan, text))


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
