"""Fuzzes targets one after another and prints what that gave as JSON: ``python -m fuzz.run --seconds 20 TARGET ...``.

Inputs that reach something new are kept under .fuzz, which git ignores, and are a beginning for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from fuzz import targets
from tsqp.bench.hardware import commit, describe

_WORK = targets.HERE.parent / ".fuzz"
# Model files and collateral are larger than messages.
_LONG = {"packed": 16384, "gguf": 16384, "safetensors": 16384, "quotes": 24576, "shm": 8192}
_MESSAGE = 2048
_MEMORY = Path("/dev/shm")  # noqa: S108  only where fuzzing writes
_MEMORY_MB = 4096
_INPUT_TIMEOUT_S = 30
_STATUS = re.compile(r"^#(\d+)\s+\S+\s+cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)


def main() -> None:
    """Fuzz; end with 1 if anything crashed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=[*targets.MODULES], metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=20, help="for each target")
    parser.add_argument("--runs", type=int, default=0, help="inputs of each target, in place of a time")
    asked = parser.parse_args()
    if unknown := [name for name in asked.targets if name not in targets.MODULES]:
        parser.error(f"no target is named {unknown[0]!r}; known: {', '.join(targets.MODULES)}.")
    results = {}
    for name in asked.targets:
        results[name] = fuzz(name, asked.seconds, asked.runs)
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    json.dump(report(results), sys.stdout, indent=2)
    print()
    sys.exit(any(result["crashes"] for result in results.values()))


def report(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return results with what they were measured on."""
    return {"hardware": msgspec.to_builtins(describe()), "commit": commit(), "targets": results}


def fuzz(name: str, seconds: int, runs: int) -> dict[str, Any]:
    """Fuzz one target in a process of its own.

    Args:
        name: of the target.
        seconds: for how long, if ``runs`` is 0.
        runs: how many inputs.

    Returns:
        inputs tried, executions per second, coverage as libFuzzer counts it, and crashes: those that stopped it too.
    """
    found = _WORK / name
    found.mkdir(parents=True, exist_ok=True)
    before = set(targets.kept_inputs(name))
    options = [
        f"-runs={runs}" if runs else f"-max_total_time={seconds}",
        f"-max_len={_LONG.get(name, _MESSAGE)}",
        f"-rss_limit_mb={_MEMORY_MB}",
        f"-timeout={_INPUT_TIMEOUT_S}",
        f"-artifact_prefix={targets.CRASHES / name}/",
        str(found),
        str(targets.CORPUS / name),
    ]
    (targets.CRASHES / name).mkdir(parents=True, exist_ok=True)
    root = targets.HERE.parent
    path = os.pathsep.join((str(root / "tests"), os.environ.get("PYTHONPATH", "")))
    started = time.monotonic()
    # In memory where there is /dev/shm: some targets write a file for every input.
    with tempfile.TemporaryDirectory(prefix="tsqp-fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None) as scratch:
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": scratch}
        ended = subprocess.run(
            [sys.executable, "-m", "fuzz.child", name, *options],
            cwd=root, env=environment, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
    took_s = time.monotonic() - started
    crashes = sorted(path.name for path in set(targets.kept_inputs(name)) - before)
    if ended.returncode and not crashes:
        sys.exit(f"fuzzing {name} ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    return {**figures(ended.stderr), "seconds": round(took_s), "crashes": crashes}


def figures(log: str) -> dict[str, Any]:
    """Read inputs, speed and coverage from what libFuzzer prints; its last line of status counts."""
    status = _STATUS.findall(log)
    inputs, edges, features, corpus = map(int, status[-1]) if status else (0, 0, 0, 0)
    speed = re.findall(r"exec/s: (\d+)", log)
    return {
        "inputs": inputs,
        "executions_per_s": int(speed[-1]) if speed else 0,
        "edges": edges,
        "features": features,
        "corpus": corpus,
    }


if __name__ == "__main__":
    main()
