"""Tokens per second of one engine over 1, 2 and 3 workers. Prints JSON.

python benchmarks/replicas.py [--rounds 5] > benchmarks/results/replicas-DATE.json

Workers of one machine share its cores, so that more of them are no faster. So these wait instead: for each product a
fixed time, as for reading weights and starting, and a time for each row, as for multiplying. Whatever else they do is
their own: real processes, real links, products that are right. The model is tiny, so that the enclave's work is small
beside that of its workers, as it is with a large model and without a GPU. So the gains say what dividing steps gives
where workers are what is waited for, and nothing of real ones. Numbers of workers take turns in each round; medians.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import runpy
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tsqp.bench import hardware
from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine.api import Event, Failed, Finished, Generation, Sampling
from tsqp.engine.loop import GenerationEngine
from tsqp.engine.opening import open_engine
from tsqp.launch import worker_process
from tsqp.levels import Model, open_model
from tsqp.model.pack import pack
from tsqp.paths import private_socket_directory
from tsqp.threads import share_cores
from tsqp.worker import products
from tsqp.worker.batching import Waiting
from tsqp.worker.products import Product, compute
from tsqp.worker.services import WorkerService

PROMPT_TOKENS = 8
RANDOM_MODEL = Path(__file__).with_name("random_model.py")
_PATIENCE_S = 300
_POLL_S = 0.05


def serve(fixed_ms: float, row_ms: float, words: Sequence[str]) -> None:
    """Be a worker whose products take so much longer."""

    def slowly(service: WorkerService, requests: Sequence[Waiting]) -> list[Product]:
        rows = sum(len(tensor) for waiting in requests for tensor in waiting.tensors)
        time.sleep((fixed_ms + row_ms * rows) / 1e3)
        return compute(service, requests)

    products.compute = slowly
    from tsqp.cli import app  # noqa: PLC0415  a worker only

    app(["worker", *words])


def packed_model(directory: Path) -> Model:
    """Make a tiny model with random weights, and a tokenizer that knows no text."""
    torch.manual_seed(0)
    runpy.run_path(str(RANDOM_MODEL))["write"]("tiny", directory / "plain", torch.float32)
    Tokenizer(WordLevel({"the": 0, "other": 1}, unk_token="other")).save(str(directory / "plain" / "tokenizer.json"))  # noqa: S106
    pack(directory / "plain", "tiny", directory / "packed", lambda _done: None)
    return open_model(str(directory / "packed"), "masked")


def tokens_per_s(engine: GenerationEngine, requests: int, tokens: int) -> float:
    """Generate for so many requests at once."""
    ended = threading.Semaphore(0)
    failures: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Failed):
            failures.append(str(event.error))
        if isinstance(event, (Failed, Finished)):
            ended.release()

    started = time.perf_counter()
    for number in range(requests):
        ids = tuple((number * 7 + at) % 250 for at in range(PROMPT_TOKENS))
        engine.submit(
            Generation(prompt_ids=ids, max_tokens=tokens, sampling=Sampling(temperature=0), ignore_end=True), listen
        )
    for _ in range(requests):
        if not ended.acquire(timeout=_PATIENCE_S):
            raise SystemExit("a request did not end")
    if failures:
        raise SystemExit(failures[0])
    return requests * tokens / (time.perf_counter() - started)


def measure(asked: argparse.Namespace, level: str) -> dict[str, Any]:
    with ExitStack() as stack:
        model = packed_model(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        sockets = stack.enter_context(private_socket_directory())
        urls = [f"shm://{sockets}/{number}" for number in range(max(asked.workers))]
        for url in urls:
            own = [sys.executable, __file__, "--serve", str(asked.fixed_ms), str(asked.row_ms)]
            of_worker = ["--model", str(model.directory), "--device", "cpu", "--threads", "1", "--listen", url]
            stack.enter_context(worker_process([*own, *of_worker, "--json", "--exit-with-parent"]))
        engines: dict[int, GenerationEngine] = {}
        for count in asked.workers:
            settings = EngineConfig(workers=tuple(urls[:count]), kv_memory=1 << 24)
            engines[count] = stack.enter_context(open_engine(model, EnclaveConfig(level=level), settings))
            for _ in range(int(_PATIENCE_S / _POLL_S)):
                if engines[count].stats().workers_usable == count:
                    break
                time.sleep(_POLL_S)
        rates: dict[int, list[float]] = {count: [] for count in asked.workers}
        for turn in range(asked.rounds + 1):
            for count, engine in engines.items():
                rate = tokens_per_s(engine, asked.requests, asked.tokens)
                if turn:  # the first is to warm up
                    rates[count].append(rate)
    medians = {count: statistics.median(found) for count, found in rates.items()}
    return {
        "tokens_per_s": {str(count): round(value, 1) for count, value in medians.items()},
        "each_round": {str(count): [round(rate, 1) for rate in found] for count, found in rates.items()},
        "gain": {str(count): round(value / medians[asked.workers[0]], 2) for count, value in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=48, help="at once")
    parser.add_argument("--tokens", type=int, default=12, help="of each")
    parser.add_argument("--fixed-ms", type=float, default=4.0, help="of each product")
    parser.add_argument("--row-ms", type=float, default=0.5, help="of each row of a product")
    parser.add_argument("--level", choices=("verified", "masked"), action="append")
    asked = parser.parse_args()
    levels = asked.level or ["verified", "masked"]
    options = (
        f"--workers {' '.join(map(str, asked.workers))} --rounds {asked.rounds} --requests {asked.requests} "
        f"--tokens {asked.tokens} --fixed-ms {asked.fixed_ms:g} --row-ms {asked.row_ms:g} "
    )
    report = {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "commit": hardware.commit(),
        "command": f"python benchmarks/replicas.py {options}" + " ".join(f"--level {level}" for level in levels),
        "hardware": msgspec.to_builtins(hardware.describe()),
        "load": "one engine at a time; each worker sleeps for each product, on shared cores, over shared memory",
        "rounds": asked.rounds,
        "levels": {level: measure(asked, level) for level in levels},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    share_cores()
    if sys.argv[1:2] == ["--serve"]:
        serve(float(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
    else:
        main()
