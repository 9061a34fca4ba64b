"""How OpenMP threads should wait when enclave and worker share cores: `open` prefill under each setting, in turns.

python benchmarks/openmp_waiting.py [--turns 3] > benchmarks/results/openmp-waiting-DATE.json

Evidence for src/tsqp/threads.py. ``GOMP_SPINCOUNT`` is libgomp's number of busy-wait iterations before a thread sleeps;
300000 is its own default.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import subprocess
import sys
from typing import Any

import msgspec

from tsqp.bench import hardware

SETTINGS: dict[str, dict[str, str]] = {
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "spin 300000 (libgomp's default)": {"GOMP_SPINCOUNT": "300000"},
    "spin 20000": {"GOMP_SPINCOUNT": "20000"},
    "spin 5000": {"GOMP_SPINCOUNT": "5000"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "passive (no spin)": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
}
LEVELS = ("open", "local")


def prefill(level: str, setting: dict[str, str]) -> list[float]:
    """Run one level under one setting; return its times in seconds."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    command = [sys.executable, "-m", "tsqp", "prefill", "--level", level, "--repeat", "10", "--json"]
    done = subprocess.run(command, env={**environment, **setting}, stdout=subprocess.PIPE, text=True, check=True)
    seconds: list[float] = json.loads(done.stdout)["prefill_s_all"]
    return seconds


def measure(turns: int) -> dict[str, Any]:
    """Measure every setting at every level, in turns."""
    taken: dict[str, dict[str, list[float]]] = {level: {name: [] for name in SETTINGS} for level in LEVELS}
    for _ in range(turns):
        for name, setting in SETTINGS.items():
            for level in LEVELS:
                taken[level][name] += prefill(level, setting)
    return {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "commit": hardware.commit(),
        "command": f"python benchmarks/openmp_waiting.py --turns {turns}",
        "hardware": msgspec.to_builtins(hardware.describe()),
        "what": "smollm2, prefill of 128 tokens, float32, worker over shm; both processes under the same setting",
        "median_ms": {
            level: {name: round(statistics.median(seconds) * 1e3, 1) for name, seconds in rows.items()}
            for level, rows in taken.items()
        },
        "fastest_ms": {
            level: {name: round(min(seconds) * 1e3, 1) for name, seconds in rows.items()}
            for level, rows in taken.items()
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    print(json.dumps(measure(parser.parse_args().turns), indent=2))
