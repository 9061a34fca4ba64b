"""What a model is, without its weights: for what is decided before there is a model on the machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tsqp.model.architecture import LlamaConfig, read_config
from tsqp.model.locate import is_packed_model, locate
from tsqp.model.manifest import enclave_directory
from tsqp.model.tensor_file import DTYPES, read_header

_EMBEDDING = "embedding.safetensors"
_HALF = 2
_SINGLE = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's architecture, the bytes of a number in its embedding table, and whether it is a packed model."""

    architecture: LlamaConfig
    embedding_item_bytes: int
    packed: bool


def shape_of(model: str) -> Shape:
    """Return a model's shape.

    Args:
        model: as ``locate`` takes it, or a packed model. A directory needs no more than its config.json.

    Raises:
        WeightsError: there is no such model, or it is damaged.
        SetupError: it is a .gguf file that cannot be converted.
    """
    if is_packed_model(model):
        directory = enclave_directory(Path(model).expanduser())
        (place,) = read_header(directory / _EMBEDDING).tensors.values()
        return Shape(read_config(directory), DTYPES[place.dtype].itemsize, packed=True)
    directory = locate(model)
    architecture = read_config(directory)
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    stored = raw.get("dtype", raw.get("torch_dtype"))
    return Shape(architecture, _HALF if stored in ("bfloat16", "float16") else _SINGLE, packed=False)
