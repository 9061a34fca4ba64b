"""How many prefills a worker answers for 8 clients at once, against 1 client. Prints JSON.

python benchmarks/worker_throughput.py [--clients 8] [--rounds 7] > benchmarks/results/worker-throughput-DATE.json

One thread generates the load: threads of one interpreter would wait for each other, and processes of their own take
the worker's cores. Each client is a session that sends the requests of one prefill after the other as an enclave does,
at `open` the first qkv and a chain for each layer, with fixed random activations, each once the reply to the one before
is here. Nothing else of an enclave is computed. One client and several take turns within each round; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec
import torch

from tsqp.bench import hardware
from tsqp.bench.floors import product_rows
from tsqp.config import EnclaveConfig
from tsqp.enclave.session import Session
from tsqp.launch import local_worker
from tsqp.model.architecture import chains, linear_groups, read_config
from tsqp.model.locate import BUNDLED, locate
from tsqp.threads import share_cores
from tsqp.transport.client import open_client
from tsqp.transport.urls import parse
from tsqp.wire import codec, messages

TOKENS = 16
LEVELS: dict[str, tuple[str, ...]] = {"open": (), "exact": ("--exact",)}
Header = Callable[[int], messages.AnyRequest]
Step = tuple[Header, memoryview]


def replay(model: str, level: str) -> list[Step]:
    """Return the requests for products of one prefill, in order; the last layer sees one position after attention."""
    config = read_config(locate(model))
    rows = product_rows(config, 1, TOKENS)
    groups = {group.name: group for group in linear_groups(config)}
    generator = torch.Generator().manual_seed(0)
    if level == "exact":
        shapes = [(rows[name], group.in_features) for name, group in groups.items()]
        words = [torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32) for shape in shapes]
        return [
            _step(partial(messages.LinearExact, group=name), x_MK) for name, x_MK in zip(groups, words, strict=True)
        ]
    first = next(iter(groups))
    x_MK = torch.randn(TOKENS, config.hidden_size, generator=generator)
    steps = [_step(partial(messages.Linear, group=first), x_MK)]
    for names in chains(config):
        columns = groups[names[0]].in_features + config.hidden_size
        x_MC = torch.randn(rows[names[0]], columns, generator=generator)
        steps.append(_step(partial(messages.LinearChain, groups=names), x_MC))
    return steps


def _step(make: Callable[..., messages.AnyRequest], x: torch.Tensor) -> Step:
    spec = codec.spec_of(x)
    return (lambda request_id: make(id=request_id, x=spec)), codec.frame_of(x)


def throughput(sessions: Sequence[Session], steps: Sequence[Step], prefills: int) -> float:
    """Return prefills per second of all sessions at once."""
    waiting: dict[Session, int] = {}
    started = time.perf_counter()
    for header, frame in [*steps] * prefills:
        for session in sessions:
            if session in waiting:
                session.result(waiting[session], messages.Result)
            waiting[session] = session.submit(header, [frame])
    for session, request_id in waiting.items():
        session.result(request_id, messages.Result)
    return len(sessions) * prefills / (time.perf_counter() - started)


@contextlib.contextmanager
def connected(url: str, count: int) -> Iterator[list[Session]]:
    """Open sessions to a worker."""
    config = EnclaveConfig()
    with contextlib.ExitStack() as stack:
        sessions = []
        for _ in range(count):
            sessions.append(Session(open_client(parse(url), config.max_message_bytes), config.request_timeout_s))
            stack.callback(sessions[-1].close)
            sessions[-1].hello(config.connect_timeout_s)
        yield sessions


def measure(asked: argparse.Namespace, level: str) -> dict[str, Any]:
    """Let one client and several take turns."""
    steps, clients = replay(asked.model, level), asked.clients
    rates: dict[int, list[float]] = {1: [], clients: []}
    with (
        local_worker(["--model", asked.model, *LEVELS[level]], asked.scheme) as url,
        connected(url, clients) as sessions,
    ):
        for turn in range(asked.rounds + 1):
            for count, found in rates.items():
                rate = throughput(sessions[:count], steps, asked.prefills)
                if turn:  # the first is to warm up
                    found.append(rate)
        stats = counters(sessions[0])
    medians = {count: statistics.median(found) for count, found in rates.items()}
    return {
        "requests_per_prefill": len(steps),
        "prefills_per_s": {str(count): round(value, 2) for count, value in medians.items()},
        "each_round": {str(count): [round(rate, 2) for rate in found] for count, found in rates.items()},
        "gain": round(medians[clients] / medians[1], 2),
        "requests_per_product": round(stats.product_requests / max(1, stats.products), 2),
    }


def counters(session: Session) -> messages.StatsResult:
    """Ask the worker for its counters."""
    return session.result(session.submit(lambda i: messages.Stats(id=i)), messages.StatsResult)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefills", type=int, default=6, help="of each client per turn")
    parser.add_argument("--scheme", choices=("shm", "ipc"), default="shm")
    parser.add_argument("--level", choices=tuple(LEVELS), action="append")
    asked = parser.parse_args()
    levels = asked.level or list(LEVELS)
    options = f"--model {asked.model} --clients {asked.clients} --rounds {asked.rounds} --prefills {asked.prefills}"
    report = {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "commit": hardware.commit(),
        "command": f"python benchmarks/worker_throughput.py {options} --scheme {asked.scheme}",
        "hardware": msgspec.to_builtins(hardware.describe()),
        "load": f"one thread for all clients; prefills of {TOKENS} tokens, over {asked.scheme}",
        "rounds": asked.rounds,
        "levels": {level: measure(asked, level) for level in levels},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    share_cores()
    main()
