"""``tsqp keys``: make key pairs for encrypted links, and show their public part."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tsqp.cli.reporting import print_json, reported
from tsqp.reports import KeysReport
from tsqp.transport.keys import SECRET_SUFFIX, create, read_public

keys = typer.Typer(name="keys", help="Make key pairs for encrypted links, and show public keys.", no_args_is_help=True)


@keys.command()
def new(
    name: Annotated[str, typer.Argument(help="The files will be NAME.key and NAME.key_secret.")],
    out: Annotated[Path, typer.Option(help="The directory to write them to.")] = Path(),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a key pair: NAME.key to hand out, NAME.key_secret (mode 0600) to keep. Never overwrites a file."""
    with reported(as_json=json):
        public, secret = create(out, name)
        report = KeysReport(
            name=name, public_key=read_public(public).decode(), public_file=str(public), secret_file=str(secret)
        )
        if json:
            print_json(report)
        else:
            typer.echo(report.public_key)
            typer.echo(f"give {public} or the line above to others; keep {secret} to yourself")


@keys.command()
def show(
    file: Annotated[Path, typer.Argument(help="NAME.key or NAME.key_secret.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the public key of a key file, of either kind; never the secret one."""
    with reported(as_json=json):
        public_key = read_public(file).decode()
        if json:
            kept = file.suffix == SECRET_SUFFIX
            print_json(
                KeysReport(
                    name=file.stem,
                    public_key=public_key,
                    public_file=None if kept else str(file),
                    secret_file=str(file) if kept else None,
                )
            )
        else:
            typer.echo(public_key)
