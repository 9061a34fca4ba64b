"""``tsqp prefill``: run one prompt at a level and say what it cost."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tsqp import config as settings
from tsqp.cli.reporting import notes, pool_rows, print_json, progress, reported
from tsqp.cli.workers import with_worker
from tsqp.config import WORKER_LEVELS, EnclaveConfig
from tsqp.errors import ConfigError, InputError
from tsqp.threads import set_threads, share_cores

if TYPE_CHECKING:
    from tsqp.reports import PrefillReport


_SOURCES = {"enclave": "the enclave", "dealers": "dealers"}


def prefill(
    model: Annotated[
        str | None,
        typer.Option(help="smollm2, a Hugging Face directory, a .gguf file or a packed model.", show_default="smollm2"),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(
            help="open: split, the worker reads everything. verified: its results are checked. masked: checked, and it "
            "sees uniform words only. local: all in this process. monolithic: transformers.",
            show_default="open",
        ),
    ] = None,
    worker: Annotated[
        str | None, typer.Option(help="The worker's address.", show_default="one that runs here, or one for this run")
    ] = None,
    worker_key: Annotated[
        str | None,
        typer.Option(
            help="The worker's public key, NAME.key or its text: encrypts the link.", show_default="a link in clear"
        ),
    ] = None,
    own_key: Annotated[
        str | None,
        typer.Option(
            help="This process's own key, NAME.key_secret, for peers that let only some in.",
            show_default="a fresh one for each link",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let links without a key leave this machine, in clear.")
    ] = False,
    masks: Annotated[
        str | None,
        typer.Option(help="masked: who computes mask products, enclave or dealers.", show_default="enclave"),
    ] = None,
    dealer: Annotated[
        list[str] | None, typer.Option(help="masked: a dealer's address, repeatable.", show_default="none")
    ] = None,
    dealer_key: Annotated[
        list[str] | None,
        typer.Option(help="Public key of each dealer, in order: NAME.key or its text.", show_default="links in clear"),
    ] = None,
    mask_pool: Annotated[
        str | None,
        typer.Option(help="masked: for how many tokens masks are kept ready.", show_default="one prompt"),
    ] = None,
    mask_memory: Annotated[
        int | None, typer.Option(help="Bytes that the mask pool may take.", show_default="1 GiB")
    ] = None,
    codes: Annotated[
        str | None,
        typer.Option(help="A packed model to read the codes from.", show_default="streamed from the worker"),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Prompt length; cuts a given prompt.", show_default="128, or the whole prompt"),
    ] = None,
    batch: Annotated[int, typer.Option(help="How many copies of the prompt to run together.")] = 1,
    prompt: Annotated[str | None, typer.Option(help="The prompt.", show_default="a built-in text")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a UTF-8 file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="float32")] = None,
    wire_dtype: Annotated[
        str | None,
        typer.Option(help="open: in which activations travel; also int8.", show_default="as --dtype"),
    ] = None,
    repeat: Annotated[int, typer.Option(help="Measured runs after one to warm up; the median is reported.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    micro_batches: Annotated[
        int | None,
        typer.Option(
            help="Parts of the prompt that take turns, so that one is computed while another's product is away. "
            "1: none.",
            show_default="by the prompt's length",
        ),
    ] = None,
    offload_attention: Annotated[
        bool, typer.Option("--offload-attention", help="Also send attention's two products to the worker.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run one prompt and say what it cost: time by part, round trips, bytes, and the next token."""
    with reported(as_json=json):
        flags = {
            "model": model,
            "level": level,
            "worker": worker,
            "worker_key": worker_key,
            "own_key": own_key,
            "insecure": "on" if insecure else None,
            "masks": masks,
            "dealers": tuple(dealer) if dealer else None,
            "dealer_keys": tuple(dealer_key) if dealer_key else None,
            "mask_pool": pool_rows(mask_pool),
            "mask_memory": mask_memory,
            "codes": codes,
            "dtype": dtype,
            "wire_dtype": wire_dtype,
            "threads": threads,
            "micro_batches": micro_batches,
        }
        config = settings.load(EnclaveConfig, flags)
        if config.level not in ("local", "monolithic") and config.worker_key and not config.worker:
            raise ConfigError("a worker's key was given but no worker: give its address too (--worker).")
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
    if config.level in WORKER_LEVELS:
        share_cores()
    import torch

    from tsqp import prefill as runs
    from tsqp.enclave.mask_pool import largest_pool
    from tsqp.levels import check_options, check_peers, open_model, runnable
    from tsqp.model.architecture import linear_groups
    from tsqp.transport.urls import parse

    threads = set_threads(config.threads)
    with ExitStack() as stack:
        step = stack.enter_context(progress())
        if config.level in WORKER_LEVELS and config.worker:
            check_peers(config.level, config)
        model = open_model(config.model, config.level, step)
        ids = runs.prompt_ids(model.architecture, model.tokenizer, text, tokens)
        ids_BT = torch.tensor([ids] * batch)
        check_options(config.level, config, offload_attention=offload_attention)
        if config.level == "masked" and config.mask_pool is None:
            fitting = largest_pool(linear_groups(model.architecture), config.mask_memory)
            config = replace(config, mask_pool=min(ids_BT.numel(), fitting))
        readable = config.level in ("open", "verified") and not config.worker_key
        if readable and config.worker and not parse(config.worker).stays_on_this_machine:
            _notice(f"{config.worker} is not on this machine: activations travel to it unencrypted.")
        config = stack.enter_context(with_worker(config, model, threads, step, _notice))
        loaded = stack.enter_context(
            runnable(config.level, model, config, offload_attention=offload_attention, on_step=step, on_notice=_notice)
        )
        describe: dict[str, str | int | None] = {
            "model": config.model,
            "level": config.level,
            "masks": ("dealers" if config.dealers else "enclave") if config.level == "masked" else None,
            "dtype": "int8" if model.packed else config.dtype,
            "threads": threads,
        }
        decode = model.tokenizer.decode if model.tokenizer else None
        return runs.measure(loaded, ids_BT, repeat, describe, decode, step)


def _notice(sentence: str) -> None:
    notes.print(escape(sentence))


def _show(report: PrefillReport) -> None:
    table = Table(
        title=f"{report.model}, level {report.level}, {report.dtype}, {report.threads} threads",
        show_header=False,
    )
    table.add_row("prompt", f"{report.batch} x {report.tokens} tokens")
    table.add_row("prefill", f"{report.prefill_s * 1000:.1f} ms (median of {report.repeats})")
    table.add_row("throughput", f"{report.tokens_per_s:.0f} tokens/s")
    if report.masks:
        outside = f"{report.mask_fill_s * 1000:.0f} ms outside of the prefill"
        waited = f"{report.mask_wait_s * 1000:.0f} ms waited for in it"
        table.add_row("masks", f"{report.mask_rows_used} rows by {_SOURCES[report.masks]}; {outside}, {waited}")
    if report.verified_rows:
        names = ("quantising", "masking", "checking")
        shares = (report.quantise_s, report.mask_s, report.check_s)
        protection = ", ".join(f"{n} {s * 1000:.1f} ms" for n, s in zip(names, shares, strict=True) if s)
        ahead = f"{report.ahead_s * 1000:.1f} ms more while the worker computed"
        table.add_row("protection", f"{protection}: {sum(shares) / report.prefill_s:.0%} of the prefill; {ahead}")
        table.add_row("checked", f"{report.verified_rows} rows of products, each with a miss rate of 2^-61")
    if report.round_trips:
        parts = [f"enclave {report.enclave_s * 1000:.1f} ms", f"waiting {report.waited_s * 1000:.1f} ms"]
        turns = f" while {report.micro_batches} micro-batches took turns" if report.micro_batches > 1 else ""
        copies = f" ({report.pcie_s * 1000:.1f} ms of it copies over PCIe)" if report.pcie_s else ""
        worked = f"the worker computed {report.worker_s * 1000:.1f} ms{copies}{turns}"
        table.add_row("time by part", f"{', '.join(parts)}; {worked}")
        megabytes = f"{report.bytes_sent / 1e6:.1f} MB sent, {report.bytes_received / 1e6:.1f} MB received"
        table.add_row("wire", f"{report.round_trips} round trips, {megabytes}")
    table.add_row("next token", f"{report.next_tokens[0]} {escape(repr(report.next_text)) if report.next_text else ''}")
    Console(highlight=False).print(table)
