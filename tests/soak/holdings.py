"""What a serving process holds: cache blocks, mask rows, memory, threads, open files, objects of ended requests."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from msgspec import Struct
from torch import Tensor

from tsqp import loaded
from tsqp.enclave.mask_pool import MaskPool
from tsqp.enclave.masks import Mask
from tsqp.engine.loop import GenerationEngine
from tsqp.errors import TsqpError

# One of each lives as long as a request does; the names are of the engine's and the server's classes.
OF_REQUESTS = ("_Active", "_Running", "Generation", "TextStream", "Sampler", "Choice", "Running", "PagedRows", "Mask")
_PATIENCE_S = 60.0
# For answers whose generations have ended to be written.
_LAST_WORDS_S = 5.0
_POLL_S = 0.02


class MaskRows(Struct, frozen=True, kw_only=True):
    """Mask rows over all linear groups since the start.

    Attributes:
        drawn: numbered by the ledger, and so used up.
        taken: handed out to hide something.
        used: that did hide something.
        held: ready in the pool.
        again: handed out a second time, or after a later one.
        of_layers: those taken for the first group; every row of a step takes one.
    """

    drawn: int
    taken: int
    used: int
    held: int
    again: int
    of_layers: int


class Holdings(Struct, frozen=True, kw_only=True):
    """One look at a process in which nothing runs.

    Attributes:
        stats: the engine's, as ``EngineStats`` has them.
        cached_blocks: that the prefix cache holds.
        masks: None where nothing is masked.
        rows, steps: computed; each step has several rows.
        most_sequences: in one step.
        largest_logit: absolute, of all computed.
        memory_bytes: resident, of this process.
        worker_bytes: the same of its worker, but for what they share.
        threads: of this process, without those of asyncio's pool, which has ``os.cpu_count() + 4`` at most.
        files: that are open.
        objects: of requests, by class, that are still there.
    """

    stats: dict[str, Any]
    cached_blocks: int
    masks: MaskRows | None
    rows: int
    steps: int
    most_sequences: int
    largest_logit: float
    memory_bytes: int
    worker_bytes: int
    threads: int
    files: int
    objects: dict[str, int]


class Watch:
    """Counts what passes, from before the engine is made; for one engine a process."""

    def __init__(self) -> None:
        self.rows = self.steps = self.most_sequences = self.taken = self.used = self.again = self.of_layers = 0
        self.largest_logit = 0.0
        self._next: dict[str, int] = defaultdict(int)
        self._watch_steps()
        self._watch_masks()

    def _watch_steps(self) -> None:
        place: Any = loaded
        run = loaded.run_together

        def watched(work: Any) -> list[list[Tensor] | TsqpError]:
            parts = [part for _, each in work for part in each]
            self.steps += 1
            self.rows += sum(len(part.ids_M) for part in parts)
            self.most_sequences = max(self.most_sequences, sum(len(part._segments.spans_S5) for part in parts))
            found = run(work)
            logits = [each for outcome in found if isinstance(outcome, list) for each in outcome if each.numel()]
            self.largest_logit = max([self.largest_logit, *(float(each.abs().max()) for each in logits)])
            return found

        place.run_together = watched

    def _watch_masks(self) -> None:
        pools: Any = MaskPool
        masks: Any = Mask
        take, add = MaskPool.take, Mask.add

        def taking(pool: MaskPool, group: str, count: int) -> Mask:
            mask = take(pool, group, count)
            for part in mask._rows:
                self.again += part.first < self._next[group]
                self._next[group] = part.first + len(part.u_MN)
            self.taken += mask.count
            self.of_layers += mask.count if group == pool._order[0] else 0
            return mask

        def adding(mask: Mask, xq_MK: Tensor, out_MK: Tensor | None = None) -> Tensor:
            self.used += mask.count
            return add(mask, xq_MK, out_MK)

        pools.take, masks.add = taking, adding

    def masks(self, pool: MaskPool | None) -> MaskRows | None:
        """Return what became of mask rows."""
        if pool is None:
            return None
        return MaskRows(
            drawn=sum(pool._ledger._next.values()),
            taken=self.taken,
            used=self.used,
            held=pool.held,
            again=self.again,
            of_layers=self.of_layers,
        )


def holdings(engine: GenerationEngine, watch: Watch) -> Holdings:
    """Wait until nothing runs and the pool is full, and look: at what is there, should that not come."""
    pool, prefixes = engine.stepper.pool, engine._prefixes
    _wait(lambda: not (engine.stats().running or engine.stats().queued), _PATIENCE_S)
    _wait(lambda: pool is None or pool.is_full, _PATIENCE_S)
    _wait(lambda: not living(), _LAST_WORDS_S)
    stats, alive = engine.stats(), living()
    # Memory that is free inside of the allocator is not leaked: give it back.
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    own = psutil.Process()
    workers = [child.memory_info() for child in own.children(recursive=True)]
    return Holdings(
        stats={name: getattr(stats, name) for name in stats.__slots__},
        cached_blocks=prefixes.held if prefixes else 0,
        masks=watch.masks(pool),
        rows=watch.rows,
        steps=watch.steps,
        most_sequences=watch.most_sequences,
        largest_logit=watch.largest_logit,
        memory_bytes=own.memory_info().rss,
        worker_bytes=sum(each.rss - each.shared for each in workers),
        threads=sum(not each.name.startswith("asyncio_") for each in threading.enumerate()),
        files=sum(1 for _ in Path("/proc/self/fd").iterdir()),
        objects=alive,
    )


def _wait(done: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not done() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def living() -> dict[str, int]:
    """Return how many objects of requests there are, by class."""
    gc.collect()
    kinds = Counter(
        type(each).__name__
        for each in gc.get_objects()
        if type(each).__name__ in OF_REQUESTS and type(each).__module__.startswith("tsqp.")
    )
    return dict(kinds)
