"""The commands of ``tsqp bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsqp.bench.plans import SCALING_BATCHES, SCALING_LENGTHS
from tsqp.cli.bench import options
from tsqp.cli.bench.options import (
    DeviceOption,
    DtypeOption,
    HtmlOption,
    JsonOption,
    MemoryOption,
    MicroBatchesOption,
    ModelOption,
    PoolOption,
    ThreadsOption,
    TraceOption,
)
from tsqp.cli.reporting import notes, pool_rows, print_json, progress, reported
from tsqp.config import WORKER_LEVELS
from tsqp.errors import ConfigError, InputError
from tsqp.threads import available_cores

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tsqp.bench.trace import Recording
    from tsqp.cli.bench.tables import Report

bench = typer.Typer(
    name="bench",
    help="Measure on this machine, variants in turns within one run. Each command has --json and --html.",
    no_args_is_help=True,
)

_LENGTHS, _BATCHES = (",".join(map(str, sizes)) for sizes in (SCALING_LENGTHS, SCALING_BATCHES))


@bench.command()
def prefill(
    model: ModelOption = None,
    tokens: Annotated[int, typer.Option(help="Prompt length.")] = 128,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    micro_batches: MicroBatchesOption = None,
    masks: Annotated[
        str | None, typer.Option(help="masked: measure only enclave or only dealers.", show_default="both")
    ] = None,
    dealer: Annotated[
        list[str] | None, typer.Option(help="A dealer's address, repeatable.", show_default="starts one")
    ] = None,
    dealer_key: Annotated[
        list[str] | None, typer.Option(help="Public key of each dealer, in order.", show_default="links in clear")
    ] = None,
    own_key: Annotated[
        str | None,
        typer.Option(help="Own key, NAME.key_secret, for dealers that let only some in.", show_default="fresh ones"),
    ] = None,
    mask_pool: PoolOption = None,
    mask_memory: MemoryOption = None,
    rounds: Annotated[int, typer.Option(help="Turns of each variant; each has four measured runs.")] = 15,
    trace: TraceOption = None,
    html: HtmlOption = None,
    json: JsonOption = False,
) -> None:
    """Measure prefill at every level, against transformers and against the published client."""
    with reported(as_json=json):
        flags = {
            "model": model,
            "dtype": dtype,
            "threads": threads,
            "micro_batches": micro_batches,
            "masks": masks,
            "dealers": tuple(dealer) if dealer else None,
            "dealer_keys": tuple(dealer_key) if dealer_key else None,
            "own_key": own_key,
            "mask_pool": pool_rows(mask_pool),
            "mask_memory": mask_memory,
        }
        config = options.load(flags, tokens, rounds)
        if config.masks == "enclave" and config.dealers:
            raise ConfigError("masks by the enclave and dealers exclude each other: leave out --masks or --dealer.")
        _check_files(html, trace)
        from tsqp.bench import prefill_suite

        with progress() as step:
            count = config.threads or available_cores()
            report, recordings = prefill_suite.run(
                config, tokens, count, rounds=rounds, trace=trace is not None, device=device, on_step=step
            )
        _finish(report, html, as_json=json, trace=trace, recordings=recordings)


@bench.command()
def levels(
    model: ModelOption = None,
    tokens: Annotated[int, typer.Option(help="Prompt length.")] = 128,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    micro_batches: MicroBatchesOption = None,
    mask_memory: MemoryOption = None,
    rounds: Annotated[int, typer.Option(help="Turns of each level; each has four measured runs.")] = 10,
    trace: TraceOption = None,
    html: HtmlOption = None,
    json: JsonOption = False,
) -> None:
    """Measure where each level's time goes, and how far each part is from its floor."""
    with reported(as_json=json):
        flags = {
            "model": model,
            "dtype": dtype,
            "threads": threads,
            "micro_batches": micro_batches,
            "mask_memory": mask_memory,
        }
        config = options.load(flags, tokens, rounds)
        _check_files(html, trace)
        from tsqp.bench import levels_suite

        with progress() as step:
            count = config.threads or available_cores()
            report, recordings = levels_suite.run(
                config, tokens, count, rounds=rounds, trace=trace is not None, device=device, on_step=step
            )
        _finish(report, html, as_json=json, trace=trace, recordings=recordings)


@bench.command()
def transport(
    rounds: Annotated[int, typer.Option(help="Turns of each transport; each has four measured round trips.")] = 50,
    html: HtmlOption = None,
    json: JsonOption = False,
) -> None:
    """Measure round trips of single tensors over every transport, and over gRPC and JSON beside them."""
    with reported(as_json=json):
        options.check_rounds(rounds)
        _check_files(html)
        from tsqp.bench import transport_suite

        with progress() as step:
            report = transport_suite.run(rounds, step)
        _finish(report, html, as_json=json)


@bench.command()
def scaling(
    model: ModelOption = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Prompt lengths, between commas.", show_default=f"{_LENGTHS}, as far as the model's context"),
    ] = None,
    batch: Annotated[str, typer.Option(help="Numbers of prompts, between commas.")] = _BATCHES,
    batch_tokens: Annotated[int, typer.Option(help="Length of each of those prompts.")] = 16,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    mask_pool: PoolOption = None,
    mask_memory: MemoryOption = None,
    rounds: Annotated[int, typer.Option(help="Measured runs of each level at each size.")] = 5,
    html: HtmlOption = None,
    json: JsonOption = False,
) -> None:
    """Measure tokens per second over prompt length and over the number of prompts."""
    with reported(as_json=json):
        flags = {
            "model": model,
            "dtype": dtype,
            "threads": threads,
            "mask_pool": pool_rows(mask_pool),
            "mask_memory": mask_memory,
        }
        lengths = None if tokens is None else options.whole_numbers(tokens, "--tokens")
        batches = options.whole_numbers(batch, "--batch")
        config = options.load(flags, 1, rounds)
        if batch_tokens < 1:
            raise InputError(f"--batch-tokens {batch_tokens}: at least 1 is needed.")
        _check_files(html)
        from tsqp.bench import scaling_suite

        with progress() as step:
            sizes = scaling_suite.Sizes(lengths, batches, batch_tokens)
            count = config.threads or available_cores()
            report = scaling_suite.run(config, sizes, count, rounds=rounds, on_step=step)
        _finish(report, html, as_json=json)


@bench.command()
def overlap(
    model: ModelOption = None,
    level: Annotated[
        str | None, typer.Option(help="open, verified or masked (masks ready).", show_default="open")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Prompt length.")] = 512,
    batch: Annotated[int, typer.Option(help="How many prompts are run together.")] = 1,
    delay: Annotated[str, typer.Option(help="Delays each way in milliseconds, between commas.")] = "0,1,3",
    micro_batches: Annotated[
        str, typer.Option(help="Numbers of parts that take turns, between commas; 1 is serial.")
    ] = "1,2,4,8",
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    mask_memory: MemoryOption = None,
    rounds: Annotated[int, typer.Option(help="Turns of each variant; each has two measured runs.")] = 5,
    html: HtmlOption = None,
    json: JsonOption = False,
) -> None:
    """Measure how much of a link's delay is hidden when parts of a prompt take turns."""
    with reported(as_json=json):
        flags = {"model": model, "level": level, "dtype": dtype, "threads": threads, "mask_memory": mask_memory}
        counts = options.whole_numbers(micro_batches, "--micro-batches")
        delays = options.milliseconds(delay, "--delay")
        config = options.load(flags, tokens, rounds)
        if config.level not in WORKER_LEVELS:
            raise ConfigError(f"--level {config.level}: only open, verified and masked have a link.")
        if batch < 1:
            raise ConfigError(f"--batch {batch}: at least 1 is needed.")
        _check_files(html)
        from tsqp.bench import overlap_suite

        with progress() as step:
            sizes = overlap_suite.Sizes(tokens, batch, delays, counts)
            count = config.threads or available_cores()
            report = overlap_suite.run(config, sizes, count, rounds=rounds, on_step=step)
        _finish(report, html, as_json=json)


@bench.command()
def decode(
    model: ModelOption = None,
    tokens: Annotated[int, typer.Option(help="Length of each answer.")] = 32,
    batch: Annotated[str, typer.Option(help="Numbers of requests at once, between commas; 1 is always measured.")] = (
        "1,16"
    ),
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(help="Turns of each variant; each has one run with each batch.")] = 5,
    html: HtmlOption = None,
    json: JsonOption = False,
) -> None:
    """Measure generation at every level, one request and many at once, against transformers."""
    with reported(as_json=json):
        batches = options.whole_numbers(batch, "--batch")
        config = options.load({"model": model, "dtype": dtype, "threads": threads}, tokens, rounds)
        _check_files(html)
        from tsqp.bench import decode_suite

        sizes = decode_suite.Sizes.of(tokens, batches)
        with progress() as step:
            count = config.threads or available_cores()
            report = decode_suite.run(config, sizes, count, rounds=rounds, on_step=step)
        _finish(report, html, as_json=json)


def _check_files(html: Path | None, trace: Path | None = None) -> None:
    options.check_writable(html, "--html")
    options.check_writable(trace, "--trace")


def _finish(
    report: Report,
    html: Path | None,
    *,
    as_json: bool,
    trace: Path | None = None,
    recordings: Mapping[str, Recording] | None = None,
) -> None:
    """Print what was measured first, so that a file that cannot be written costs nothing but the file."""
    from tsqp.bench import page
    from tsqp.bench import trace as traces
    from tsqp.cli.bench import tables

    if as_json:
        print_json(report)
    else:
        tables.show(report)
    if html is not None:
        page.write(html, report)
        notes.print(f"wrote {html}", markup=False)
    if trace is not None:
        traces.write(trace, recordings or {})
        notes.print(f"wrote {trace}: open it at ui.perfetto.dev or chrome://tracing", markup=False)
