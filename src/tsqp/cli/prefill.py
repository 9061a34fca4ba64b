"""``tsqp prefill``: run one prompt at a level and say what it cost."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tsqp import config as settings
from tsqp.cli.reporting import notes, print_json, progress, reported
from tsqp.config import EnclaveConfig
from tsqp.errors import ConfigError, InputError
from tsqp.threads import set_threads, share_cores

if TYPE_CHECKING:
    from tsqp.reports import PrefillReport


def prefill(
    model: Annotated[
        str | None,
        typer.Option(help="smollm2, a Hugging Face directory or a .gguf file.", show_default="smollm2"),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(
            help="open: split, the worker reads everything. local: all in this process. monolithic: transformers.",
            show_default="open",
        ),
    ] = None,
    worker: Annotated[
        str | None, typer.Option(help="The worker's address.", show_default="starts one for this run")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Prompt length; cuts a given prompt.", show_default="128, or the whole prompt"),
    ] = None,
    batch: Annotated[int, typer.Option(help="How many copies of the prompt to run together.")] = 1,
    prompt: Annotated[str | None, typer.Option(help="The prompt.", show_default="a built-in text")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a UTF-8 file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="float32")] = None,
    repeat: Annotated[int, typer.Option(help="Measured runs after one to warm up; the median is reported.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    offload_attention: Annotated[
        bool, typer.Option("--offload-attention", help="Also send attention's two products to the worker.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run one prompt and say what it cost: time by part, round trips, bytes, and the next token."""
    with reported(as_json=json):
        flags = {"model": model, "level": level, "worker": worker, "dtype": dtype, "threads": threads}
        config = settings.load(EnclaveConfig, flags)
        if batch < 1:
            raise ConfigError(f"--batch {batch}: at least 1 is needed.")
        text = _prompt_text(prompt, prompt_file)
        report = _run(config, text, tokens, batch, repeat, offload_attention=offload_attention)
        if json:
            print_json(report)
        else:
            _show(report)


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str | None:
    if prompt is not None and prompt_file is not None:
        raise InputError("give --prompt or --prompt-file, not both.")
    if prompt_file is None:
        return prompt
    try:
        return prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{prompt_file} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise InputError(f"cannot read {prompt_file}: {error.strerror}.") from error


def _run(
    config: EnclaveConfig,
    text: str | None,
    tokens: int | None,
    batch: int,
    repeat: int,
    *,
    offload_attention: bool,
) -> PrefillReport:
    if config.level == "open":
        share_cores()
    import torch

    from tsqp import prefill as runs
    from tsqp.launch import local_worker
    from tsqp.model.architecture import read_config
    from tsqp.model.locate import locate
    from tsqp.model.tokenizer import find_tokenizer
    from tsqp.transport.urls import parse

    threads = set_threads(config.threads)
    with ExitStack() as stack:
        step = stack.enter_context(progress())
        directory = locate(config.model, lambda done: step("converting the model", done))
        architecture = read_config(directory)
        tokenizer = find_tokenizer(directory)
        ids_BT = torch.tensor([runs.prompt_ids(architecture, tokenizer, text, tokens)] * batch)
        worker = config.worker
        if config.level == "open" and worker is not None and not parse(worker).stays_on_this_machine:
            notes.print(f"{escape(worker)} is not on this machine: activations travel to it unencrypted.")
        if config.level == "open" and worker is None:
            step("starting a worker", 0.0)
            worker = stack.enter_context(
                local_worker(["--model", str(directory), "--dtype", config.dtype, "--threads", str(threads)])
            )
            step("starting a worker", 1.0)
        model = stack.enter_context(
            runs.runnable(
                config.level,
                directory,
                architecture,
                config,
                worker,
                offload_attention=offload_attention,
                on_step=step,
            )
        )
        describe: dict[str, str | int] = {
            "model": config.model,
            "level": config.level,
            "dtype": config.dtype,
            "threads": threads,
        }
        return runs.measure(model, ids_BT, repeat, describe, tokenizer.decode if tokenizer else None, step)


def _show(report: PrefillReport) -> None:
    table = Table(
        title=f"{report.model}, level {report.level}, {report.dtype}, {report.threads} threads",
        show_header=False,
    )
    table.add_row("prompt", f"{report.batch} x {report.tokens} tokens")
    table.add_row("prefill", f"{report.prefill_s * 1000:.1f} ms (median of {report.repeats})")
    table.add_row("throughput", f"{report.tokens_per_s:.0f} tokens/s")
    if report.round_trips:
        parts = zip(("enclave", "worker", "wire"), (report.enclave_s, report.worker_s, report.wire_s), strict=True)
        table.add_row("time by part", ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in parts))
        megabytes = f"{report.bytes_sent / 1e6:.1f} MB sent, {report.bytes_received / 1e6:.1f} MB received"
        table.add_row("wire", f"{report.round_trips} round trips, {megabytes}")
    table.add_row("next token", f"{report.next_tokens[0]} {escape(repr(report.next_text)) if report.next_text else ''}")
    Console(highlight=False).print(table)
