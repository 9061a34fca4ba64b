"""``tsqp size``: how large an SGX enclave must be for a model."""

from __future__ import annotations

from typing import Annotated

import typer

from tsqp import config as settings
from tsqp.cli.reporting import print_json, reported
from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.reports import SizePart, SizeReport

DEFAULT_LEVEL = "masked"
DEFAULT_THREADS = 4


def size(
    model: Annotated[
        str | None,
        typer.Option(
            help="smollm2, a Hugging Face directory (its config.json is enough), a .gguf file or a packed model.",
            show_default="smollm2",
        ),
    ] = None,
    level: Annotated[
        str | None, typer.Option(help="masked, verified, local or open.", show_default=DEFAULT_LEVEL)
    ] = None,
    dealer: Annotated[
        list[str] | None, typer.Option(help="masked: a dealer's address, repeatable.", show_default="none")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="float32")] = None,
    mask_memory: Annotated[
        int | None, typer.Option(help="Bytes that the mask pool may take.", show_default="1 GiB")
    ] = None,
    kv_memory: Annotated[int | None, typer.Option(help="Bytes for keys and values.", show_default="1 GiB")] = None,
    max_running: Annotated[
        int | None, typer.Option(help="Requests that are generated together.", show_default="64")
    ] = None,
    step_tokens: Annotated[int | None, typer.Option(help="Tokens that a step computes.", show_default="256")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads that compute.", show_default="4")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say how large an SGX enclave must be for a model, how many threads it must allow, and what takes the memory."""
    with reported(as_json=json):
        enclave = settings.load(
            EnclaveConfig,
            {
                "model": model,
                "level": level,
                "dealers": tuple(dealer) if dealer else None,
                "dtype": dtype,
                "mask_memory": mask_memory,
                "threads": threads,
            },
            defaults={"level": DEFAULT_LEVEL, "threads": DEFAULT_THREADS},
        )
        flags = {"kv_memory": kv_memory, "max_running": max_running, "step_tokens": step_tokens}
        report = report_of(enclave, settings.load(EngineConfig, flags))
        if json:
            print_json(report)
        else:
            _show(report)


def report_of(enclave: EnclaveConfig, engine: EngineConfig) -> SizeReport:
    """Size an enclave.

    Raises:
        TsqpError: the model cannot be read, or as ``sizing.enclave_size``.
    """
    from tsqp.model.locate import model_name
    from tsqp.model.shape import shape_of
    from tsqp.sizing import enclave_size

    threads = enclave.threads or DEFAULT_THREADS
    shape = shape_of(enclave.model)
    found = enclave_size(
        shape.architecture,
        enclave,
        engine,
        threads=threads,
        embedding_item_bytes=shape.embedding_item_bytes,
        packed=shape.packed,
    )
    return SizeReport(
        model=model_name(enclave.model),
        level=enclave.level,
        threads=threads,
        max_running=engine.max_running,
        parts=[SizePart(name=name, bytes=part) for name, part in found.parts.items()],
        needed_bytes=found.needed_bytes,
        enclave_bytes=found.enclave_bytes,
        enclave_size=f"{found.enclave_bytes >> 20}M"
        if found.enclave_bytes < 1 << 30
        else f"{found.enclave_bytes >> 30}G",
        max_threads=found.max_threads,
    )


def _show(report: SizeReport) -> None:
    for part in report.parts:
        typer.echo(f"{part.name:<16} {part.bytes / 1e6:>9.1f} MB")
    typer.echo(f"{'together':<16} {report.needed_bytes / 1e6:>9.1f} MB")
    typer.echo(f'sgx.enclave_size = "{report.enclave_size}"')
    typer.echo(f"sgx.max_threads = {report.max_threads}")
    typer.echo(
        "Without EDMM all of it is taken when the enclave starts, and what exceeds the EPC is paged, which is slow."
    )
    typer.echo("With EDMM (SGX2, Linux 6.0 or newer) it is a limit, and memory and threads are added as they are used.")
