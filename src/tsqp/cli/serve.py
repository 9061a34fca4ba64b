"""``tsqp serve``: OpenAI's HTTP API before an enclave."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsqp import config as settings
from tsqp import logs
from tsqp.cli.reporting import notice, pool_rows, progress, reported
from tsqp.cli.workers import nearest
from tsqp.config import WORKER_LEVELS, EnclaveConfig, EngineConfig, ServeConfig
from tsqp.errors import ConfigError, SetupError
from tsqp.threads import set_threads, share_cores

if TYPE_CHECKING:
    import socket

    from tsqp.engine.api import Engine
    from tsqp.serve.attestation import Identity
    from tsqp.serve.served_model import ServedModel

DEFAULT_LEVEL = "masked"
LEVELS = ("masked", "verified", "open", "local")
_READS = {
    "open": "level open: the worker reads every prompt.",
    "verified": "level verified: the worker reads every prompt; its results are checked.",
}
_PROVES_NOTHING = (
    "ATTESTATION IS 'none', FOR DEVELOPMENT: this server proves nothing of itself, whoever runs it can read every "
    "prompt, and every client that checks refuses it."
)
_PREFIXES_SHOW = (
    "prefixes of prompts are reused at masked: where one is found again, the worker gets fewer rows, and so learns "
    "which prompts begin alike, and for how many tokens."
)


def serve(
    model: Annotated[
        str | None,
        typer.Option(help="smollm2, a Hugging Face directory, a .gguf file or a packed model.", show_default="smollm2"),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(
            help="masked: the worker sees uniform words only, and its results are checked. verified: checked. open: "
            "the worker reads every prompt. local: no worker.",
            show_default=DEFAULT_LEVEL,
        ),
    ] = None,
    worker: Annotated[
        list[str] | None,
        typer.Option(
            help="A worker's address, repeatable: steps are divided over all of them.",
            show_default="starts one of its own",
        ),
    ] = None,
    worker_key: Annotated[
        list[str] | None,
        typer.Option(help="Public key of each worker, in order: NAME.key or its text.", show_default="links in clear"),
    ] = None,
    directory: Annotated[
        str | None,
        typer.Option(
            help="Where a pool says which workers and dealers there are now: http://HOST:PORT/PATH or a file. Workers "
            "must hold one of --worker-key then; masked needs none.",
            show_default=False,
        ),
    ] = None,
    worker_rows: Annotated[
        int | None,
        typer.Option(help="Several workers: use one more for each so many rows of a step.", show_default="16"),
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
        typer.Option(help="masked: for how many tokens masks are kept ready.", show_default="by the batch"),
    ] = None,
    mask_memory: Annotated[
        int | None, typer.Option(help="Bytes that the mask pool may take.", show_default="1 GiB")
    ] = None,
    codes: Annotated[
        str | None,
        typer.Option(help="A packed model to read the codes from.", show_default="streamed from the worker"),
    ] = None,
    kv_memory: Annotated[int | None, typer.Option(help="Bytes for keys and values.", show_default="1 GiB")] = None,
    max_running: Annotated[
        int | None, typer.Option(help="Requests that are generated together.", show_default="64")
    ] = None,
    max_queued: Annotated[
        int | None, typer.Option(help="Requests of one API key that wait for room.", show_default="256")
    ] = None,
    step_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of prompts and answers that a step computes at most.", show_default="256"),
    ] = None,
    default_tokens: Annotated[
        int | None,
        typer.Option(help="How long an answer to a chat may be that names no limit.", show_default="1024"),
    ] = None,
    reuse_prefixes: Annotated[
        str | None,
        typer.Option(
            help="on or off: find beginnings of prompts again, within one API key.", show_default="off at masked"
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="float32")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.", show_default="8000")] = None,
    served_model: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="its name")
    ] = None,
    api_keys: Annotated[
        str | None, typer.Option(help="File of hashed API keys.", show_default="no key is asked for")
    ] = None,
    new_api_key: Annotated[
        str | None,
        typer.Option(help="Make a key of this name, add it to --api-keys, print it once, and end.", show_default=False),
    ] = None,
    tls_cert: Annotated[
        str | None, typer.Option(help="Certificate and its chain, PEM.", show_default="HTTP in clear")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its key, PEM.", show_default=False)] = None,
    attestation: Annotated[
        str | None,
        typer.Option(
            help="What proves to clients which code runs here: gramine, tdx, none (for development: proves nothing), "
            "off, or auto: by the TEE. With one the server makes its own TLS key.",
            show_default="auto",
        ),
    ] = None,
    padding: Annotated[
        str | None, typer.Option(help="on or off: pad answers to few sizes.", show_default="on at masked")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.", show_default="text")] = None,
) -> None:
    """Serve OpenAI's HTTP API: completions and chats, continued at any protection level. Stop it with Ctrl-C."""
    with reported(as_json=False):
        if new_api_key is not None:
            _make_key(api_keys, new_api_key)
            return
        enclave = settings.load(
            EnclaveConfig,
            {
                "model": model,
                "level": level,
                "own_key": own_key,
                "insecure": "on" if insecure else None,
                "masks": masks,
                "dealers": tuple(dealer) if dealer else None,
                "dealer_keys": tuple(dealer_key) if dealer_key else None,
                "mask_pool": pool_rows(mask_pool),
                "mask_memory": mask_memory,
                "codes": codes,
                "dtype": dtype,
                "threads": threads,
            },
            defaults={"level": DEFAULT_LEVEL},
        )
        engine = {
            "workers": tuple(worker) if worker else None,
            "worker_keys": tuple(worker_key) if worker_key else None,
            "directory": directory,
            "worker_rows": worker_rows,
            "kv_memory": kv_memory,
            "max_running": max_running,
            "max_queued": max_queued,
            "step_tokens": step_tokens,
            "default_tokens": default_tokens,
            "reuse_prefixes": reuse_prefixes,
        }
        flags = {
            "host": host,
            "port": port,
            "served_model": served_model,
            "api_keys": api_keys,
            "tls_cert": tls_cert,
            "tls_key": tls_key,
            "attestation": attestation,
            "padding": padding,
            "log_level": log_level,
            "log_format": log_format,
        }
        served = settings.load(ServeConfig, flags)
        logs.set_up(served.log_level, served.log_format)
        _run(enclave, settings.load(EngineConfig, engine), served)


def _make_key(file: str | None, name: str) -> None:
    from tsqp.serve.keys import new_key

    if file is None:
        raise ConfigError("--new-api-key needs the file to add it to: give --api-keys FILE too.")
    typer.echo(new_key(Path(file), name))
    notice(f"this is the only time the key is shown; {file} holds its hash.")


def _run(enclave: EnclaveConfig, engine: EngineConfig, served: ServeConfig) -> None:
    """Refuse what is unsafe, take the address, then load the model and answer until stopped."""
    if enclave.level not in LEVELS:
        raise ConfigError(f"tsqp serve has no level {enclave.level}: choose one of {', '.join(LEVELS)}.")
    if enclave.level in WORKER_LEVELS:
        share_cores()
    try:
        from tsqp.serve.server import bind, check_exposure
    except ModuleNotFoundError as error:
        raise SetupError(f"{error.name} is not installed: run 'pip install tsqp[serve]'.") from error
    from tsqp.serve.process import forbid_core_dumps

    forbid_core_dumps()
    identity = _identity(served)
    check_exposure(served, notice, own_key=identity is not None)
    _check_peers(enclave, engine)
    with bind(served) as listening, ExitStack() as stack:
        running, model = _loaded(enclave, engine, served, identity, stack)
        _answer(running, model, engine.default_tokens, served, identity, listening)


def _identity(served: ServeConfig) -> Identity | None:
    """Return the server's TLS key and what attests it; None where nothing does."""
    from tsqp.attest.attesters import attester_for
    from tsqp.serve.attestation import Identity

    attester = attester_for(served.attestation)
    if attester is None:
        return None
    if attester.tee == "none":
        notice(_PROVES_NOTHING)
    return Identity(attester)


def _check_peers(enclave: EnclaveConfig, engine: EngineConfig) -> None:
    """Refuse workers and dealers that cannot work, and say what the worker and the network can read."""
    from tsqp.engine.addresses import one_each
    from tsqp.engine.directory import pins
    from tsqp.transport.urls import parse

    if engine.directory:
        pins(enclave, engine)
    each = () if engine.directory else one_each(enclave, engine)
    if enclave.level in _READS:
        notice(_READS[enclave.level])
        for config in each:
            if config.worker and not config.worker_key and not parse(config.worker).stays_on_this_machine:
                notice(f"{config.worker} is not on this machine: activations travel to it unencrypted.")
    if enclave.level == "masked" and engine.reuse_prefixes == "on":
        notice(_PREFIXES_SHOW)


def _loaded(
    enclave: EnclaveConfig, engine: EngineConfig, served: ServeConfig, identity: Identity | None, stack: ExitStack
) -> tuple[Engine, ServedModel]:
    """Open the model, start a worker where none is given, and the engine; the stack ends them in reverse."""
    from tsqp.engine.memory import memory
    from tsqp.engine.opening import open_engine
    from tsqp.launch import own_worker
    from tsqp.levels import digest_of, open_model
    from tsqp.model.locate import model_name
    from tsqp.serve import served_model
    from tsqp.serve.attestation import claims_of

    threads = set_threads(enclave.threads)
    revive = None
    with progress() as step:
        model = open_model(enclave.model, enclave.level, step)
        name = served.served_model or model_name(enclave.model)
        offered = served_model.served(model.tokenizer, model.architecture.vocab_size, name, enclave.level)
        if identity is not None:
            identity.claim(claims_of(enclave, engine, digest_of(model, step)))
        notice(f"memory: {memory(model.architecture, enclave, engine)}.")
        if engine.directory:
            pass  # its workers are met over the links that it names
        elif enclave.level in WORKER_LEVELS and not engine.workers and enclave.worker is None:
            step("starting a worker", 0.0)
            words = ["--model", str(model.directory), "--dtype", enclave.dtype, "--threads", str(threads)]
            own = stack.enter_context(own_worker(words))
            enclave, revive = replace(enclave, worker=own.url), own.revive
            step("starting a worker", 1.0)
        elif not engine.worker_keys and not enclave.worker_key:
            engine = replace(engine, workers=tuple(nearest(address, notice) for address in engine.workers))
            enclave = replace(enclave, worker=enclave.worker and nearest(enclave.worker, notice))
        running: Engine = stack.enter_context(
            open_engine(model, enclave, engine, on_step=step, on_notice=notice, revive=revive)
        )
    return running, offered


def _answer(
    engine: Engine,
    model: ServedModel,
    default_tokens: int,
    served: ServeConfig,
    identity: Identity | None,
    listening: socket.socket,
) -> None:
    from tsqp.serve.app import create_app
    from tsqp.serve.server import Server, url_of

    def ready() -> None:
        url = url_of(listening, served, own_key=identity is not None)
        typer.echo(f"{model.name}, level {model.level}: listening on {url}; Ctrl-C stops")

    app = create_app(engine, model, served, default_tokens=default_tokens, identity=identity)
    Server(app, engine, served, ready, identity.context() if identity else None).run(sockets=[listening])
