"""Packed models for tests, and ways to damage them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import edit_json, tiny_checkpoint

from tsqp.model.pack import pack

Edit = Callable[[Any], object]


def packed_model(directory: Path) -> Path:
    """Pack a tiny model with everything: biases, a tokenizer and a licence."""
    model = tiny_checkpoint(directory / "model", attention_bias=True, num_hidden_layers=2)
    (model / "LICENSE").write_text("terms", encoding="utf-8")
    (model / "tokenizer.json").write_text("{}", encoding="utf-8")
    pack(model, "tiny", directory / "packed")
    return directory / "packed"


def edit_manifest(directory: Path, edit: Edit) -> None:
    edit_json(directory / "enclave" / "manifest.json", edit)


def sign(directory: Path, name: str) -> None:
    """Make the manifest agree with a file of enclave/ that a test has changed."""
    sha256 = hashlib.sha256((directory / "enclave" / name).read_bytes()).hexdigest()
    edit_manifest(directory, lambda raw: raw["files"].update({name: sha256}))


def edit_tensors(path: Path, edit: Edit) -> None:
    """Rewrite a safetensors file with the safetensors package."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata=metadata)
