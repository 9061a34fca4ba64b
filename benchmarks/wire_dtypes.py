"""What each wire dtype of the level `open` costs in accuracy and saves in bytes, on the bundled model; prints JSON.

    python benchmarks/wire_dtypes.py > benchmarks/results/wire-dtypes-DATE.json

Against `local` in float32, over the text of benchmarks/perplexity.py: perplexity, relative error of the logits, and how
often the likeliest next token stays the same.
"""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsqp.bench import hardware
from tsqp.bench.perplexity import perplexity
from tsqp.config import WIRE_DTYPES, EnclaveConfig
from tsqp.launch import local_worker
from tsqp.levels import Model, open_model, runnable
from tsqp.loaded import Runnable

MODEL = "smollm2"
TEXT = Path(__file__).parent / "texts" / "alice.txt"
WINDOW = 512
WINDOWS = 4


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
        found = perplexity(loaded.predict_all, ids_WT.flatten(), WINDOW)
    return {
        "perplexity": found,
        "logit_error": float((ours_WTV - exact_WTV).norm() / exact_WTV.norm()),
        "same_next_token": float((ours_WTV.argmax(-1) == exact_WTV.argmax(-1)).float().mean()),
        "bytes_per_token": moved // ids_WT.numel(),
    }


def main() -> None:
    """Compare all."""
    opened = open_model(MODEL, "open")
    assert opened.tokenizer is not None
    ids = opened.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[: WINDOW * WINDOWS]
    ids_WT = torch.tensor(ids).view(WINDOWS, WINDOW)
    with runnable("local", opened, EnclaveConfig()) as local:
        exact_WTV = logits(local, ids_WT)
        assert local.predict_all is not None
        reference = perplexity(local.predict_all, ids_WT.flatten(), WINDOW)
    with local_worker(()) as url:
        dtypes = {name: compared(opened, url, name, ids_WT, exact_WTV) for name in WIRE_DTYPES}
    report = {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "commit": hardware.commit(),
        "model": MODEL,
        "text": TEXT.name,
        "tokens": ids_WT.numel(),
        "window": WINDOW,
        "perplexity_local_float32": reference,
        "wire_dtypes": dtypes,
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
