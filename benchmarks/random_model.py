"""Write a LLaMA of a published shape with random weights, for measuring speed where no model can be downloaded.

python benchmarks/random_model.py llama-3.2-1b DIRECTORY [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from tsqp.plan.models import known_models, random_config, write_random

# One to try what uses these, and those that have a name.
SHAPES: dict[str, dict[str, Any]] = {"tiny": random_config(64, 128, 2, (4, 2), 256), **known_models()}


def write(shape: str, directory: Path, dtype: torch.dtype) -> None:
    """Write a model of a shape."""
    write_random(SHAPES[shape], directory, dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    arguments = parser.parse_args()
    write(arguments.shape, arguments.directory, getattr(torch, arguments.dtype))
