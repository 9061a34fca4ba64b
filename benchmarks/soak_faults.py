"""Every fault there is, at random points, into real processes under load; prints what happens, and fails if it must.

    python benchmarks/soak_faults.py --seconds 600 --out soak-faults.json
    python benchmarks/soak_faults.py --times 50 --out benchmarks/results/soak-faults-DATE.json

Two servers over a tiny model, at `masked` before two workers and at `open` before one, clients that know the right
answers, runs of `tsqp prefill` with the same workers, and `tsqp pack`. What is injected, watched and counted is in
tests/faults.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import secrets
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import msgspec
from faults.lanes import LANES
from faults.report import table
from faults.run import Plan, soak

from tsqp.bench import hardware


def main() -> int:
    """Soak, write the report, and return how the process ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="how long faults are injected; 600, or with --times no limit")
    parser.add_argument("--times", type=int, help="how often each is injected at most")
    parser.add_argument("--clients", type=int, default=6, help="of each of the two servers")
    parser.add_argument("--levels", nargs="+", choices=LANES, default=["masked", "open"], help="a server for each")
    parser.add_argument(
        "--slack",
        type=float,
        default=5.0,
        help="seconds that noticing may take beyond what is stated, on a busy machine",
    )
    parser.add_argument(
        "--prefill-pause", type=float, default=8.0, help="seconds between two runs of tsqp prefill beside each server"
    )
    parser.add_argument("--seed", type=int, help="of all that is chosen; a new one by default")
    parser.add_argument("--out", type=Path, default=Path("soak-faults.json"))
    options = parser.parse_args()
    # Whoever stops it leaves no process behind either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    seed = secrets.randbelow(1 << 31) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    seconds = options.seconds or (600.0 if options.times is None else math.inf)
    levels = tuple(options.levels)
    plan = Plan(seconds, options.times, options.clients, seed, options.slack, options.prefill_pause, levels)
    commit = hardware.commit()
    report = soak(plan, lambda line: print(line, flush=True))
    how_much = [f"--seconds {seconds:g}"] if math.isfinite(seconds) else []
    how_much += [f"--times {options.times}"] if options.times else []
    how_much += [f"--clients {options.clients}", f"--slack {options.slack:g}"]
    how_much += [f"--prefill-pause {options.prefill_pause:g}", f"--seed {seed}", f"--levels {' '.join(levels)}"]
    content = {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "commit": commit,
        "command": f"python benchmarks/soak_faults.py {' '.join(how_much)}",
        "hardware": msgspec.to_builtins(hardware.describe()),
        **msgspec.to_builtins(report),
    }
    options.out.write_text(_dumps(content), encoding="utf-8")
    print(f"\n{table(report)}\n\n{options.out}")
    for problem in report.problems:
        print(f"WRONG: {problem}")
    return 1 if report.problems else 0


def _dumps(content: dict[str, Any]) -> str:
    """Return JSON in which each fault takes a line."""
    faults = ",\n  ".join(json.dumps(each) for each in content["injected"])
    whole = json.dumps({**content, "injected": []}, indent=1)
    return whole.replace('"injected": []', f'"injected": [\n  {faults}\n ]') + "\n"


if __name__ == "__main__":
    sys.exit(main())
