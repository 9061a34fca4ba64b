"""One SHA-256 per model: its architecture and every tensor it computes with, whatever files they lie in.

Enclave and worker compare digests when they meet, so that two versions of a model never talk to each other by
mistake. Reading all weights takes a while, so results are cached by path, size and modification time of the files.
That cache makes this a check against mistakes, not against a hostile host: the level ``open`` promises no more.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable

import torch

from tsqp.model.architecture import LlamaConfig, weight_shapes
from tsqp.model.weights import Checkpoint
from tsqp.paths import cache_directory

_FORMAT = "tsqp-model-digest-1"


def model_digest(
    config: LlamaConfig, checkpoint: Checkpoint, on_progress: Callable[[float], None] | None = None
) -> str:
    """Return the model's digest, 64 hexadecimal digits.

    Args:
        config: the model's architecture.
        checkpoint: its weights; ``checkpoint.require`` has passed.
        on_progress: called with the fraction done while weights are read.
    """
    cached = cache_directory() / "digests" / _cache_key(config, checkpoint)
    if cached.exists():
        return cached.read_text(encoding="ascii")
    digest = _compute(config, checkpoint, on_progress or (lambda _: None))
    cached.parent.mkdir(exist_ok=True)
    partial = cached.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(digest, encoding="ascii")
    partial.replace(cached)
    return digest


def _compute(config: LlamaConfig, checkpoint: Checkpoint, on_progress: Callable[[float], None]) -> str:
    total = hashlib.sha256(f"{_FORMAT}\n{config.canonical()}\n".encode())
    names = sorted(weight_shapes(config))
    for index, name in enumerate(names):
        stored = checkpoint.tensors[name]
        content = hashlib.sha256()
        for block in checkpoint.blocks(name):
            content.update(block.contiguous().view(-1).view(torch.uint8).numpy().data)
        total.update(f"{name} {stored.dtype} {list(stored.shape)} {content.hexdigest()}\n".encode())
        on_progress((index + 1) / len(names))
    return total.hexdigest()


def _cache_key(config: LlamaConfig, checkpoint: Checkpoint) -> str:
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    return hashlib.sha256(json.dumps([_FORMAT, config.canonical(), stats]).encode()).hexdigest()
