"""What an engine takes of the enclave's memory, decided before anything is loaded: the cache, and masks of a step."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass

from tsqp.config import WORKER_LEVELS, EnclaveConfig, EngineConfig
from tsqp.enclave.mask_pool import check_pool_fits, peak_bytes
from tsqp.errors import ConfigError
from tsqp.model.architecture import LlamaConfig, linear_groups
from tsqp.model.attention import BLOCK_TOKENS
from tsqp.model.paged_cache import block_bytes

# Of a prompt, in one step; results depend on where prompts are cut, so fewer only where a step has less room.
_CHUNK_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Memory:
    """What an engine takes.

    Attributes:
        cache_bytes, cache_tokens: keys and values, and for how many tokens.
        mask_bytes: mask products for all workers, at most; 0 where nothing is masked, as the next two.
        mask_rows: for how many tokens a step finds its masks ready at each worker.
        head_rows: of how many of them the head's too.
    """

    cache_bytes: int
    cache_tokens: int
    mask_bytes: int = 0
    mask_rows: int = 0
    head_rows: int = 0

    def __str__(self) -> str:
        cache = f"keys and values {self.cache_bytes / 1e6:.1f} MB ({self.cache_tokens} tokens)"
        masks = f", masks {self.mask_bytes / 1e6:.1f} MB ({self.mask_rows} tokens)" if self.mask_bytes else ""
        return cache + masks


@dataclass(frozen=True, slots=True)
class MaskRoom:
    """What the mask pool of one worker may be.

    Attributes:
        rows, head_rows: for how many tokens it keeps products, and of how many of them the head's.
        limit_bytes: what it may take at most.
        used_bytes: what it takes at most.
    """

    rows: int = 0
    head_rows: int = 0
    limit_bytes: int = 0
    used_bytes: int = 0


def chunk_tokens(engine: EngineConfig) -> int:
    """Return how many tokens of one prompt a step computes: a whole number of blocks."""
    return min(_CHUNK_TOKENS, engine.step_tokens // BLOCK_TOKENS * BLOCK_TOKENS)


def most_rows(engine: EngineConfig) -> int:
    """Return how many rows no step exceeds; see ``Scheduler.most_rows``."""
    return max(engine.step_tokens, engine.max_running - 1 + chunk_tokens(engine))


def cache_bytes(architecture: LlamaConfig, tokens: int) -> int:
    """Return what keys and values of so many tokens of one sequence take, in bytes."""
    return -(-tokens // BLOCK_TOKENS) * block_bytes(architecture)


def cache_blocks(architecture: LlamaConfig, engine: EngineConfig) -> int:
    """Return how many blocks of keys and values fit.

    Raises:
        ConfigError: none does.
    """
    size = block_bytes(architecture)
    if engine.kv_memory < size:
        raise ConfigError(
            f"keys and values of {engine.kv_memory / 1e6:.2f} MB hold no block of {BLOCK_TOKENS} tokens, which takes "
            f"{size / 1e6:.2f} MB with this model: raise --kv-memory (TSQP_KV_MEMORY)."
        )
    return engine.kv_memory // size


def worker_count(config: EnclaveConfig, engine: EngineConfig) -> int:
    """Return how many workers are given, or may be by a directory; at least 1, also where it is our own."""
    if config.level not in WORKER_LEVELS:
        return 1
    return engine.directory_workers if engine.directory else max(1, len(engine.workers))


def memory(architecture: LlamaConfig, config: EnclaveConfig, engine: EngineConfig) -> Memory:
    """Size the cache, and the mask pools where something is masked.

    Raises:
        ConfigError: the cache holds not a single block, or the pools take more than they may.
    """
    blocks, workers = cache_blocks(architecture, engine), worker_count(config, engine)
    masks = mask_room(architecture, config, engine, workers)
    return Memory(
        blocks * block_bytes(architecture),
        blocks * BLOCK_TOKENS,
        workers * masks.used_bytes,
        masks.rows,
        masks.head_rows,
    )


def mask_room(architecture: LlamaConfig, config: EnclaveConfig, engine: EngineConfig, workers: int) -> MaskRoom:
    """Size the mask pool of each worker: unless the settings do, for a step of this engine.

    A step takes a row of each linear for each of its tokens. Most of them are of answers, so of the head too. Each
    worker must be able to compute a whole step, as the others may be lost; together they keep to ``mask_memory``.

    Raises:
        ConfigError: the pools take more than they may.
    """
    if config.level != "masked":
        return MaskRoom()
    groups, limit, rows = linear_groups(architecture), config.mask_memory // workers, config.mask_pool
    if rows is None:
        rows = bisect(range(1, most_rows(engine) + 1), limit, key=lambda rows: peak_bytes(groups, rows, rows))
    check_pool_fits(groups, rows, config.mask_memory, workers)
    heads = bisect(range(1, rows + 1), limit, key=lambda heads: peak_bytes(groups, rows, heads))
    return MaskRoom(rows, heads, limit, peak_bytes(groups, rows, heads))
