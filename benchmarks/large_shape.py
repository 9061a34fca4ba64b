"""Prefill of a published shape with random weights, level by level in turns; prints JSON.

    python benchmarks/large_shape.py llama-3.2-1b > benchmarks/results/llama-3.2-1b-DATE.json

Weights are random, so only times mean anything. Each turn starts every level anew (`tsqp prefill`) and takes its median
of three; the result is the median over turns. Where there is a GPU, workers use it (LLAMA_GPU_DEVICE chooses). The
model is written to a temporary directory (4 GB with its codes).
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

RANDOM_MODEL = Path(__file__).with_name("random_model.py")
LEVELS = ("monolithic", "local", "open", "verified", "masked")
PROTECTION = ("quantise_s", "mask_s", "check_s", "ahead_s")
PARTS = ("prefill_s", "enclave_s", "worker_s", "pcie_s", "wire_s", "waited_s", *PROTECTION)


def prefill(level: str, plain: Path, packed: Path, tokens: int) -> dict[str, Any]:
    """Run one level."""
    model = packed if level in ("verified", "masked") else plain
    words = ["-m", "tsqp", "prefill", "--model", str(model), "--level", level, "--tokens", str(tokens), "--repeat", "3"]
    asked = ["--dtype", "bfloat16", "--json"]
    done = subprocess.run([sys.executable, *words, *asked], capture_output=True, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def measure(shape: str, levels: Sequence[str], tokens: int, rounds: int) -> dict[str, Any]:
    """Measure levels in turns; the first is what the others are compared with."""
    with tempfile.TemporaryDirectory() as directory:
        plain, packed = Path(directory) / shape, Path(directory) / "packed"
        subprocess.run([sys.executable, str(RANDOM_MODEL), shape, str(plain)], check=True, capture_output=True)
        subprocess.run(
            [sys.executable, "-m", "tsqp", "pack", "--model", str(plain), "--out", str(packed)],
            check=True,
            capture_output=True,
        )
        runs: dict[str, list[dict[str, Any]]] = {level: [] for level in levels}
        for _ in range(rounds):
            for level, taken in runs.items():
                taken.append(prefill(level, plain, packed, tokens))
    medians = {
        level: {part: statistics.median(run[part] for run in taken) for part in PARTS} for level, taken in runs.items()
    }
    return {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "commit": hardware.commit(),
        "command": f"python benchmarks/large_shape.py {shape} --levels {' '.join(levels)} --tokens {tokens} "
        f"--rounds {rounds}",
        "hardware": msgspec.to_builtins(hardware.describe()),
        "shape": shape,
        "dtype": "bfloat16; int8 codes at verified and masked",
        "tokens": tokens,
        "rounds": rounds,
        "median_s": medians,
        f"times_{levels[0]}": {
            level: round(each["prefill_s"] / medians[levels[0]]["prefill_s"], 3) for level, each in medians.items()
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", help="as random_model.py takes it")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=LEVELS)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.shape, arguments.levels, arguments.tokens, arguments.rounds), indent=2))
