"""``tsqp demo``: a server whose page shows, beside the chat, what its worker sees."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tsqp import config as settings
from tsqp.cli.reporting import notes, progress, reported
from tsqp.config import WORKER_LEVELS, EnclaveConfig, EngineConfig, ServeConfig
from tsqp.errors import ConfigError, SetupError
from tsqp.threads import set_threads, share_cores

if TYPE_CHECKING:
    import socket

    from fastapi import FastAPI

    from tsqp.engine.api import Engine
    from tsqp.serve.served_model import ServedModel
    from tsqp.serve.view import ViewSource

DEFAULT_LEVEL = "masked"
_OPENING = {
    "open": "the worker reads every prompt, and the page shows it.",
    "verified": "the worker's results are checked, and it reads every prompt; the page shows how.",
    "masked": "the worker sees uniform words only; the page shows them.",
}


def demo(
    level: Annotated[
        str | None,
        typer.Option(
            help="masked: the worker sees uniform words only. open, verified: it reads every prompt.",
            show_default=DEFAULT_LEVEL,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="smollm2, a Hugging Face directory, a .gguf file or a packed model.", show_default="smollm2"),
    ] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 takes a free one.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the page's address.")] = False,
) -> None:
    """Chat in the browser and watch, live, what the worker sees. Stop it with Ctrl-C.

    It starts a worker and a server on this machine. The worker shows what it is sent, which no other worker does: use
    it to look, not to serve.
    """
    with reported(as_json=False):
        enclave = settings.load(
            EnclaveConfig, {"model": model, "level": level, "threads": threads}, defaults={"level": DEFAULT_LEVEL}
        )
        engine = settings.load(EngineConfig)
        served = settings.load(ServeConfig, {"host": "127.0.0.1", "port": port})
        if enclave.level not in WORKER_LEVELS:
            raise ConfigError(
                f"at the level {enclave.level} there is no worker to show: choose one of {', '.join(WORKER_LEVELS)}."
            )
        if enclave.worker or enclave.worker_key or engine.workers or engine.worker_keys or engine.directory:
            raise ConfigError(
                "tsqp demo starts a worker of its own, which has no key: unset LLAMA_GPU_ENDPOINT, TSQP_WORKER_KEY, "
                "TSQP_WORKERS, TSQP_WORKER_KEYS and TSQP_DIRECTORY, or use tsqp serve."
            )
        _run(enclave, engine, served, with_browser=not no_browser)


def _run(enclave: EnclaveConfig, engine: EngineConfig, served: ServeConfig, *, with_browser: bool) -> None:
    """Refuse what is unsafe, take the address, load the model, start the worker and answer until stopped."""
    share_cores()
    try:
        from tsqp.serve.app import create_app
        from tsqp.serve.server import bind, check_exposure
    except ModuleNotFoundError as error:
        raise SetupError(f"{error.name} is not installed: run 'pip install tsqp[serve]'.") from error
    from tsqp.serve.process import forbid_core_dumps

    forbid_core_dumps()
    check_exposure(served, _notice)
    with bind(served) as listening, ExitStack() as stack:
        running, model, view = _started(enclave, engine, stack)
        app = create_app(running, model, served, default_tokens=engine.default_tokens, view=view)
        _answer(running, app, model.level, served, listening, with_browser=with_browser)


def _started(enclave: EnclaveConfig, engine: EngineConfig, stack: ExitStack) -> tuple[Engine, ServedModel, ViewSource]:
    """Open the model, start the demonstration worker and the engine; the stack ends them in reverse."""
    from tsqp.engine.memory import memory
    from tsqp.engine.opening import open_engine
    from tsqp.levels import open_model
    from tsqp.model.locate import model_name
    from tsqp.serve.demo import demo_worker
    from tsqp.serve.served_model import served
    from tsqp.serve.view import ViewSource

    threads = set_threads(enclave.threads)
    with progress() as step:
        model = open_model(enclave.model, enclave.level, step)
        offered = served(model.tokenizer, model.architecture.vocab_size, model_name(enclave.model), enclave.level)
        _notice(f"memory: {memory(model.architecture, enclave, engine)}.")
        step("starting a worker", 0.0)
        words = ["--model", str(model.directory), "--dtype", enclave.dtype, "--threads", str(threads)]
        worker = stack.enter_context(demo_worker(words))
        step("starting a worker", 1.0)
        view = ViewSource(worker.view, enclave.level)
        stack.callback(view.close)
        enclave = replace(enclave, worker=worker.url)
        running: Engine = stack.enter_context(open_engine(model, enclave, engine, on_step=step, on_notice=_notice))
    return running, offered, view


def _answer(
    engine: Engine, app: FastAPI, level: str, served: ServeConfig, listening: socket.socket, *, with_browser: bool
) -> None:
    from tsqp.serve.server import Server, url_of

    url = url_of(listening, served)

    def ready() -> None:
        typer.echo(f"level {level}: {_OPENING[level]}")
        typer.echo(f"the page is at {url}; Ctrl-C stops")
        if with_browser and has_browser():
            # It may take its time, and the server must answer meanwhile.
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    Server(app, engine, served, ready).run(sockets=[listening])


def has_browser() -> bool:
    """Tell whether there is a browser with windows; one in the terminal would take it over."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True


def _notice(sentence: str) -> None:
    notes.print(escape(sentence), soft_wrap=True)
