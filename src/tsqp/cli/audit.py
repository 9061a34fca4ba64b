"""``tsqp audit``: record what a worker and its dealers receive, attack it, and say what came out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tsqp import config as settings
from tsqp.cli.reporting import print_json, progress, reported
from tsqp.config import EnclaveConfig
from tsqp.errors import ConfigError, InputError
from tsqp.threads import set_threads, share_cores

if TYPE_CHECKING:
    from tsqp.audit.suite import Audit
    from tsqp.model.tokenizer import Tokenizer
    from tsqp.reports import AuditReport

_SIGNS = {True: "[green]ok[/]", False: "[bold red]WRONG[/]", None: ""}


def audit(
    model: Annotated[
        str | None, typer.Option(help="smollm2, a Hugging Face directory or a .gguf file.", show_default="smollm2")
    ] = None,
    level: Annotated[
        str | None, typer.Option(help="open, verified, masked or all.", show_default="all, unless --scheme is given")
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="A published scheme to break: rank-one, left-mixing, permutation, reused-masks, qk-scaling or all.",
            show_default="all, unless --level is given",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt.", show_default="a built-in letter")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page for people to this file.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Record what a worker and its dealers receive, attack it, and report what they could learn.

    Everything runs on this machine. The exit code is 1 if an attack that must succeed fails, or the reverse.
    """
    with reported(as_json=json):
        config = settings.load(EnclaveConfig, {"model": model, "threads": threads})
        report = _run(config, level, scheme, prompt, html)
        if json:
            print_json(report)
        else:
            _show(report)
    with reported(as_json=False):  # the report is out already; this adds one sentence and the exit code
        from tsqp.audit.suite import require_expected

        require_expected(report)


def _chosen(given: str | None, other: str | None, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    """Return what to audit: all by default, nothing where only the other option is given."""
    if given is None:
        return known if other is None else ()
    if given == "all":
        return known
    if given not in known:
        raise ConfigError(f"{option} {given!r}: expected one of {', '.join(known)}, or all.")
    return (given,)


def _run(
    config: EnclaveConfig, level: str | None, scheme: str | None, prompt: str | None, html: Path | None
) -> AuditReport:
    share_cores()
    from tsqp.audit import suite
    from tsqp.audit.capture import Capture
    from tsqp.audit.evidence import Attacker
    from tsqp.audit.prompts import prompt_ids, training_text_ids
    from tsqp.audit.public import PublicModel
    from tsqp.audit.scheme_checks import SCHEMES
    from tsqp.levels import open_model

    levels = _chosen(level, scheme, suite.LEVELS, "--level")
    schemes = _chosen(scheme, level, tuple(SCHEMES), "--scheme")
    if html is not None and not html.parent.is_dir():
        raise InputError(f"--html {html}: there is no directory {html.parent}.")
    threads = set_threads(config.threads)
    with progress() as step:
        opened = open_model(config.model, "open", step)
        ids = prompt_ids(opened.architecture, opened.tokenizer, prompt)
        evidence = Capture(config, ids, threads, step).evidence(levels, attention="qk-scaling" in schemes)
        public = PublicModel(opened.directory)
        attacker = Attacker(public, training_text_ids(opened.architecture, opened.tokenizer))
        done = suite.run(config.model, evidence, attacker, levels, schemes, lambda part: step("attacking", part))
    if html is not None:
        _write_page(html, done, opened.tokenizer)
    return done.report()


def _write_page(path: Path, done: Audit, tokenizer: Tokenizer | None) -> None:
    from tsqp.audit.page import page

    try:
        path.write_text(page(done, tokenizer), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}.") from error


def _show(report: AuditReport) -> None:
    from tsqp.audit.page import value_text

    console = Console(highlight=False)
    title = f"{report.model}: a prompt of {report.tokens} tokens, {report.distinct_tokens} distinct"
    table = Table("what was sent", "attack", "found", "expected", "", title=title)
    before = ""
    for finding in report.findings:
        if before and finding.subject != before:
            table.add_section()
        name = finding.subject if finding.subject != before else ""
        before = finding.subject
        table.add_row(name, escape(finding.attack), value_text(finding), finding.expected, _SIGNS[finding.ok])
    console.print(table)
    for each in report.simulated:
        console.print(f"simulated: {escape(each)}")
