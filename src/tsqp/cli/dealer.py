"""``tsqp dealer``: compute mask products for enclaves, apart from the worker that they use."""

from __future__ import annotations

from typing import Annotated

import typer

from tsqp.cli.worker import serve
from tsqp.config import DEALER_PORT


def dealer(
    model: Annotated[
        str | None,
        typer.Option(help="smollm2, a Hugging Face directory, a .gguf file or a packed model.", show_default="smollm2"),
    ] = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(
            help="Address to listen on, repeatable: host:port or ipc:///path.", show_default=f"127.0.0.1:{DEALER_PORT}"
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="Encrypt every link with this key, a file NAME.key_secret.", show_default="links in clear"),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="Let only clients in that hold this key, NAME.key or its text, repeatable. Needs --key.",
            show_default="whoever has this key's public part",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without a key, in clear.")
    ] = False,
    memory_limit: Annotated[
        int | None,
        typer.Option(
            help="Bytes of memory beyond which the process ends, to be started again.",
            show_default="what the model takes and 8 GiB",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda:N.", show_default="cuda:0 where there is one")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="HOST:PORT where Prometheus reads what it does.", show_default="nowhere")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.", show_default="text")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object when ready.")] = False,
    exit_with_parent: Annotated[bool, typer.Option("--exit-with-parent", hidden=True)] = False,
) -> None:
    """Start a dealer: it multiplies masks, from seeds that enclaves send, and never sees what they hide.

    Whoever runs it must not collude with the worker: together they could unmask. Stop it with Ctrl-C.
    """
    flags = {
        "model": model,
        "serves": "masks",
        "listen": tuple(listen) if listen else None,
        "device": device,
        "threads": threads,
        "key": key,
        "metrics": metrics,
        "log_level": log_level,
        "log_format": log_format,
        "allow": tuple(allow) if allow else None,
        "insecure": "on" if insecure else None,
        "memory_limit": memory_limit,
    }
    serve(flags, as_json=json, exit_with_parent=exit_with_parent)
