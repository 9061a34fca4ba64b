"""``tsqp bench``: measure the split against its baselines on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tsqp import config as settings
from tsqp.cli.reporting import pool_rows, print_json, progress, reported
from tsqp.config import EnclaveConfig
from tsqp.errors import ConfigError
from tsqp.threads import available_cores

if TYPE_CHECKING:
    from tsqp.reports import BenchReport


def bench(
    model: Annotated[
        str | None, typer.Option(help="smollm2, a Hugging Face directory or a .gguf file.", show_default="smollm2")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Prompt length.")] = 128,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="float32")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each process.", show_default="all cores")] = None,
    masks: Annotated[
        str | None, typer.Option(help="masked: measure only enclave or only dealers.", show_default="both")
    ] = None,
    dealer: Annotated[
        list[str] | None, typer.Option(help="A dealer's address, repeatable.", show_default="starts one")
    ] = None,
    dealer_key: Annotated[
        list[str] | None, typer.Option(help="Public key of each dealer, in order.", show_default="links in clear")
    ] = None,
    mask_pool: Annotated[
        str | None, typer.Option(help="For how many tokens masks are ready before a run.", show_default="one prompt")
    ] = None,
    mask_memory: Annotated[
        int | None, typer.Option(help="Bytes that the mask pool may take.", show_default="1 GiB")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each variant; each has four measured runs.")] = 15,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure prefill at every level, against transformers and against the published client.

    All variants stay loaded and take turns within one run; ratios are between medians.
    """
    with reported(as_json=json):
        flags = {
            "model": model,
            "dtype": dtype,
            "threads": threads,
            "masks": masks,
            "dealers": tuple(dealer) if dealer else None,
            "dealer_keys": tuple(dealer_key) if dealer_key else None,
            "mask_pool": pool_rows(mask_pool),
            "mask_memory": mask_memory,
        }
        config = settings.load(EnclaveConfig, flags)
        if config.masks == "enclave" and config.dealers:
            raise ConfigError("masks by the enclave and dealers exclude each other: leave out --masks or --dealer.")
        if rounds < 1:
            raise ConfigError(f"--rounds {rounds}: at least 1 is needed.")
        from tsqp.bench import prefill_suite

        with progress() as step:
            count = config.threads or available_cores()
            report = prefill_suite.run(config, tokens, count, rounds=rounds, on_step=step)
        if json:
            print_json(report)
        else:
            _show(report)


def _show(report: BenchReport) -> None:
    console = Console(highlight=False)
    title = f"{report.model}, prefill of {report.tokens} tokens, {report.dtype}, {report.threads} threads per process"
    headings = ("variant", "median ms", "enclave", "worker", "wire", "KB/token", "trips")
    table = Table(*headings, title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for variant in report.variants:
        parts = (variant.enclave_s, variant.worker_s, variant.wire_s)
        split = [f"{seconds * 1e3:.1f}" for seconds in parts] if variant.worker_s else ["", "", ""]
        moved = [f"{variant.bytes_per_token / 1e3:.0f}", str(variant.round_trips)] if variant.round_trips else ["", ""]
        table.add_row(variant.name, f"{variant.median_s * 1e3:.1f}", *split, *moved)
    console.print(table)
    compared = Table("ratio", "value", "limit", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for ratio in report.ratios:
        verdict = "" if ratio.ok is None else "holds" if ratio.ok else "[red]missed[/]"
        compared.add_row(ratio.name, f"{ratio.value:.2f}", ratio.limit, verdict)
    console.print(compared)
    console.print(_what_a_gpu_changes(report))
    machine = report.hardware
    console.print(f"{machine.cpu}, {machine.cores} cores, {machine.memory_gb:g} GB; torch {machine.torch}")


def _what_a_gpu_changes(report: BenchReport) -> str:
    by_name = {variant.name: variant for variant in report.variants}
    masked, local = by_name.get("masked") or by_name["masked-dealer"], by_name["local"]
    stays_s = masked.enclave_s + masked.wire_s
    return (
        f"masked takes {masked.median_s / local.median_s:.1f} times as long as local here, where the worker has no GPU "
        f"and shares the enclave's cores. A GPU takes away most of the worker's {masked.worker_s * 1e3:.0f} ms; the "
        f"enclave's and the wire's {stays_s * 1e3:.0f} ms stay ({stays_s / local.median_s:.1f} times local). They grow "
        "with inputs plus outputs of the layers, local's time with their product, so the larger the model the more a "
        "GPU gains: docs/performance.md has the model."
    )
