"""How much accuracy a level costs: perplexity of a text, in windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from tsqp.errors import InputError

Predict = Callable[[Tensor], Tensor]


def perplexity(predict_all: Predict, ids_T: Tensor, window: int = 1024) -> float:
    """Return exp of the mean negative log-likelihood of each token but a window's first.

    Args:
        predict_all: ids (1, T) to float32 logits (1, T, V).
        ids_T: int64 token ids; a last part shorter than a window is left out.
        window: tokens per prefill.

    Raises:
        InputError: fewer tokens than a window.
    """
    windows = len(ids_T) // window
    if not windows:
        raise InputError(f"perplexity over windows of {window} tokens needs as many; the text has {len(ids_T)}.")
    total = 0.0
    for ids_W in ids_T[: windows * window].split(window):
        logits_WV = predict_all(ids_W[None])[0]
        total += float(functional.cross_entropy(logits_WV[:-1], ids_W[1:], reduction="sum"))
    return math.exp(total / (windows * (window - 1)))
