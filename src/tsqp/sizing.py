"""How large an SGX enclave must be for a model, and how many threads it must allow: ``tsqp size``.

Inside SGX memory is reserved before anything runs, and a library that is mapped is copied whole. What depends on the
model follows from its architecture; the constants were measured, each as its comment says (docs/gramine.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from tsqp.config import EXACT_LEVELS, EnclaveConfig, EngineConfig
from tsqp.engine.memory import memory, most_rows, worker_count
from tsqp.errors import ConfigError
from tsqp.model.architecture import LinearGroup, LlamaConfig, linear_groups

LEVELS = ("open", "local", "verified", "masked")

# Mapped libraries (454 MB) and private memory (184 MB) of a process that has imported all that `tsqp serve` does and
# has multiplied once: sums over /proc/PID/smaps, Python 3.11, torch 2.13 for CPUs, 2 threads.
_LIBRARIES_BYTES = 700_000_000
# A tokenizer of 49,152 tokens took 30 MB more than its file of 3.5 MB (the same sums); one of 128,256 has 9 MB.
_TOKENIZER_BYTES_PER_TOKEN = 1000
# Gramine's own memory with hashes of some 5,000 files: a guess, not measured.
_GRAMINE_BYTES = 128 << 20
STACK_BYTES = 4 << 20
# The vectors of a check: 8 + 12 bytes for each output and each input (FieldVector with its native limbs).
_CHECK_BYTES = 20
# How often a step's rows lie in memory at once, as input, masked, sent, claimed, checked and scaled: an upper bound.
_STEP_COPIES = 6
# The groups that dealers are asked for ahead (mask_pool.py).
_GROUPS_AHEAD = 8
_WORD_BYTES = 4
# What may be wrong with all of this, and for fragmentation.
_HEADROOM = 1.2

# Gramine's own; the main thread; the engine and what refills the pool; a heartbeat where memory is shared by name.
_GRAMINE_THREADS = 3
_OWN_THREADS = 4
# Two for a link's context, of one to a worker and one to each dealer or from clients of the worker.
_THREADS_PER_LINK = 2
# Each further worker has a thread that refills its pool; beside all of them one asks how they are, over one more link.
_THREADS_OF_HEALTH = 1 + _THREADS_PER_LINK
# Python's default for work beside an event loop is 4 more than the cores, at most 32: the host's are not known.
_THREADS_OF_ASYNCIO = 32
# Threads that compute in teams of their own: the main one, the engine, the one that refills.
_TEAMS = 3
_ROUND_THREADS = 8


@dataclass(frozen=True, slots=True)
class EnclaveSize:
    """What an enclave takes. ``parts`` are bytes by name, in the order in which they are told."""

    parts: dict[str, int]
    enclave_bytes: int
    max_threads: int

    @property
    def needed_bytes(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())


def enclave_size(
    architecture: LlamaConfig,
    config: EnclaveConfig,
    engine: EngineConfig,
    *,
    threads: int,
    embedding_item_bytes: int,
    packed: bool = False,
) -> EnclaveSize:
    """Return how large an enclave must be.

    Args:
        architecture: the model's.
        config: level, dtype, dealers and the mask pool's settings.
        engine: keys and values, how many requests run together, and how many workers.
        threads: that compute, at least 1.
        embedding_item_bytes: of a number in the stored embedding table.
        packed: whether a model at `local` is a packed one; at `verified` and `masked` it always is.

    Raises:
        ConfigError: a level that no enclave runs, or settings that do not go together.
    """
    if config.level not in LEVELS:
        raise ConfigError(f"no enclave runs at the level {config.level}: choose one of {', '.join(LEVELS)}.")
    room = memory(architecture, config, engine)
    workers = worker_count(config, engine)
    links, more = workers * (1 + len(config.dealers)), workers - 1
    max_threads = _rounded(
        _GRAMINE_THREADS
        + _OWN_THREADS
        + _THREADS_PER_LINK * links
        + _THREADS_OF_ASYNCIO
        + (_TEAMS + 1) * (threads - 1)
        + more * threads
        + (_THREADS_OF_HEALTH + threads - 1 if more else 0)
    )
    parts = {
        "libraries": _LIBRARIES_BYTES,
        "tokenizer": architecture.vocab_size * _TOKENIZER_BYTES_PER_TOKEN,
        **_of_model(architecture, config, embedding_item_bytes, workers, packed=packed or config.level in EXACT_LEVELS),
        "keys and values": room.cache_bytes,
        "masks": room.mask_bytes,
        "a step": _of_step(architecture, config, engine),
        "stacks": max_threads * STACK_BYTES,
        "Gramine": _GRAMINE_BYTES,
    }
    needed = int(_HEADROOM * sum(parts.values()))
    return EnclaveSize(
        {name: size for name, size in parts.items() if size}, 1 << (needed - 1).bit_length(), max_threads
    )


def _of_model(
    architecture: LlamaConfig, config: EnclaveConfig, embedding_item_bytes: int, workers: int, *, packed: bool
) -> dict[str, int]:
    """Return what of the model lies in the enclave, and what loading takes beside it."""
    groups = linear_groups(architecture)
    largest = max(map(_elements, groups))
    codes = sum(map(_elements, groups))
    embedding = architecture.vocab_size * architecture.hidden_size
    if config.level == "open":  # norms alone; the weights are read once, to be hashed, in small blocks
        return {"norms": _WORD_BYTES * (2 * architecture.layers + 1) * architecture.hidden_size}
    if not packed:
        item = _WORD_BYTES if config.dtype == "float32" else _WORD_BYTES // 2
        return {"weights": item * (codes + embedding), "loading": (item + _WORD_BYTES) * largest}
    # Scales, biases and norms are some hundredths of the checks. Each worker has vectors of its own; codes are shared.
    checks = workers * _CHECK_BYTES * sum(group.rows + group.in_features for group in groups)
    keeps = config.level == "local" or (config.level == "masked" and not config.dealers)
    return {
        "embedding table": embedding_item_bytes * embedding,
        "checks": checks,
        "codes": codes if keeps else 0,
        "loading": 2 * largest if keeps else 0,
    }


def _of_step(architecture: LlamaConfig, config: EnclaveConfig, engine: EngineConfig) -> int:
    *layers, head = linear_groups(architecture)
    rows, answers = most_rows(engine), engine.max_running
    widest = max(group.rows + group.in_features for group in layers)
    # Logits are sorted to sample from them: as many copies again.
    step = _STEP_COPIES * _WORD_BYTES * (rows * widest + answers * head.rows)
    if config.dealers:
        step += len(config.dealers) * _GROUPS_AHEAD * rows * _WORD_BYTES * max(group.rows for group in layers)
    return step


def _elements(group: LinearGroup) -> int:
    return group.rows * group.in_features


def _rounded(threads: int) -> int:
    return -(-threads // _ROUND_THREADS) * _ROUND_THREADS
