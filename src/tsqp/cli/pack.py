"""``tsqp pack``: write the int8 form of a model that the levels with exact arithmetic use."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from tsqp import config as settings
from tsqp.cli.reporting import print_json, progress, reported
from tsqp.config import EnclaveConfig
from tsqp.reports import PackReport


def pack(
    out: Annotated[Path, typer.Option(help="The directory to create; it must not exist yet.")],
    model: Annotated[
        str | None,
        typer.Option(help="smollm2, a Hugging Face directory or a .gguf file.", show_default="smollm2"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model's int8 codes for the worker, and everything else of it for the enclave.

    Give worker/ to whoever computes, keep enclave/ inside.
    """
    with reported(as_json=json):
        report = _run(settings.load(EnclaveConfig, {"model": model}).model, out)
        if json:
            print_json(report)
        else:
            _show(report)


def _run(model: str, out: Path) -> PackReport:
    from tsqp.model import locate
    from tsqp.model import pack as packing

    started = time.monotonic()
    packing.refuse_existing(out)
    with progress() as step:
        source = locate.locate(model, lambda done: step("converting the model", done))
        licences = locate.licence_directory(model)
        manifest = packing.pack(
            source, locate.model_name(model), out, lambda done: step("packing the model", done), licences=licences
        )
    return PackReport(
        model=manifest.model,
        out=str(out),
        source_digest=manifest.source_digest,
        codes_digest=manifest.codes_digest,
        manifest_digest=manifest.digest,
        groups=len(manifest.groups),
        worker_bytes=_size(out / "worker"),
        enclave_bytes=_size(out / "enclave"),
        licence_files=[path.name for path in packing.licence_files(out / "enclave")],
        seconds=time.monotonic() - started,
    )


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _show(report: PackReport) -> None:
    typer.echo(f"{report.model} packed into {report.out} in {report.seconds:.1f} s")
    typer.echo(f"worker/   {report.worker_bytes / 1e6:.1f} MB, {report.groups} linear groups of int8 codes")
    typer.echo(f"enclave/  {report.enclave_bytes / 1e6:.1f} MB: scales, norms, embedding table, tokenizer")
    typer.echo(f"codes     {report.codes_digest}")
    typer.echo(f"manifest  {report.manifest_digest}")
    if report.licence_files:
        typer.echo(f"licence   copied: {', '.join(report.licence_files)}")
    else:
        typer.echo("licence   no licence file was found beside the model; check its terms before you pass it on")
