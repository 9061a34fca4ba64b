"""What an engine takes of memory: told before anything is loaded, and then kept to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.enclave.mask_pool import peak_bytes
from tsqp.engine.blocks import BlockPool
from tsqp.engine.memory import cache_blocks, cache_bytes, chunk_tokens, mask_room, memory, most_rows
from tsqp.engine.scheduler import Scheduler
from tsqp.errors import ConfigError
from tsqp.model.architecture import LlamaConfig, linear_groups, read_config
from tsqp.model.paged_cache import PagedCache, block_bytes

MASKED = EnclaveConfig(level="masked")


@pytest.fixture(scope="module")
def architecture(tiny_llama: Path) -> LlamaConfig:
    return read_config(tiny_llama)


@pytest.mark.parametrize("step_tokens", [64, 100, 128, 256, 1000])
@pytest.mark.parametrize("max_running", [1, 7, 64, 300])
def test_a_step_has_as_many_rows_as_the_scheduler_says(step_tokens: int, max_running: int) -> None:
    engine = EngineConfig(step_tokens=step_tokens, max_running=max_running)
    scheduler = Scheduler(
        blocks=BlockPool(1, 64),
        prefixes=None,
        chunk_tokens=chunk_tokens(engine),
        step_rows=step_tokens,
        max_running=max_running,
    )
    assert most_rows(engine) == scheduler.most_rows
    assert chunk_tokens(engine) == min(128, step_tokens - step_tokens % 64)


def test_the_cache_takes_what_it_may_and_no_more(architecture: LlamaConfig) -> None:
    engine = EngineConfig(kv_memory=1 << 20)
    told = memory(architecture, EnclaveConfig(level="open"), engine)
    pools = PagedCache(architecture, cache_blocks(architecture, engine))._pools
    assert (
        sum(pool.nbytes for pool in pools) == told.cache_bytes <= 1 << 20 < told.cache_bytes + block_bytes(architecture)
    )
    assert told.cache_tokens == pools[0].shape[0] * 64
    assert str(told) == f"keys and values {told.cache_bytes / 1e6:.1f} MB ({told.cache_tokens} tokens)"
    with pytest.raises(ConfigError, match=r"hold no block of 64 tokens.*raise --kv-memory"):
        memory(architecture, EnclaveConfig(level="open"), EngineConfig(kv_memory=block_bytes(architecture) - 1))


@pytest.mark.parametrize("tokens", [1, 64, 65, 1000])
def test_a_cache_for_one_request_has_room_for_it_and_no_block_more(architecture: LlamaConfig, tokens: int) -> None:
    engine = EngineConfig(kv_memory=cache_bytes(architecture, tokens))
    assert cache_blocks(architecture, engine) == -(-tokens // 64)


def test_the_pool_holds_a_step_of_answers_by_default(architecture: LlamaConfig) -> None:
    told = memory(architecture, MASKED, EngineConfig())
    assert told.mask_rows == told.head_rows == 256
    assert told.mask_bytes == peak_bytes(linear_groups(architecture), 256, 256)
    assert str(told).endswith(f", masks {told.mask_bytes / 1e6:.1f} MB (256 tokens)")
    assert memory(architecture, MASKED, EngineConfig(max_running=200)).mask_rows == 327


@pytest.mark.parametrize("limit", [0, 1000, 100_000, 1_000_000])
def test_the_pool_is_the_largest_that_its_memory_allows(architecture: LlamaConfig, limit: int) -> None:
    groups = linear_groups(architecture)
    rows = memory(architecture, replace(MASKED, mask_memory=limit), EngineConfig()).mask_rows
    assert peak_bytes(groups, rows, rows) <= limit
    assert rows == 256 or peak_bytes(groups, rows + 1, rows + 1) > limit


def test_a_pool_that_was_asked_for_has_as_much_of_the_head_as_fits(architecture: LlamaConfig) -> None:
    groups = linear_groups(architecture)
    asked: Any = {"mask_pool": 100, "mask_memory": peak_bytes(groups, 100, 40)}
    told = memory(architecture, replace(MASKED, **asked), EngineConfig())
    assert (told.mask_rows, told.head_rows) == (100, 40)
    assert told.mask_bytes == asked["mask_memory"]
    with pytest.raises(ConfigError, match="Lower --mask-pool or raise --mask-memory"):
        memory(architecture, replace(MASKED, mask_pool=100, mask_memory=1000), EngineConfig())
    assert memory(architecture, replace(MASKED, mask_pool=0), EngineConfig()).mask_bytes == 0


def test_the_pools_of_all_workers_keep_to_what_one_might_take(architecture: LlamaConfig) -> None:
    groups = linear_groups(architecture)
    three = EngineConfig(workers=("a:1", "b:1", "c:1"))
    full = peak_bytes(groups, 256, 256)
    assert memory(architecture, replace(MASKED, mask_memory=3 * full), three).mask_bytes == 3 * full
    few = replace(MASKED, mask_memory=3 * full - 1)
    told = memory(architecture, few, three)
    assert told.mask_rows == 255
    assert told.mask_bytes <= few.mask_memory
    each = mask_room(architecture, few, three, 3)
    assert (each.rows, each.limit_bytes) == (255, full - 1)
    assert 3 * each.used_bytes == told.mask_bytes
    with pytest.raises(ConfigError, match="for each of 3 workers"):
        memory(architecture, replace(few, mask_pool=300), three)
    assert memory(architecture, EnclaveConfig(level="open"), three).mask_bytes == 0
