"""``tsqp generate``: continue one prompt at a level and print the text as it comes."""

from __future__ import annotations

import queue
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tsqp import config as settings
from tsqp.cli.reporting import notes, progress, reported
from tsqp.cli.workers import with_worker
from tsqp.config import WORKER_LEVELS, EnclaveConfig, EngineConfig
from tsqp.engine.api import Event, Failed, Finished, Generation, Sampling, Token
from tsqp.errors import InputError, SetupError
from tsqp.threads import set_threads, share_cores

if TYPE_CHECKING:
    from tsqp.levels import Model


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; with --chat, the user's message.")],
    level: Annotated[
        str | None,
        typer.Option(help="open, verified, masked or local; see tsqp prefill.", show_default="open"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="smollm2, a Hugging Face directory, a .gguf file or a packed model.", show_default="smollm2"),
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
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="How many tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that reach this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep so many of the likeliest tokens; 0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Keep tokens this times as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes repetition less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers.", show_default="drawn")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text, repeatable.", show_default="none")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="float32")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
) -> None:
    """Continue a prompt and print the text as it comes. Counts go to standard error."""
    with reported(as_json=False):
        flags = {
            "model": model,
            "level": level,
            "worker": worker,
            "worker_key": worker_key,
            "own_key": own_key,
            "insecure": "on" if insecure else None,
            "dtype": dtype,
            "threads": threads,
        }
        enclave = settings.load(EnclaveConfig, flags)
        sampling = Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        if enclave.level in WORKER_LEVELS:
            share_cores()
        _run(enclave, prompt, sampling, max_tokens=max_tokens, stop=tuple(stop or ()), chat=chat)


def _run(
    enclave: EnclaveConfig, prompt: str, sampling: Sampling, *, max_tokens: int, stop: tuple[str, ...], chat: bool
) -> None:
    from tsqp.engine.memory import memory
    from tsqp.engine.opening import open_engine
    from tsqp.levels import check_peers, open_model

    threads = set_threads(enclave.threads)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with ExitStack() as stack:
        with progress() as step:
            if enclave.level in WORKER_LEVELS and enclave.worker:
                check_peers(enclave.level, enclave)
            model = open_model(enclave.model, enclave.level, step)
            generation = Generation(
                prompt_ids=tuple(_prompt_ids(model, prompt, chat=chat)),
                max_tokens=max_tokens,
                sampling=sampling,
                stop=stop,
            )
            enclave = stack.enter_context(with_worker(enclave, model, threads, step, _notice))
            room = _for_one(model, generation)
            _notice(f"memory: {memory(model.architecture, enclave, room)}.")
            engine = stack.enter_context(open_engine(model, enclave, room, on_step=step, on_notice=_notice))
        engine.submit(generation, events.put)
        _print(events)


def _for_one(model: Model, generation: Generation) -> EngineConfig:
    """Return settings of an engine for one request: room for it, as far as the model takes it, and nothing else."""
    from tsqp.engine.memory import cache_bytes

    tokens = min(len(generation.prompt_ids) + generation.max_tokens, model.architecture.context_length)
    kv_memory = cache_bytes(model.architecture, tokens)
    return EngineConfig(kv_memory=kv_memory, max_running=1, step_tokens=128, reuse_prefixes="off")


def _prompt_ids(model: Model, prompt: str, *, chat: bool) -> list[int]:
    if model.tokenizer is None:
        raise InputError("this model has no tokenizer.json, so it takes no text prompt.")
    if not chat:
        return model.tokenizer.encode(prompt)
    try:
        from tsqp.serve.chat_template import ChatTemplate
    except ModuleNotFoundError as error:
        raise SetupError(f"{error.name} is not installed: run 'pip install tsqp[serve]'.") from error

    conventions = model.tokenizer.conventions
    if not conventions.chat_template:
        raise InputError("this model has no chat template: leave out --chat.")
    template = ChatTemplate(conventions.chat_template, conventions.named)
    return model.tokenizer.encode_bare(template.render([{"role": "user", "content": prompt}]))


def _print(events: queue.SimpleQueue[Event]) -> None:
    """Write text as it comes, then what ended it.

    Raises:
        TsqpError: the request failed.
    """
    while True:
        event = events.get()
        if isinstance(event, (Token, Finished)):
            sys.stdout.write(event.text)
            sys.stdout.flush()
        if isinstance(event, Failed):
            sys.stdout.write("\n")
            raise event.error
        if isinstance(event, Finished):
            sys.stdout.write("\n")
            notes.print(f"{event.prompt_tokens} prompt tokens, {event.completion_tokens} generated ({event.reason}).")
            return


def _notice(sentence: str) -> None:
    notes.print(escape(sentence), soft_wrap=True)
