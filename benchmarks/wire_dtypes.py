"""What each wire dtype of the level `open` costs in accuracy and saves in bytes, on the bundled model; prints JSON.

    python benchmarks/wire_dtypes.py [--model smollm2] [--window 512] > benchmarks/results/wire-dtypes-DATE.json

Against `local` in float32, over the text of benchmarks/perplexity.py: perplexity, relative error of the logits, and how
often the likeliest next token stays the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from tsqp.bench.perplexity import perplexity
from tsqp.bench.summary import heading
from tsqp.config import WIRE_DTYPES, EnclaveConfig
from tsqp.launch import local_worker
from tsqp.levels import Model, open_model, runnable
from tsqp.loaded import Runnable

TEXT = Path(__file__).parent / "texts" / "alice.txt"


def logits(loaded: Runnable, ids_WT: Tensor) -> Tensor:
    """Return the logits of every position of some windows."""
    assert loaded.predict_all is not None
    return torch.stack([loaded.predict_all(ids_T[None])[0] for ids_T in ids_WT])


def compared(opened: Model, url: str, wire_dtype: str, ids_WT: Tensor, exact_WTV: Tensor) -> dict[str, Any]:
    """Measure one wire dtype."""
    with runnable("open", opened, EnclaveConfig(worker=url, wire_dtype=wire_dtype)) as loaded:
        ours_WTV = logits(loaded, ids_WT)
        moved = loaded.meter.bytes_sent + loaded.meter.bytes_received
        assert loaded.predict_all is not None
        found = perplexity(loaded.predict_all, ids_WT.flatten(), ids_WT.shape[1])
    return {
        "perplexity": found,
        "logit_error": float((ours_WTV - exact_WTV).norm() / exact_WTV.norm()),
        "same_next_token": float((ours_WTV.argmax(-1) == exact_WTV.argmax(-1)).float().mean()),
        "bytes_per_token": moved // ids_WT.numel(),
    }


def main() -> None:
    """Compare all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--window", type=int, default=512, help="tokens of each prefill")
    parser.add_argument("--windows", type=int, default=4)
    asked = parser.parse_args()
    opened = open_model(asked.model, "open")
    assert opened.tokenizer is not None
    ids = opened.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[: asked.window * asked.windows]
    ids_WT = torch.tensor(ids).view(asked.windows, asked.window)
    with runnable("local", opened, EnclaveConfig()) as local:
        exact_WTV = logits(local, ids_WT)
        assert local.predict_all is not None
        reference = perplexity(local.predict_all, ids_WT.flatten(), asked.window)
    with local_worker(("--model", asked.model)) as url:
        dtypes = {name: compared(opened, url, name, ids_WT, exact_WTV) for name in WIRE_DTYPES}
    options = f"--model {asked.model} --window {asked.window} --windows {asked.windows}"
    report = {
        **msgspec.to_builtins(heading(f"python benchmarks/wire_dtypes.py {options}")),
        "model": asked.model,
        "text": TEXT.name,
        "tokens": ids_WT.numel(),
        "window": asked.window,
        "perplexity_local_float32": reference,
        "wire_dtypes": dtypes,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
