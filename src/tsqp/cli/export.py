"""``tsqp export``: write the linear layers of any Hugging Face decoder, for a worker that multiplies them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from tsqp import config as settings
from tsqp.cli.reporting import print_json, progress, reported
from tsqp.config import DTYPES, EnclaveConfig
from tsqp.errors import ConfigError
from tsqp.reports import ExportReport


def export(
    out: Annotated[Path, typer.Option(help="The directory to create; it must not exist yet.")],
    model: Annotated[
        str | None,
        typer.Option(help="A Hugging Face directory of any decoder, smollm2 or a .gguf file.", show_default="smollm2"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16: of the model where it is attached.", show_default="as stored"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write any decoder's linear layers for workers, by module, for tsqp.attach.

    Give floats/ to a worker at open, worker/ to one at verified and masked and to dealers.
    """
    with reported(as_json=json):
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
        report = _run(settings.load(EnclaveConfig, {"model": model}).model, dtype, out)
        if json:
            print_json(report)
        else:
            _show(report)


def _run(name: str, dtype: str | None, out: Path) -> ExportReport:
    from tsqp.decoder.loading import load_decoder
    from tsqp.decoder.survey import survey
    from tsqp.model import locate
    from tsqp.model.linear_map import FLOATS, write_map
    from tsqp.model.manifest import WORKER
    from tsqp.model.pack import refuse_existing

    started = time.monotonic()
    refuse_existing(out)
    with progress() as step:
        directory = locate.locate(name, lambda done: step("converting the model", done))
        step("loading the model", 0.0)
        found = load_decoder(directory, dtype)
        step("loading the model", 1.0)
        surveyed = survey(found)
        manifest = write_map(
            surveyed.weights(), locate.model_name(name), out, lambda done: step("writing the linear map", done)
        )
    return ExportReport(
        model=manifest.model,
        out=str(out),
        dtype=str(found.dtype).removeprefix("torch."),
        source_digest=manifest.source_digest,
        codes_digest=manifest.codes_digest,
        manifest_digest=manifest.digest,
        groups=len(manifest.groups),
        moved=list(surveyed.moved),
        stayed=surveyed.stayed,
        worker_bytes=_size(out / WORKER),
        floats_bytes=_size(out / FLOATS),
        seconds=time.monotonic() - started,
    )


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _show(report: ExportReport) -> None:
    typer.echo(f"{report.model} exported to {report.out} in {report.seconds:.1f} s")
    typer.echo(f"moved     {len(report.moved)} modules in {report.groups} groups")
    for path, why in report.stayed.items():
        typer.echo(f"stayed    {path}: {why}")
    typer.echo(f"worker/   {report.worker_bytes / 1e6:.1f} MB of int8 codes, digest {report.codes_digest}")
    typer.echo(f"floats/   {report.floats_bytes / 1e6:.1f} MB in {report.dtype}, digest {report.source_digest}")
    typer.echo(f"manifest  {report.manifest_digest}")
