"""``tsqp verify``: check what a server is before anything is sent to it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tsqp.cli.reporting import print_json, reported


def verify(
    url: Annotated[str, typer.Argument(help="https://HOST:PORT of a 'tsqp serve'.", show_default=False)],
    policy: Annotated[str, typer.Option(help="What is accepted: a file of TOML.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check that a server is the enclave that a policy asks for. It is, or an error says what is not as it must be."""
    with reported(as_json=json):
        from tsqp.client import AttestedServer

        report = AttestedServer(url, policy).report()
        if json:
            print_json(report)
            return
        table = Table(title=escape(f"{url} is what the policy asks for"), show_header=False)
        table.add_row("TEE", {"sgx": "SGX enclave", "tdx": "TDX guest"}[report.tee])
        table.add_row("TCB status", " ".join((report.tcb_status, *report.advisories)))
        for name, value in {**report.measurements, **report.claims}.items():
            table.add_row(name, escape(value if isinstance(value, str) else ", ".join(each or "-" for each in value)))
        Console(highlight=False).print(table)
