"""Real engines behind the HTTP server: over the bundled model, or a tiny one with a tokenizer and a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bad_requests import COMPLETIONS, post
from fake_engine import write_tokenizer
from http_server import Running, http_server
from openai import OpenAI
from tiny_models import tiny_checkpoint

from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine.loop import GenerationEngine
from tsqp.engine.memory import cache_bytes
from tsqp.engine.opening import open_engine
from tsqp.launch import local_worker
from tsqp.levels import Model, open_model
from tsqp.serve.served_model import served

MODEL = "tiny"
VOCABULARY = 258
CONTEXT = 1024
# An engine's default cache is 1 GiB, and a test process has many engines.
CACHE_TOKENS = 8 * CONTEXT
BODY_LIMIT = 1 << 14


def speaking_checkpoint(directory: Path, **options: Any) -> Path:
    """Save a tiny random model whose tokens are the 256 bytes and two special ones; it has a chat template.

    Args:
        directory: where to.
        options: as ``tiny_checkpoint`` takes them.
    """
    tiny_checkpoint(directory, vocab_size=VOCABULARY, bos_token_id=256, eos_token_id=257, **options)
    write_tokenizer(directory)
    return directory


@contextmanager
def real_engine(model: Model, level: str, worker: str | None = None, **settings: Any) -> Iterator[GenerationEngine]:
    """Run an engine.

    Args:
        model: from ``open_model`` for this level.
        level: of protection.
        worker: its address; None starts one, if the level needs one.
        settings: of ``EngineConfig``.
    """
    config = EnclaveConfig(level=level, worker=worker)
    with ExitStack() as stack:
        if level != "local" and worker is None:
            config = replace(config, worker=stack.enter_context(local_worker(["--model", str(model.directory)])))
        room = {"kv_memory": cache_bytes(model.architecture, CACHE_TOKENS)}
        yield stack.enter_context(open_engine(model, config, EngineConfig(**{**room, **settings})))


@contextmanager
def served_engine(engine: GenerationEngine, model: Model, level: str, **settings: Any) -> Iterator[Running]:
    """Serve an engine as the model ``tiny``; ``settings`` are ``ServeConfig``'s."""
    offered = served(model.tokenizer, model.architecture.vocab_size, MODEL, level)
    with http_server(engine, model=offered, **settings) as running:
        yield running


@contextmanager
def real_server(directory: Path, level: str, worker: str | None = None, **settings: Any) -> Iterator[Running]:
    """Run an engine over a checkpoint and serve it."""
    model = open_model(str(directory), level)
    with real_engine(model, level, worker) as engine, served_engine(engine, model, level, **settings) as running:
        yield running


def host_of(server: Running) -> str:
    return server.url.removeprefix("http://")


def client_of(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


class Tiny:
    """A server of a tiny model and its engine."""

    def __init__(self, directory: Path, level: str, stack: ExitStack, worker: str | None = None, **sizes: Any) -> None:
        model = open_model(str(directory), level)
        self.engine = stack.enter_context(real_engine(model, level, worker, **sizes))
        self.server = stack.enter_context(served_engine(self.engine, model, level, max_body_bytes=BODY_LIMIT))
        self.host = host_of(self.server)

    def complete(self, **body: object) -> Any:
        answered = post(self.host, COMPLETIONS, json.dumps({"model": MODEL, "temperature": 0, **body}).encode())
        assert answered.status == 200, answered
        return answered.content
