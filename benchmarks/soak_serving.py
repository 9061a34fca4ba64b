"""Hundreds of requests by many clients at once at a server over the bundled model; prints JSON, and fails if it must.

    python benchmarks/soak_serving.py --level masked > benchmarks/results/soak-masked-DATE.json

Clients are OpenAI's Python package. A third of the requests is left before its end or must be refused. Each answer that
completes is compared with that of the same request alone; then nothing of any request may be left in the server. What
is compared and counted is in tests/soak. Prompts are pieces of the text that perplexity.py takes, of 1 to 300 tokens.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import msgspec
from soak.run import Load, Words, soak

from tsqp.bench import hardware
from tsqp.levels import open_model

MODEL = "smollm2"
TEXT = Path(__file__).parent / "texts" / "alice.txt"
LEVELS = ("masked", "verified", "open", "local")
# What the mask pool of this model holds in blocks that are used in part comes and goes.
SLACK_BYTES = 32 << 20
_LETTERS = 8000


def main() -> int:
    """Soak, print the report, and return how the process ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=LEVELS, default="masked")
    parser.add_argument("--requests", type=int, default=504)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    tokenizer = open_model(MODEL, "local").tokenizer
    assert tokenizer is not None
    words = Words(TEXT.read_text(encoding="utf-8")[:_LETTERS], tokenizer.encode, tokenizer.decode)
    load = Load(requests=options.requests, clients=options.clients, slack_bytes=SLACK_BYTES)
    report = soak(MODEL, options.level, words, load)
    content = {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "commit": hardware.commit(),
        "command": f"python benchmarks/soak_serving.py --level {options.level} --requests {options.requests} "
        f"--clients {options.clients}",
        "hardware": msgspec.to_builtins(hardware.describe()),
        "model": MODEL,
        "level": options.level,
        **msgspec.to_builtins(report),
    }
    print(json.dumps(content, indent=2))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
