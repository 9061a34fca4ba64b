"""Models to plan for: by name, with shapes alone, or a config.json. And random ones, to measure speed with."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tsqp.errors import WeightsError
from tsqp.model.architecture import parse_config, weight_shapes
from tsqp.model.reading import reading
from tsqp.model.shape import Shape, shape_of
from tsqp.model.weights import INDEX_NAME

_HALF = 2


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Return the models that have a name, as the content of their config.json."""
    text = resources.files("tsqp.plan").joinpath("data", "models.json").read_text(encoding="utf-8")
    known: dict[str, dict[str, Any]] = json.loads(text)
    return known


def model_shape(model: str) -> tuple[str, Shape]:
    """Find what to plan for; no weights are needed.

    Args:
        model: a name of ``known_models``, a config.json, or as ``shape_of`` takes it.

    Returns:
        What to call it, and its shape.

    Raises:
        WeightsError: there is no such model, or its config.json cannot be read.
        UnsupportedModelError: it is of another architecture.
    """
    if raw := known_models().get(model):
        return model, _shape(raw, model)
    path = Path(model).expanduser()
    if path.suffix == ".json":
        with reading(path):
            try:
                raw = json.loads(path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise WeightsError(f"{path} does not exist: expected the config.json of a model.") from None
            except (ValueError, RecursionError) as error:
                raise WeightsError(f"{path} cannot be read as JSON: {error}.") from error
        if not isinstance(raw, dict):
            raise WeightsError(f"{path}: expected a JSON object, as in the config.json of a model.")
        return path.resolve().parent.name, _shape(raw, str(path))
    if not path.exists():
        raise WeightsError(
            f"there is no model {model!r}: expected {', '.join(known_models())}, a directory with config.json, or the "
            "path of a config.json."
        )
    return path.resolve().name, shape_of(model)


def _shape(raw: dict[str, Any], origin: str) -> Shape:
    stored = raw.get("dtype", raw.get("torch_dtype"))
    item = _HALF if stored in ("bfloat16", "float16") else 2 * _HALF
    return Shape(parse_config(raw, origin), item, packed=False)


def random_config(hidden: int, ffn: int, layers: int, heads: tuple[int, int], vocabulary: int) -> dict[str, Any]:
    """Return the content of a config.json with other sizes than any model that has a name.

    Args:
        hidden: D.
        ffn: F.
        layers: how many.
        heads: for queries, and for keys and values.
        vocabulary: V.
    """
    return {
        **known_models()["llama-3.2-1b"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
    }


def write_random(config: dict[str, Any], directory: Path, dtype: torch.dtype) -> None:
    """Write a model with random weights: config.json, a tokenizer of so many words, and a weights file per layer.

    Args:
        config: the content of config.json.
        directory: where to; made if need be.
        dtype: of the weights.
    """
    directory.mkdir(parents=True, exist_ok=True)
    content = {**config, "dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    words = {f"w{number}": number for number in range(config["vocab_size"])}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(directory / "tokenizer.json"))  # noqa: S106  no password
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in weight_shapes(parse_config(content, "a random model")).items():
        layer = int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0
        shards.setdefault(f"model-{layer:05d}.safetensors", {})[name] = size
    generator = torch.Generator().manual_seed(0)
    for file, sizes in shards.items():
        tensors = {}
        for name, size in sizes.items():
            drawn = torch.randn(size, generator=generator).mul_(size[-1] ** -0.5 if len(size) > 1 else 0.1)
            tensors[name] = (drawn + 1 if len(size) == 1 else drawn).to(dtype)
        save_file(tensors, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, sizes in shards.items() for name in sizes}}
    (directory / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
