"""Perplexity of the float model and of the packed one with exact arithmetic, on a public-domain text; prints JSON.

    python benchmarks/perplexity.py > benchmarks/results/perplexity-DATE.json

The text is the beginning of Lewis Carroll, Alice's Adventures in Wonderland (1865), as the Canterbury corpus has it,
with lines joined into paragraphs. It has no copyright.
"""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import torch

from tsqp.bench import hardware
from tsqp.bench.perplexity import perplexity
from tsqp.config import EnclaveConfig
from tsqp.levels import open_model, runnable
from tsqp.model.locate import locate_packed

MODEL = "smollm2"
TEXT = Path(__file__).parent / "texts" / "alice.txt"
WINDOW = 1024


def measure(model: str) -> tuple[float, int]:
    """Return the perplexity of a model at `local`, and how many tokens it is over."""
    opened = open_model(model, "local")
    assert opened.tokenizer is not None
    ids_T = torch.tensor(opened.tokenizer.encode(TEXT.read_text(encoding="utf-8")))
    with runnable("local", opened, EnclaveConfig()) as loaded:
        assert loaded.predict_all is not None
        return perplexity(loaded.predict_all, ids_T, WINDOW), len(ids_T) // WINDOW * WINDOW


def main() -> None:
    """Compare both."""
    floats, tokens = measure(MODEL)
    exact, _ = measure(str(locate_packed(MODEL)))
    report = {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "commit": hardware.commit(),
        "model": MODEL,
        "text": TEXT.name,
        "tokens": tokens,
        "window": WINDOW,
        "perplexity_float32": floats,
        "perplexity_int8_exact": exact,
        "change_percent": 100 * (exact / floats - 1),
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
