"""What a worker of several ranks answers, how fast, and what becomes of it when one is lost. Prints JSON.

python benchmarks/tensor_parallel.py [--ranks 1 2 4] [--rounds 7] > benchmarks/results/tensor-parallel-DATE.json

Each worker is sent one prefill's requests, at `open` the first qkv and a chain for each layer, at the exact levels
every group, with the same random activations, one request after the other. `sha256` is of all products: equal for all
numbers of ranks where they are the same bits. Workers take turns within a round; medians. Then of workers with the most
ranks one process is killed, one stopped, and rank 0 killed, while nothing is asked; `ended_s` is until none is left.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import hashlib
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import psutil
from worker_throughput import TOKENS, Step, connected, replay  # type: ignore[import-not-found]  # beside this file

from tsqp.bench import hardware
from tsqp.enclave.session import Session
from tsqp.launch import worker_process
from tsqp.model.locate import BUNDLED, locate, locate_packed
from tsqp.paths import private_socket_directory
from tsqp.threads import share_cores
from tsqp.wire import messages

LEVELS: dict[str, tuple[str, ...]] = {"open": (), "exact": ("--exact",)}
FAULTS = {
    "a rank killed": (1, signal.SIGKILL),
    "a rank stopped": (1, signal.SIGSTOP),
    "rank 0 killed": (0, signal.SIGKILL),
}
_PATIENCE_S = 120


@contextlib.contextmanager
def worker(model: str, level: str, ranks: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a worker of so many ranks, which share the cores; yield its address and its first process."""
    with private_socket_directory() as directory:
        url = f"ipc://{directory}/worker"
        words = ["--model", model, *LEVELS[level], "--tensor-parallel", str(ranks), "--device", "cpu", "--listen", url]
        command = [sys.executable, "-m", "tsqp", "worker", *words, "--json", "--exit-with-parent"]
        with worker_process(command) as process:
            yield url, process


def prefill(session: Session, steps: Sequence[Step]) -> tuple[float, str]:
    """Ask for one prefill's products; return how long that took, and their digest."""
    total, spent_s = hashlib.sha256(), 0.0
    for header, frame in steps:
        started = time.perf_counter()
        _, frames = session.result(session.submit(header, [frame]), messages.Result)
        spent_s += time.perf_counter() - started
        total.update(frames[0])
    return spent_s, total.hexdigest()


def measure(model: str, level: str, counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Let workers of all numbers of ranks take turns."""
    steps = replay(model, level)
    report: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        sessions = {}
        for ranks in counts:
            started = time.perf_counter()
            url, process = stack.enter_context(worker(model, level, ranks))
            loading_s = time.perf_counter() - started
            (sessions[ranks],) = stack.enter_context(connected(url, 1))
            others = psutil.Process(process.pid).children()
            resident = [
                psutil.Process(each).memory_info().rss >> 20 for each in (process.pid, *[o.pid for o in others])
            ]
            report[str(ranks)] = {"ready_s": round(loading_s, 2), "resident_mb": resident}
        times: dict[int, list[float]] = {ranks: [] for ranks in counts}
        for turn in range(rounds + 1):
            for ranks, session in sessions.items():
                spent_s, digest = prefill(session, steps)
                report[str(ranks)]["sha256"] = digest
                if turn:  # the first is to warm up
                    times[ranks].append(spent_s)
    for ranks, found in times.items():
        report[str(ranks)]["prefill_ms"] = round(1000 * statistics.median(found), 1)
    same = len({each["sha256"] for each in report.values()}) == 1
    return {"requests": len(steps), "same_bits": same, "ranks": report}


def fault(model: str, ranks: int, which: int, number: signal.Signals) -> dict[str, Any]:
    """Send a signal to one process of a worker, and wait until none is left."""
    with worker(model, "exact", ranks) as (_, process):
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
        started = time.perf_counter()
        everyone[which].send_signal(number)
        code = process.wait(_PATIENCE_S)
        _, left = psutil.wait_procs(everyone[1:], _PATIENCE_S)
        return {"exit_code": code, "ended_s": round(time.perf_counter() - started, 2), "left": len(left)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--level", choices=tuple(LEVELS), action="append")
    parser.add_argument("--faults", choices=("on", "off"), default="on")
    asked = parser.parse_args()
    locate(asked.model)
    locate_packed(asked.model)
    levels, most = asked.level or list(LEVELS), max(asked.ranks)
    options = f"--model {asked.model} --ranks {' '.join(map(str, asked.ranks))} --rounds {asked.rounds}"
    options += f"{''.join(f' --level {level}' for level in levels)} --faults {asked.faults}"
    faults = FAULTS if asked.faults == "on" else {}
    report = {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "commit": hardware.commit(),
        "command": f"python benchmarks/tensor_parallel.py {options}",
        "hardware": msgspec.to_builtins(hardware.describe()),
        "load": f"one client over ipc; prefills of {TOKENS} tokens; all ranks on this CPU, which they share, over gloo",
        "levels": {level: measure(asked.model, level, asked.ranks, asked.rounds) for level in levels},
        "faults": {name: {"ranks": most, **fault(asked.model, most, *what)} for name, what in faults.items()},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    share_cores()
    main()
