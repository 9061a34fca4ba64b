"""Checkpoints: a safetensors file, or the index of several, is the input's."""

from __future__ import annotations

import contextlib
import random
import shutil
from functools import cache
from pathlib import Path

from fuzz import models
from fuzz.files import changed_json, changed_safetensors
from tsqp.errors import SetupError
from tsqp.model.architecture import weight_shapes
from tsqp.model.weights import INDEX_NAME, SINGLE_NAME, Checkpoint

_FILE, _INDEX = 0, 1
_SHARD = "part.safetensors"


def run(data: bytes) -> None:
    """Read a checkpoint in all ways."""
    kind, content = (data[0] % 2 if data else 0), data[1:]
    directory = _directory()
    (directory / INDEX_NAME).unlink(missing_ok=True)
    (directory / (INDEX_NAME if kind == _INDEX else SINGLE_NAME)).write_bytes(content)
    with contextlib.suppress(SetupError):
        checkpoint = Checkpoint(directory)
        with contextlib.suppress(SetupError):
            checkpoint.require(_shapes())
        for name, stored in checkpoint.tensors.items():
            with contextlib.suppress(SetupError):
                checkpoint.require({name: stored.shape})
                # A scalar has no rows, hence no blocks; no model has one.
                value, rows = checkpoint.read(name), [len(block) for block in checkpoint.blocks(name)]
                if stored.shape and sum(rows) != len(value):
                    raise AssertionError("blocks are not the whole tensor.")


@cache
def _directory() -> Path:
    path = models.scratch() / "checkpoint"
    path.mkdir()
    shutil.copyfile(models.directory() / SINGLE_NAME, path / _SHARD)
    return path


@cache
def _shapes() -> dict[str, tuple[int, ...]]:
    return weight_shapes(models.open_linears().config)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change one place of the header, or of the index."""
    kind = data[0] % 2 if data else 0
    return bytes([kind]) + (changed_json if kind == _INDEX else changed_safetensors)(data[1:], rng)


def seeds() -> dict[str, bytes]:
    """Return a tiny model's weights, and an index of them."""
    return {
        "weights": bytes([_FILE]) + (models.directory() / SINGLE_NAME).read_bytes(),
        "index": bytes([_INDEX]) + b'{"metadata": {}, "weight_map": {"lm_head.weight": "%s"}}' % _SHARD.encode(),
    }
