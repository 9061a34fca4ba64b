"""Keys and values of many sequences in blocks of one pool, allocated once. They stay in the enclave.

A sequence has a table of block numbers; who hands blocks out is ``engine/blocks.py``. A step's rows are tokens of
several sequences: some bring one each, some a part of their prompt.

Shapes: M rows of a step, N query heads, G key-value heads, X = N + 2G heads of both, H head size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tsqp.errors import ConfigError
from tsqp.model.architecture import LlamaConfig
from tsqp.model.attention import BLOCK_TOKENS, Segments, keep, paged_attention
from tsqp.model.layers import Angles


def block_bytes(config: LlamaConfig) -> int:
    """Return what one block of ``BLOCK_TOKENS`` tokens takes, over all layers."""
    return 4 * config.layers * 2 * config.kv_heads * BLOCK_TOKENS * config.head_size


class PagedCache:
    """The pool.

    Args:
        config: the model's architecture.
        blocks: how many.

    Raises:
        ConfigError: there is no memory for them.
    """

    def __init__(self, config: LlamaConfig, blocks: int) -> None:
        self.blocks = blocks
        self.attention_ns = 0
        try:
            self._pools = [
                torch.zeros(blocks, 2, config.kv_heads, BLOCK_TOKENS, config.head_size) for _ in range(config.layers)
            ]
        except RuntimeError as error:
            raise ConfigError(
                f"no memory for {blocks} cache blocks of {block_bytes(config) / 1e6:.1f} MB: lower the cache's size."
            ) from error

    def rows(self, parts: Sequence[SequencePart]) -> PagedRows:
        """Return the rows of a step."""
        return PagedRows(self, parts)

    def layer(self, index: int) -> Tensor:
        """Return a layer's pool, shape (blocks, 2, G, BLOCK_TOKENS, H)."""
        return self._pools[index]


@dataclass(frozen=True, slots=True)
class SequencePart:
    """Tokens of one sequence that a step computes.

    Attributes:
        ids: token ids.
        first: position of the first of them.
        blocks: the sequence's blocks up to these tokens, in order.
        wants: logits of ``none`` of them, of the ``last``, or of ``all``.
    """

    ids: Sequence[int]
    first: int
    blocks: Sequence[int]
    wants: str


class PagedRows:
    """Rows of a step, as ``llama.Rows``. Each sequence comes in one part.

    Args:
        cache: their pool.
        parts: by sequence.
    """

    def __init__(self, cache: PagedCache, parts: Sequence[SequencePart]) -> None:
        self._cache = cache
        counts = [len(part.ids) for part in parts]
        self.ids_M = _numbers([i for part in parts for i in part.ids])
        self.positions_M = _numbers([part.first + i for part in parts for i in range(len(part.ids))])
        self.kept = _kept(parts, counts)
        self._segments = Segments.of([(len(part.ids), part.first, part.blocks) for part in parts])

    def attend(self, layer: int, qkv_MXH: Tensor, angles: Angles, *, last: bool) -> Tensor:
        """See ``llama.Rows.attend``."""
        started = time.monotonic_ns()
        pool = self._cache.layer(layer)
        keep(qkv_MXH, angles, pool, self._segments)
        q_MNH = qkv_MXH[:, : -2 * pool.shape[2]]
        y_MNH = torch.empty(q_MNH.shape)
        paged_attention(q_MNH, pool, self._segments, y_MNH)
        self._cache.attention_ns += time.monotonic_ns() - started
        y_ME = y_MNH.flatten(1)
        return y_ME[self.kept] if last and self.kept is not None else y_ME


def _kept(parts: Sequence[SequencePart], counts: Sequence[int]) -> Tensor | None:
    rows: list[int] = []
    done = 0
    for part, count in zip(parts, counts, strict=True):
        wanted = {"none": 0, "last": 1, "all": count}[part.wants]
        rows += range(done + count - wanted, done + count)
        done += count
    return None if len(rows) == done else _numbers(rows)


def _numbers(values: Sequence[int]) -> Tensor:
    """Return int64: NumPy reads a short list in a fifth of PyTorch's time."""
    return torch.from_numpy(np.array(values, dtype=np.int64))
