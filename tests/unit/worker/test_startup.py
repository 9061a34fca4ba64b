"""What a worker says while it loads codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from workers import packed_tiny

from tsqp.arith import native
from tsqp.config import WorkerConfig
from tsqp.worker.startup import Progress, _load_codes


@pytest.mark.parametrize("built", ["built", "missing"])
def test_missing_native_kernels_are_said_once(
    tiny_llama: Path, tmp_path: Path, built: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packed_tiny(tiny_llama, tmp_path / "packed")
    monkeypatch.setattr(native, "kernels", lambda: native.Kernels("portable") if built == "built" else None)
    if built == "missing":
        monkeypatch.setattr(native, "_extension", None)
    notices: list[str] = []
    progress = Progress(notices.append, lambda _name, _done: None)
    _load_codes(WorkerConfig(model=str(packed), serves="exact"), torch.device("cpu"), progress)
    assert len(notices) == (built == "missing")
    assert all("install a C compiler" in notice for notice in notices)
