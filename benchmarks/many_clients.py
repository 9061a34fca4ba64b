"""How one worker serves many clients at once: throughput, shares, latencies and memory. Prints JSON.

python benchmarks/many_clients.py [--rounds 5] > benchmarks/results/many-clients-DATE.json

Processes without torch generate the load (client_load.py), each for several clients, which replay what an enclave
sends while it answers ``--rows`` prompts together: at `open` the first qkv and a chain for each layer, at `exact` every
linear group, one request in flight each. Worker, load and whatever else runs share the cores, and a turn is short, so
each round runs every number of clients once, in turn; medians over rounds. ``throughput`` counts requests per second of
all clients; ``least_share`` is the slowest client's part of an equal share.

With ``--enclaves`` real enclaves (``tsqp prefill``) run alone, and beside as many clients as there are at most: that
each ends with the same token, and how long a prefill takes.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tsqp.bench import hardware
from tsqp.config import EnclaveConfig
from tsqp.enclave.session import Session
from tsqp.launch import worker_process
from tsqp.model.architecture import chains, linear_groups, read_config
from tsqp.model.locate import BUNDLED, locate
from tsqp.transport.client import open_client
from tsqp.transport.urls import parse
from tsqp.wire import messages

LEVELS: dict[str, tuple[str, ...]] = {"open": (), "exact": ("--exact",)}
_LOAD = Path(__file__).with_name("client_load.py")


def replay(model: str, level: str, rows: int) -> list[dict[str, Any]]:
    """Return the requests for products of one step, in order."""
    config = read_config(locate(model))
    groups = {group.name: group for group in linear_groups(config)}
    if level == "exact":
        return [
            _step("linear_exact", "words", ["int32", rows, group.in_features], group=name)
            for name, group in groups.items()
        ]
    first = next(iter(groups))
    steps = [_step("linear", "floats", ["float32", rows, config.hidden_size], group=first)]
    for names in chains(config):
        columns = groups[names[0]].in_features + config.hidden_size
        steps.append(_step("linear_chain", "floats", ["float32", rows, columns], groups=names))
    return steps


def _step(op: str, fill: str, x: Sequence[Any], **words: Any) -> dict[str, Any]:  # noqa: ANN401  of a header
    return {"header": {"op": op, "x": {"dtype": x[0], "shape": x[1:]}, **words}, "fill": fill}


class Load:
    """Processes that generate load.

    Args:
        url: the worker.
        job: of client_load.py, but for ``clients`` and ``seed``.
        clients: how many together.
        processes: at most so many share them.
    """

    def __init__(self, url: str, job: dict[str, Any], clients: int, processes: int) -> None:
        processes = min(processes, clients)
        self._until_told = not job["seconds"]
        self._running = []
        for number in range(processes):
            count = clients // processes + (number < clients % processes)
            process = subprocess.Popen(
                [sys.executable, str(_LOAD), url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._running.append(process)
            self._say(process, json.dumps({**job, "clients": count, "seed": 1000 * number}))
        for process in self._running:
            self._hear(process)

    @staticmethod
    def _say(process: subprocess.Popen[str], line: str) -> None:
        if process.stdin is not None:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()

    @staticmethod
    def _hear(process: subprocess.Popen[str]) -> str:
        line = process.stdout.readline() if process.stdout is not None else ""
        if not line:
            raise SystemExit("a load generator ended")
        return line

    def begin(self) -> None:
        """Let all begin."""
        for process in self._running:
            self._say(process, "")

    def end(self) -> list[dict[str, Any]]:
        """End those that run until they are told; return what each says at its end."""
        if self._until_told:
            self.begin()
        reports = [json.loads(self._hear(process)) for process in self._running]
        for process in self._running:
            process.communicate()
        return reports


def turn(url: str, job: dict[str, Any], clients: int, processes: int) -> dict[str, Any]:
    """Let so many clients run for a while; return what came of it."""
    load = Load(url, job, clients, processes)
    load.begin()
    reports = load.end()
    failures = [failure for report in reports for failure in report["failures"]]
    if failures:
        raise SystemExit(f"{len(failures)} requests failed, such as {failures[0]}")
    rates = [served / report["elapsed_s"] for report in reports for served in report["served"]]
    return {
        "throughput": sum(rates),
        "least_share": min(rates) / statistics.mean(rates),
        "p50_ms": statistics.median(report["latencies_ms"]["p50"] for report in reports),
        "p99_ms": max(report["latencies_ms"]["p99"] for report in reports),
    }


def medians(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each number over all rounds, and each round's throughput."""
    found: dict[str, Any] = {name: round(statistics.median(each[name] for each in turns), 3) for name in turns[0]}
    found["each_round"] = [round(each["throughput"], 1) for each in turns]
    return found


def memory_mib(pid: int) -> float:
    """Return how much of a process is in memory, in MiB; 0 where /proc does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024, 1)


def measure(asked: argparse.Namespace, level: str) -> dict[str, Any]:
    """Let all numbers of clients take turns on one worker."""
    steps = replay(asked.model, level, asked.rows)
    job = {"steps": steps, "seconds": asked.seconds}
    turns: dict[int, list[dict[str, Any]]] = {count: [] for count in asked.clients}
    beside: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        url = f"ipc://{directory}/worker"
        words = [sys.executable, "-m", "tsqp", "worker", "--model", asked.model, "--listen", url, "--json"]
        with worker_process([*words, "--exit-with-parent", *LEVELS[level]]) as process:
            turn(url, job, 1, 1)  # to warm up
            before = memory_mib(process.pid)
            for _ in range(asked.rounds):
                for count, found in turns.items():
                    found.append(turn(url, job, count, asked.processes))
            after = memory_mib(process.pid)
            counters = stats(url)
            if asked.enclaves and level == "open":
                beside = enclaves(url, job, asked)
    return {
        "requests_per_step": len(steps),
        "clients": {str(count): medians(found) for count, found in turns.items()},
        "requests_per_product": round(counters.product_requests / max(1, counters.products), 2),
        "refused": counters.refused,
        "worker_memory_mib": {"before": before, "after": after},
        **beside,
    }


def stats(url: str) -> messages.StatsResult:
    """Ask the worker for its counters."""
    config = EnclaveConfig()
    session = Session(open_client(parse(url), config.max_message_bytes), config.request_timeout_s)
    try:
        return session.result(session.submit(lambda i: messages.Stats(id=i)), messages.StatsResult)[0]
    finally:
        session.close()


def enclaves(url: str, job: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """Let real enclaves run alone, and beside the load of the others."""
    others = max(asked.clients)
    alone = prefills(url, asked)
    load = Load(url, {**job, "seconds": 0}, others, asked.processes)
    load.begin()
    beside = prefills(url, asked)
    reports = load.end()
    failures = sum(len(report["failures"]) for report in reports)
    tokens = {each["next_tokens"][0] for each in (*alone, *beside)}
    return {
        "enclaves": {
            "count": asked.enclaves,
            "tokens": asked.tokens,
            "beside_clients": others,
            "failed_requests_of_load": failures,
            "same_next_token": len(tokens) == 1,
            "prefill_s_alone": [each["prefill_s"] for each in alone],
            "prefill_s_beside": [each["prefill_s"] for each in beside],
        }
    }


def prefills(url: str, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Run enclaves at once, each several prefills one after the other; return what they report."""
    words = [sys.executable, "-m", "tsqp", "prefill", "--model", asked.model, "--worker", url, "--json"]
    words += ["--tokens", str(asked.tokens), "--repeat", "5"]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(asked.enclaves)]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"an enclave failed: {outputs}")
    return [json.loads(output) for output in outputs]


def ratios(level: dict[str, Any]) -> dict[str, float]:
    """Return what is promised of many clients, as far as it was measured."""
    found = level["clients"]
    promised = {}
    if {"8", "64"} <= found.keys():
        promised["throughput_64_over_8"] = round(found["64"]["throughput"] / found["8"]["throughput"], 3)
    if "16" in found:
        promised["least_share_of_16"] = found["16"]["least_share"]
    return promised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each turn")
    parser.add_argument("--rows", type=int, default=8, help="of each request")
    parser.add_argument("--processes", type=int, default=2, help="that generate load")
    parser.add_argument("--enclaves", type=int, default=0, help="real ones beside the load, at open")
    parser.add_argument("--tokens", type=int, default=16, help="of their prompts")
    parser.add_argument("--level", choices=tuple(LEVELS), action="append")
    asked = parser.parse_args()
    levels = {level: measure(asked, level) for level in asked.level or list(LEVELS)}
    report = {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "commit": hardware.commit(),
        "command": f"python benchmarks/many_clients.py {' '.join(sys.argv[1:])}".strip(),
        "hardware": msgspec.to_builtins(hardware.describe()),
        "load": f"{asked.processes} processes, requests of {asked.rows} rows, one in flight per client, over ipc",
        "rounds": asked.rounds,
        "seconds": asked.seconds,
        "ratios": {level: ratios(found) for level, found in levels.items()},
        "levels": levels,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
