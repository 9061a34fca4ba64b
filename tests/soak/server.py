"""A server over a real engine in a process of its own; at each line on its standard input it tells what it holds.

python -m soak.server '{"model": "smollm2", "level": "masked", "keys": ["ada"]}'
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tsqp.threads import set_threads, share_cores

share_cores()

from msgspec import Struct, json  # noqa: E402
from soak.holdings import Watch, holdings  # noqa: E402
from soak.orders import MODEL, Order, Ready  # noqa: E402

from tsqp.config import WORKER_LEVELS, EnclaveConfig, EngineConfig, ServeConfig, load  # noqa: E402
from tsqp.engine.loop import GenerationEngine  # noqa: E402
from tsqp.engine.memory import cache_bytes  # noqa: E402
from tsqp.engine.opening import open_engine  # noqa: E402
from tsqp.launch import local_worker  # noqa: E402
from tsqp.levels import Model, open_model  # noqa: E402
from tsqp.model.architecture import linear_groups  # noqa: E402
from tsqp.serve.app import create_app  # noqa: E402
from tsqp.serve.keys import new_key  # noqa: E402
from tsqp.serve.served_model import served  # noqa: E402
from tsqp.serve.server import Server, bind, url_of  # noqa: E402


def main(order: Order) -> None:
    """Serve until standard input ends."""
    with ExitStack() as stack:
        file = Path(stack.enter_context(TemporaryDirectory())) / "keys"
        keys = {name: new_key(file, name) for name in order.keys}
        settings = ServeConfig(port=0, api_keys=str(file), max_body_bytes=order.body_limit, drain_s=0)
        model, watch = open_model(order.model, order.level), Watch()
        engine = _engine(order, model, stack)
        host = stack.enter_context(_serving(engine, model, order.level, settings))
        ready = Ready(
            host=host,
            keys=keys,
            context=engine.context_length,
            layers=model.architecture.layers,
            inputs=max(group.in_features for group in linear_groups(model.architecture)),
        )
        _tell(ready)
        for _line in sys.stdin:
            _tell(holdings(engine, watch))


def _engine(order: Order, model: Model, stack: ExitStack) -> GenerationEngine:
    threads = set_threads(None)
    enclave, engine = load(EnclaveConfig, {"level": order.level}), EngineConfig()
    if order.level in WORKER_LEVELS:
        words = ["--model", str(model.directory), "--threads", str(threads)]
        enclave = replace(enclave, worker=stack.enter_context(local_worker(words)))
    if order.cache_tokens is not None:
        engine = replace(engine, kv_memory=cache_bytes(model.architecture, order.cache_tokens))
    return stack.enter_context(open_engine(model, enclave, engine))


@contextmanager
def _serving(engine: GenerationEngine, model: Model, level: str, settings: ServeConfig) -> Iterator[str]:
    """Answer requests in a thread; yield host and port."""
    started = threading.Event()
    offered = served(model.tokenizer, model.architecture.vocab_size, MODEL, level)
    with bind(settings) as listening:
        server = Server(create_app(engine, offered, settings), engine, settings, started.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        started.wait()
        yield url_of(listening, settings).removeprefix("http://")
        server.should_exit = True
        thread.join()


def _tell(what: Struct) -> None:
    sys.stdout.buffer.write(json.encode(what) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(json.decode(sys.argv[1], type=Order))
