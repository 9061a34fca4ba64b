"""What int8 weights with exact arithmetic cost: at most half a percent of perplexity over 4,096 tokens of text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tsqp.bench.perplexity import perplexity
from tsqp.config import EnclaveConfig
from tsqp.errors import InputError
from tsqp.levels import open_model, runnable
from tsqp.model.locate import BUNDLED, locate_packed

TEXT = Path(__file__).parents[2] / "benchmarks" / "texts" / "alice.txt"
TOKENS = 4096


def measured(model: str) -> float:
    opened = open_model(model, "local")
    assert opened.tokenizer is not None
    ids_T = torch.tensor(opened.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:TOKENS])
    assert len(ids_T) == TOKENS
    with runnable("local", opened, EnclaveConfig()) as loaded:
        assert loaded.predict_all is not None
        return perplexity(loaded.predict_all, ids_T, 1024)


@pytest.mark.usefixtures("bundled_directory")
def test_int8_with_exact_arithmetic_loses_less_than_half_a_percent() -> None:
    floats, exact = measured(BUNDLED), measured(str(locate_packed(BUNDLED)))
    assert 10 < floats < 40, "the text or the model is not what was measured before"
    assert abs(exact / floats - 1) < 0.005


def test_perplexity_of_certainty_and_of_ignorance() -> None:
    ids_T = torch.tensor([3, 1, 2, 0, 3, 3, 1, 2, 9])

    def certain(ids_BT: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(1, ids_BT.shape[1], 10)
        logits[0, torch.arange(ids_BT.shape[1] - 1), ids_BT[0, 1:]] = 100.0
        return logits

    assert perplexity(certain, ids_T, 4) == pytest.approx(1.0)
    assert perplexity(lambda ids_BT: torch.zeros(1, ids_BT.shape[1], 10), ids_T, 4) == pytest.approx(10.0)
    with pytest.raises(InputError, match="has 9"):
        perplexity(certain, ids_T, 10)
