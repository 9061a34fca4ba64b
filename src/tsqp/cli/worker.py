"""``tsqp worker``: hold the large weights and answer enclaves."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from tsqp import config as settings
from tsqp.cli.reporting import notes, print_json, progress, reported
from tsqp.threads import share_cores
from tsqp.wire.messages import PROTOCOL_VERSION


def worker(
    model: Annotated[
        str | None,
        typer.Option(help="smollm2, a Hugging Face directory or a .gguf file.", show_default="smollm2"),
    ] = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(
            help="Address to listen on, repeatable: host:port, ipc:///path or shm:///path.",
            show_default="127.0.0.1:50051",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda:N.", show_default="cuda:0 where there is one")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="float32")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object when ready.")] = False,
    exit_with_parent: Annotated[bool, typer.Option("--exit-with-parent", hidden=True)] = False,
) -> None:
    """Start a worker: it holds a model's Linear and Embedding layers and multiplies what enclaves send.

    It reads every activation in clear at the level `open`. Stop it with Ctrl-C.
    """
    with reported(as_json=json):
        flags = {
            "model": model,
            "listen": tuple(listen) if listen else None,
            "device": device,
            "dtype": dtype,
            "threads": threads,
        }
        config = settings.load(settings.WorkerConfig, flags)
        share_cores()
        from tsqp.reports import WorkerReady
        from tsqp.worker.startup import Progress, open_worker

        with progress() as step:
            hangup_fd = sys.stdin.fileno() if exit_with_parent else None
            running = open_worker(config, Progress(lambda text: notes.print(escape(text)), step), hangup_fd)
        ready = WorkerReady(
            model=running.model,
            model_digest=running.digest,
            device=str(running.device),
            dtype=running.dtype,
            threads=running.threads,
            modules=running.modules,
            endpoints=[endpoint.url for endpoint in running.endpoints],
            protocol=PROTOCOL_VERSION,
        )
        if json:
            print_json(ready)
        else:
            typer.echo(
                f"{ready.model} on {ready.device} in {ready.dtype}: {ready.modules} modules, {ready.threads} threads"
            )
            typer.echo(f"listening on {', '.join(ready.endpoints)}; Ctrl-C stops")
        running.serve()
