"""``tsqp plan``: what a model costs per token, and how many machines serve so many users."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsqp.cli.reporting import notice, print_json, progress, reported
from tsqp.errors import ConfigError
from tsqp.threads import set_threads, share_cores

if TYPE_CHECKING:
    from tsqp.plan.constants import Constants
    from tsqp.plan.reports import PlanCheckReport

_ROUNDS = 3
_MOST_ROUNDS = 1000


def plan(
    model: Annotated[
        str,
        typer.Option(help="smollm2, llama-3.2-1b, llama-3.1-8b, llama-3.1-70b, a config.json or its directory."),
    ] = "smollm2",
    users: Annotated[int, typer.Option(help="How many generate at the same time.")] = 1,
    tokens_per_s: Annotated[float, typer.Option(help="Tokens a second that each of them is to get.")] = 5.0,
    context: Annotated[int, typer.Option(help="Tokens of a prompt and its answer together.")] = 2048,
    prompt: Annotated[int | None, typer.Option(help="Of these, the prompt's.", show_default="half")] = None,
    level: Annotated[str, typer.Option(help="open, verified or masked.")] = "masked",
    masks: Annotated[
        str | None, typer.Option(help="masked: who makes masks, dealers or enclave.", show_default="dealers")
    ] = None,
    dealers: Annotated[int, typer.Option(help="masked: how many parties deal.")] = 1,
    dtype: Annotated[str, typer.Option(help="open: float32, float16 or bfloat16.")] = "float32",
    gpu: Annotated[str, typer.Option(help="The workers' and dealers' GPU, as the file of machines names it.")] = "h100",
    enclave_cores: Annotated[int, typer.Option(help="Cores of an enclave's host.")] = 16,
    enclave_memory: Annotated[float, typer.Option(help="GB that enclaves may take of their host.")] = 256.0,
    link: Annotated[float, typer.Option(help="Gbit/s of each machine's link, each way.")] = 25.0,
    latency: Annotated[float, typer.Option(help="Milliseconds of the network, there and back.")] = 0.1,
    machines: Annotated[
        Path | None, typer.Option(help="GPUs and prices, a TOML file.", show_default="the one that comes with TSQP")
    ] = None,
    constants: Annotated[
        Path | None,
        typer.Option(help="Constants of the model; --measure and --check write them here.", show_default="TSQP's own"),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Take the constants on this machine first.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Plan nothing: measure this machine, and what that predicts against it.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Turns of each measurement.")] = _ROUNDS,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a model costs per token, how many machines serve so many users, and what saturates first."""
    with reported(as_json=json):
        if not 1 <= rounds <= _MOST_ROUNDS:
            raise ConfigError(f"--rounds {rounds}: expected a number from 1 to {_MOST_ROUNDS}.")
        from tsqp.plan.question import Question

        question = Question(
            users=users,
            tokens_s=tokens_per_s,
            context=context,
            prompt=context // 2 if prompt is None else prompt,
            level=level,
            masks=("dealers" if level == "masked" else None) if masks is None else masks,
            dealers=dealers,
            dtype=dtype,
            gpu=gpu,
            enclave_cores=enclave_cores,
            memory_gb=enclave_memory,
            link_gbps=link,
            latency_ms=latency,
        )
        if check:
            report = _check(constants, rounds)
            if json:
                print_json(report)
            else:
                from tsqp.cli.plan_tables import show_check

                show_check(report)
            raise typer.Exit(0 if report.ok else 1)
        from tsqp.plan.answer import answer
        from tsqp.plan.machines import load_machines
        from tsqp.plan.models import model_shape

        known = load_machines(machines)
        known.gpu(gpu)
        name, shape = model_shape(model)
        question.check_context(shape.architecture)
        found = answer(question, name, shape, _constants(constants, rounds, measure=measure), known)
        if json:
            print_json(found)
        else:
            from tsqp.cli.plan_tables import show

            show(found)


def _constants(path: Path | None, rounds: int, *, measure: bool) -> Constants:
    from tsqp.plan.constants import load_constants

    if not measure:
        return load_constants(path)
    _prepare(path)
    from tsqp.plan.check import take_constants

    with progress() as on_step:
        taken = take_constants(rounds, f"tsqp plan --measure --rounds {rounds}", on_step)
    _keep(taken, path)
    return taken


def _check(path: Path | None, rounds: int) -> PlanCheckReport:
    _prepare(path)
    from tsqp.plan.check import check

    with progress() as on_step:
        report = check(rounds, f"tsqp plan --check --rounds {rounds}", on_step)
    _keep(report.constants, path)
    return report


def _prepare(path: Path | None) -> None:
    """Compute in this thread, whose time is measured; before minutes are spent, see whether the result can be kept."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"--constants {path}: expected the name of a file in a directory that exists.")
    share_cores()
    set_threads(1)


def _keep(constants: Constants, path: Path | None) -> None:
    from tsqp.plan.constants import write_constants

    if path is not None:
        write_constants(constants, path)
        notice(f"wrote the constants of this machine to {path}.")
