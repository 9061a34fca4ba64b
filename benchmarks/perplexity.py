"""Perplexity of the float model and of the packed one with exact arithmetic, on a public-domain text; prints JSON.

    python benchmarks/perplexity.py [--model smollm2] [--window 1024] > benchmarks/results/perplexity-DATE.json

The text is the beginning of Lewis Carroll, Alice's Adventures in Wonderland (1865), as the Canterbury corpus has it,
with lines joined into paragraphs. It has no copyright.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec
import torch

from tsqp.bench.perplexity import perplexity
from tsqp.bench.summary import heading
from tsqp.config import EnclaveConfig
from tsqp.levels import open_model, runnable
from tsqp.model.locate import locate_packed

TEXT = Path(__file__).parent / "texts" / "alice.txt"


def measure(model: str, window: int) -> tuple[float, int]:
    """Return the perplexity of a model at `local`, and how many tokens it is over."""
    opened = open_model(model, "local")
    assert opened.tokenizer is not None
    ids_T = torch.tensor(opened.tokenizer.encode(TEXT.read_text(encoding="utf-8")))
    with runnable("local", opened, EnclaveConfig()) as loaded:
        assert loaded.predict_all is not None
        return perplexity(loaded.predict_all, ids_T, window), len(ids_T) // window * window


def main() -> None:
    """Compare both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--window", type=int, default=1024, help="tokens of each prefill")
    asked = parser.parse_args()
    floats, tokens = measure(asked.model, asked.window)
    exact, _ = measure(str(locate_packed(asked.model)), asked.window)
    report = {
        **msgspec.to_builtins(
            heading(f"python benchmarks/perplexity.py --model {asked.model} --window {asked.window}")
        ),
        "model": asked.model,
        "text": TEXT.name,
        "tokens": tokens,
        "window": asked.window,
        "perplexity_float32": floats,
        "perplexity_int8_exact": exact,
        "change_percent": 100 * (exact / floats - 1),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
