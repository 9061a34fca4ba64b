"""Write a LLaMA of a published shape with random weights, for measuring speed where no model can be downloaded.

python benchmarks/random_model.py llama-3.2-1b DIRECTORY [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tsqp.model.architecture import parse_config, weight_shapes
from tsqp.model.weights import INDEX_NAME

SHAPES = {
    "tiny": {  # to try what uses these
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def write(shape: str, directory: Path, dtype: torch.dtype) -> None:
    """Write config.json and one safetensors file per layer."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {**COMMON, **SHAPES[shape], "dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in weight_shapes(parse_config(content, shape)).items():
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    arguments = parser.parse_args()
    write(arguments.shape, arguments.directory, getattr(torch, arguments.dtype))
