"""``tsqp worker``: hold the large weights and answer enclaves."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from tsqp import config as settings
from tsqp import logs
from tsqp.cli.reporting import notice, print_json, progress, reported
from tsqp.launch import ending_with_parent
from tsqp.threads import share_cores
from tsqp.wire.messages import PROTOCOL_VERSION

if TYPE_CHECKING:
    from tsqp.reports import WorkerReady


def worker(
    model: Annotated[
        str | None,
        typer.Option(help="smollm2, a Hugging Face directory, a .gguf file or a packed model.", show_default="smollm2"),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Serve int8 codes, for the levels verified and masked; a packed model always is."),
    ] = False,
    listen: Annotated[
        list[str] | None,
        typer.Option(
            help="Address to listen on, repeatable: host:port, ipc:///path or shm:///path.",
            show_default="127.0.0.1:50051 and, for this user, shared memory",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda:N.", show_default="cuda:0 where there is one")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="float32")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            help="How many processes hold the weights, each some rows of every layer.",
            show_default="1, or as torchrun says",
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
    cuda_graphs: Annotated[
        str | None, typer.Option(help="on or off: capture a GPU's products that repeat.", show_default="on")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="HOST:PORT where Prometheus reads what it does.", show_default="nowhere")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.", show_default="text")] = None,
    max_clients: Annotated[
        int | None, typer.Option(help="How many clients are served; more are refused.", show_default="256")
    ] = None,
    max_client_requests: Annotated[
        int | None, typer.Option(help="How many requests of one client may wait.", show_default="64")
    ] = None,
    max_client_bytes: Annotated[
        int | None,
        typer.Option(help="How many bytes one client's requests and replies may hold.", show_default="268435456"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object when ready.")] = False,
    exit_with_parent: Annotated[bool, typer.Option("--exit-with-parent", hidden=True)] = False,
) -> None:
    """Start a worker: it holds a model's Linear and Embedding layers and multiplies what enclaves send.

    It reads every activation in clear at the levels `open` and `verified`. Stop it with Ctrl-C.
    """
    flags = {
        "model": model,
        "serves": "exact" if exact else None,
        "listen": tuple(listen) if listen else None,
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "tensor_parallel": tensor_parallel,
        "key": key,
        "metrics": metrics,
        "log_level": log_level,
        "log_format": log_format,
        "allow": tuple(allow) if allow else None,
        "insecure": "on" if insecure else None,
        "memory_limit": memory_limit,
        "cuda_graphs": cuda_graphs,
        "max_clients": max_clients,
        "max_client_requests": max_client_requests,
        "max_client_bytes": max_client_bytes,
    }
    serve(flags, as_json=json, exit_with_parent=exit_with_parent)


def serve(flags: Mapping[str, object], *, as_json: bool, exit_with_parent: bool) -> None:
    """Start what ``tsqp worker`` and ``tsqp dealer`` start, say so, and answer until stopped.

    Args:
        flags: settings of ``WorkerConfig``; None values count as not given.
        as_json: print one JSON object when ready.
        exit_with_parent: stop when standard input closes.
    """
    with reported(as_json=as_json), ExitStack() as stack:
        config = settings.load(settings.WorkerConfig, flags)
        logs.set_up(config.log_level, config.log_format)
        share_cores()
        from tsqp.reports import WorkerReady
        from tsqp.worker.limits import watched
        from tsqp.worker.ranks.follower import follow_torchrun
        from tsqp.worker.startup import Progress, open_worker

        if follow_torchrun(config):
            return
        limits = stack.enter_context(watched(config.memory_limit, config.max_message_bytes))
        hangup_fd = sys.stdin.fileno() if exit_with_parent else None
        with progress() as step, ending_with_parent(hangup_fd) if hangup_fd is not None else nullcontext():
            running = open_worker(config, Progress(notice, step), hangup_fd)
            limits.loaded()
        ready = WorkerReady(
            model=running.model,
            model_digest=running.digest,
            device=str(running.device),
            dtype=running.dtype,
            serves=running.serves,
            threads=running.threads,
            tensor_parallel=running.ranks,
            modules=running.modules,
            endpoints=[endpoint.url for endpoint in running.endpoints],
            protocol=PROTOCOL_VERSION,
            public_key=running.public_key,
            memory_limit=limits.memory_bytes,
        )
        if as_json:
            print_json(ready)
        else:
            _show(ready)
        running.serve()


def _show(ready: WorkerReady) -> None:
    what = {"open": "", "exact": ", exact products", "masks": ", mask products"}[ready.serves]
    ranks = f", {ready.tensor_parallel} ranks" if ready.tensor_parallel > 1 else ""
    typer.echo(
        f"{ready.model} on {ready.device} in {ready.dtype}{what}{ranks}: {ready.modules} modules, "
        f"{ready.threads} threads"
    )
    if ready.public_key:
        typer.echo(f"public key {ready.public_key}")
    typer.echo(f"listening on {', '.join(ready.endpoints)}; Ctrl-C stops")
