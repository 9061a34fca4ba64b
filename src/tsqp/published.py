"""The published scripts: same commands, variables and lines of output as their users know.

``tee_gpu/server.py`` calls ``server``; the two ``tee_runner.py`` call ``split_runner`` and ``local_runner``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from tsqp import config as settings
from tsqp import logs
from tsqp.cli.reporting import notice, progress, reported
from tsqp.config import DEFAULT_PORT, EnclaveConfig, WorkerConfig
from tsqp.threads import set_threads, share_cores

if TYPE_CHECKING:
    from tsqp.loaded import Runnable

DEFAULT_ENDPOINT = f"localhost:{DEFAULT_PORT}"
_RULE = "=" * 50


def server() -> None:
    """Start the worker as the environment says and serve until interrupted."""
    typer.run(_serve)


def _serve() -> None:
    """Start the worker; its settings are environment variables (README.md)."""
    with reported(as_json=False), ExitStack() as stack:
        config = settings.load(WorkerConfig)
        logs.set_up(config.log_level, config.log_format)
        share_cores()
        from tsqp.worker.limits import watched  # noqa: PLC0415  torch loads here
        from tsqp.worker.ranks.follower import follow_torchrun  # noqa: PLC0415
        from tsqp.worker.startup import Progress, open_worker  # noqa: PLC0415

        if follow_torchrun(config):
            return
        limits = stack.enter_context(watched(config.memory_limit, config.max_message_bytes))
        with progress() as step:
            running = open_worker(config, Progress(notice, step))
            limits.loaded()
        typer.echo(f"Model: {running.model}")
        typer.echo(f"Device: {running.device}")
        typer.echo(f"Dtype: {running.dtype}")
        typer.echo(f"✓ Registered {running.modules} remote modules")
        ports = [str(endpoint.port) for endpoint in running.endpoints if endpoint.scheme == "tcp"]
        typer.echo(f"✓ ZeroMQ server started on port {', '.join(ports)}")
        running.serve()


def split_runner(tokens: int) -> None:
    """Run the published prefill with its linear layers on the worker at ``LLAMA_GPU_ENDPOINT``.

    Args:
        tokens: the prompt's length unless ``--tokens`` gives another.
    """
    share_cores()
    _run("open", tokens)


def local_runner(tokens: int) -> None:
    """Run the same prefill wholly in this process: the baseline.

    Args:
        tokens: the prompt's length unless ``--tokens`` gives another.
    """
    _run("local", tokens)


def _run(level: str, default_tokens: int) -> None:
    def command(
        tokens: Annotated[int, typer.Option(help="Prompt length.")] = default_tokens,
        batch: Annotated[int, typer.Option(help="Prompts run together: raises throughput.", min=1)] = 1,
        dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="float32")] = None,
    ) -> None:
        """Measure a prefill as published."""
        with reported(as_json=False):
            config = settings.load(EnclaveConfig, {"dtype": dtype, "level": level})
            _prefill(config, tokens, batch)

    typer.run(command)


def _prefill(config: EnclaveConfig, tokens: int, batch: int) -> None:
    from tsqp.levels import check_peers, open_model, runnable  # noqa: PLC0415  torch loads here
    from tsqp.model.architecture import linear_groups, module_count  # noqa: PLC0415
    from tsqp.prefill import prompt_ids  # noqa: PLC0415

    set_threads(config.threads)
    config = replace(config, worker=config.worker or DEFAULT_ENDPOINT)
    if config.level == "open":
        check_peers("open", config)
    with progress() as step:
        model = open_model(config.model, config.level, step)
        ids = prompt_ids(model.architecture, model.tokenizer, None, tokens)
        with runnable(config.level, model, config, on_step=step) as loaded:
            if config.level == "open":
                typer.echo(f"✓ Connected to server at {config.worker}")
                typer.echo(f"✓ Found {module_count(linear_groups(model.architecture))} linear/embedding modules")
            _benchmark(loaded, [ids] * batch)


def _benchmark(model: Runnable, prompts: Sequence[Sequence[int]]) -> None:
    import torch  # noqa: PLC0415

    from tsqp.prefill import timed  # noqa: PLC0415

    typer.echo("✓ Model setup complete")
    ids_BT = torch.tensor(prompts)
    timed(model, ids_BT)
    run, _ = timed(model, ids_BT)
    typer.echo(_RULE)
    typer.echo(f"Token length: {ids_BT.shape[1]}" + (f" (batch of {len(prompts)})" if len(prompts) > 1 else ""))
    typer.echo(f"Prefill time: {run.total_s:.4f} s")
    typer.echo(f"Throughput: {ids_BT.numel() / run.total_s:.2f} tokens/s")
    typer.echo(_RULE)
