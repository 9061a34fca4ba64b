"""A worker without native kernels and an enclave with them, and the reverse: the same bits, and a notice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, tiny_checkpoint
from torch import Tensor
from workers import packed_tiny, running_worker

from tsqp.arith import native
from tsqp.config import EnclaveConfig
from tsqp.levels import open_model, runnable

SLOWER = "TSQP_NATIVE=off: exact products, checks and scaling are computed by PyTorch, slower."


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return packed_tiny(tiny_checkpoint(tmp_path / "model", attention_bias=True), tmp_path / "packed")


def logits(packed: Path, level: str, notices: list[str], **settings: str) -> Tensor:
    model, config = open_model(str(packed), level), EnclaveConfig(**settings)  # type: ignore[arg-type]
    with runnable(level, model, config, on_notice=notices.append) as loaded:
        return loaded.predict(random_ids(2, 11))


@pytest.mark.parametrize("without", ["worker", "enclave", "neither"])
def test_levels_agree_whoever_lacks_native_kernels(packed: Path, without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays in floats rounds differently without them, so ``local`` is computed as the enclave computes."""
    notices: list[str] = []
    native.kernels()  # chosen once, before the setting for the worker
    with monkeypatch.context() as patch:
        if without == "worker":
            patch.setenv(native.VARIABLE, "off")
        with running_worker(packed) as url:
            if without == "enclave":
                patch.setattr(native, "kernels", lambda: None)
            local = logits(packed, "local", [])
            for level in ("verified", "masked"):
                assert torch.equal(logits(packed, level, notices, worker=url), local)
    assert notices == ([SLOWER] * 2 if without == "enclave" else [])
