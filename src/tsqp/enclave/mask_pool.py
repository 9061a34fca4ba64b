"""Mask products kept ready: filled while nothing runs, taken once, in memory only.

Products determine masks, so the pool is key material: it is never written down, and pickling it raises. What is not
ready when it is needed is computed or fetched then: slower, never unmasked and never used again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.enclave.mask_sources import MaskSource
from tsqp.enclave.masks import Mask, MaskLedger, MaskRows
from tsqp.errors import ConfigError, IntegrityError, MaskReuseError
from tsqp.meter import Meter
from tsqp.model.architecture import LinearGroup

_WORD_BYTES = 4
# A step of filling produces at most this much: some milliseconds, after which a request may have come.
_STEP_BYTES = 4 << 20
_STEP_ROWS = 128
# How many of the forward pass's next products are asked for ahead where dealers compute them just in time.
_AHEAD = 8
# A prompt needs one row of the head; a pool for prompts of this many tokens holds one per prompt.
_TOKENS_PER_HEAD_ROW = 16

HEAD = "head"


def pool_rows(groups: Sequence[LinearGroup], rows: int, head_rows: int | None = None) -> dict[str, int]:
    """Return how many rows of each group a pool for ``rows`` tokens holds; of the head by default one per prompt."""
    of_head = -(-rows // _TOKENS_PER_HEAD_ROW) if head_rows is None else head_rows
    return {group.name: of_head if group.name == HEAD else rows for group in groups}


def pool_bytes(groups: Sequence[LinearGroup], rows: int, head_rows: int | None = None) -> int:
    """Return how much memory the products of a pool for ``rows`` tokens take, in bytes."""
    held = pool_rows(groups, rows, head_rows)
    return sum(held[group.name] * group.rows * _WORD_BYTES for group in groups)


def peak_bytes(groups: Sequence[LinearGroup], rows: int, head_rows: int | None = None) -> int:
    """Return what a pool may take while it is used: of each group, half a block that is partly used stays in memory."""
    held = pool_rows(groups, rows, head_rows)
    halves = sum(min(_step_rows(group), held[group.name]) // 2 * group.rows * _WORD_BYTES for group in groups)
    return pool_bytes(groups, rows, head_rows) + halves


def _step_rows(group: LinearGroup) -> int:
    return max(1, min(_STEP_ROWS, _STEP_BYTES // (group.rows * _WORD_BYTES)))


def largest_pool(groups: Sequence[LinearGroup], limit_bytes: int) -> int:
    """Return for how many tokens a pool fits into ``limit_bytes``."""
    rows = limit_bytes // max(1, sum(group.rows * _WORD_BYTES for group in groups if group.name != HEAD))
    while rows and peak_bytes(groups, rows) > limit_bytes:
        rows = max(0, rows - max(1, rows // 64))
    return rows


def check_pool_fits(groups: Sequence[LinearGroup], rows: int, limit_bytes: int, workers: int = 1) -> None:
    """Refuse a pool that is larger than the memory it may take, where so many workers have one each.

    Raises:
        ConfigError: it is.
    """
    needed = peak_bytes(groups, rows)
    limit_bytes //= workers
    if needed > limit_bytes:
        shared = f" for each of {workers} workers" if workers > 1 else ""
        raise ConfigError(
            f"a mask pool of {rows} rows takes {needed / 1e6:.1f} MB with this model; --mask-memory allows "
            f"{limit_bytes / 1e6:.1f} MB{shared}, which is about {largest_pool(groups, limit_bytes)} rows. "
            "Lower --mask-pool or raise --mask-memory."
        )


@dataclass(frozen=True, slots=True, repr=False)
class _Pending:
    first: int
    count: int
    collect: Callable[[], Tensor]


class MaskPool:
    """The masks of one enclave process. Thread-safe; refuses to serve a fork.

    Args:
        groups: the model's linear groups, in order.
        source: where products come from.
        ledger: numbers the rows.
        rows: for how many tokens to keep products ready; 0 for none.
        limit_bytes: memory that products may take.
        meter: where rows and waiting are counted.

    Raises:
        ConfigError: the pool would take more than ``limit_bytes``.
    """

    def __init__(
        self,
        groups: Sequence[LinearGroup],
        source: MaskSource,
        ledger: MaskLedger,
        rows: int,
        limit_bytes: int,
        meter: Meter,
    ) -> None:
        check_pool_fits(groups, rows, limit_bytes)
        self._groups = groups
        self._order = [group.name for group in groups]
        self._numbers = {name: number for number, name in enumerate(self._order)}
        self._step = {group.name: _step_rows(group) for group in groups}
        self._targets = pool_rows(groups, rows)
        self._source = source
        self._ledger = ledger
        self._meter = meter
        self._ready: dict[str, deque[MaskRows]] = {name: deque() for name in self._order}
        self._pending: dict[str, deque[_Pending]] = {name: deque() for name in self._order}
        self._distrusted: str | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"MaskPool({self.held} of {self.wanted} rows, not shown)"

    def __reduce__(self) -> tuple[object, ...]:
        raise MaskReuseError("a pool of masks is key material: it lives in memory only and cannot be stored.")

    @torch.inference_mode()
    def resize(self, rows: int, head_rows: int, limit_bytes: int) -> None:
        """Keep products ready for so many tokens from now on; what is held beyond that is thrown away, and stays burnt.

        Args:
            rows: of each group but the head.
            head_rows: of the head: generation takes one for each token, not for each prompt.
            limit_bytes: memory that products may take.

        Raises:
            ConfigError: the pool would take more than it may.
        """
        needed = peak_bytes(self._groups, rows, head_rows)
        if needed > limit_bytes:
            raise ConfigError(
                f"a mask pool of {rows} rows with {head_rows} of the head takes {needed / 1e6:.1f} MB; it may take "
                f"{limit_bytes / 1e6:.1f} MB."
            )
        with self._lock:
            self._targets = pool_rows(self._groups, rows, head_rows)
            for name, target in self._targets.items():
                kept = self._take_ready(name, target)
                self._ready[name].clear()
                self._ready[name].extend(MaskRows(part.first, _compact(part.u_MN), part.r_MK) for part in kept)

    @property
    def peers(self) -> tuple[str, ...]:
        """Who contributes to the products."""
        return self._source.peers

    @property
    def held(self) -> int:
        """Rows that are ready, over all groups."""
        return sum(self._held().values())

    @property
    def wanted(self) -> int:
        """Rows that a full pool holds."""
        return sum(self._targets.values())

    @property
    def is_full(self) -> bool:
        """Whether every group has its rows."""
        held = self._held()
        return all(held[name] >= target for name, target in self._targets.items())

    def _held(self) -> Mapping[str, int]:
        return {name: sum(len(part.u_MN) for part in tuple(parts)) for name, parts in self._ready.items()}

    @torch.inference_mode()
    def take(self, group: str, count: int) -> Mask:
        """Take the mask for ``count`` rows of a group out of the pool; what is missing is produced now.

        Raises:
            MaskReuseError: this process is a fork, or no rows are left.
            IntegrityError: a dealer is out of use.
            TransportError, HostileError: a dealer does not answer, or not with products.
        """
        self._ledger.check_process()
        with self._lock:
            self.check_trusted()
            taken = self._take_ready(group, count)
            missing = count - sum(len(part.u_MN) for part in taken)
            if missing:
                with self._meter.span("mask_wait"):
                    taken += self._take_missing(group, missing)
            self._meter.mask_rows += count
        return Mask(taken, lambda first, rows: self._words(group, first, rows))

    def _words(self, group: str, first: int, count: int) -> Tensor:
        self._ledger.check_process()
        return self._source.rows(group, first, count)

    def _take_ready(self, group: str, count: int) -> list[MaskRows]:
        taken: list[MaskRows] = []
        ready = self._ready[group]
        while count and ready:
            part = ready.popleft()
            if len(part.u_MN) > count:
                part, rest = _split(part, count)
                ready.appendleft(rest)
            taken.append(part)
            count -= len(part.u_MN)
        return taken

    @torch.inference_mode()
    def make_words_ahead(self, after: str, count: int) -> None:
        """Make the mask words of what the forward pass probably takes next: rows of the group after this one.

        To be called while a product is away. Nothing is taken; rows that are not ready are left alone.
        """
        self._ledger.check_process()
        at = self._numbers[after] + 1
        group = self._order[at] if at < len(self._order) else HEAD
        if group == HEAD:  # one row of a prompt, if it is the prompt's last chunk
            return
        with self._lock:
            parts = self._take_ready(group, count)
            self._ready[group].extendleft(self._with_words(group, part) for part in reversed(parts))

    def _with_words(self, group: str, part: MaskRows) -> MaskRows:
        if part.r_MK is not None:
            return part
        return MaskRows(part.first, part.u_MN, self._words(group, part.first, len(part.u_MN)))

    def _take_missing(self, group: str, count: int) -> list[MaskRows]:
        self._ask(group, count)
        self._ask_ahead(group, count)
        while self._pending[group]:
            self._collect(group)
        return self._take_ready(group, count)

    def _ask(self, group: str, count: int) -> None:
        """Start producing what is missing of ``count`` rows."""
        coming = sum(pending.count for pending in self._pending[group])
        coming += sum(len(part.u_MN) for part in self._ready[group])
        if coming < count:
            missing = count - coming
            first = self._ledger.take(self._numbers[group], missing)
            self._pending[group].append(_Pending(first, missing, self._source.start(group, first, missing)))

    def _ask_ahead(self, group: str, count: int) -> None:
        """Let dealers work on the next products of the forward pass while this one is being used."""
        if self.peers:
            at = self._numbers[group] + 1
            for following in self._order[at : at + _AHEAD]:
                if following != HEAD:
                    self._ask(following, count)

    def _collect(self, group: str) -> None:
        pending = self._pending[group].popleft()
        self._ready[group].append(MaskRows(pending.first, pending.collect()))

    @torch.inference_mode()
    def fill_step(self) -> None:
        """Produce some rows of the emptiest groups, a few milliseconds' worth, and put them in the pool.

        Raises:
            TsqpError: as ``take``.
        """
        self._ledger.check_process()
        with self._lock:
            self.check_trusted()
            held = self._held()
            lacking = [name for name in self._order if held[name] < self._targets[name]]
            lacking.sort(key=lambda name: held[name] / self._targets[name])
            for name in lacking[: _AHEAD if self.peers else 1]:
                self._ask(name, min(self._targets[name], held[name] + self._step[name]))
            for name in self._order:
                while self._pending[name]:
                    self._collect(name)

    def check_trusted(self) -> None:
        """Refuse to go on with dealers that may have lied.

        Raises:
            IntegrityError: a wrong product came that they contributed to.
        """
        if self._distrusted:
            raise IntegrityError(f"the dealers are out of use since a wrong product: {self._distrusted}")

    def distrust(self, reason: str) -> None:
        """Throw away every product, since those who made them may have lied; their rows stay burnt.

        Dealers are out of use from now on: nothing is asked of them again. The enclave's own products are made anew.
        """
        with self._lock:
            if self.peers:
                self._distrusted = reason
            for name in self._order:
                self._ready[name].clear()
                self._pending[name].clear()


def _split(part: MaskRows, count: int) -> tuple[MaskRows, MaskRows]:
    """Cut rows in two after ``count``."""
    first_MK, rest_MK = (None, None) if part.r_MK is None else (part.r_MK[:count], part.r_MK[count:])
    rest = MaskRows(part.first + count, _compact(part.u_MN[count:]), rest_MK)
    return MaskRows(part.first, part.u_MN[:count], first_MK), rest


def _compact(rest_MN: Tensor) -> Tensor:
    """Let go of a block's memory once at most half of it is left; each row is copied a constant number of times."""
    return rest_MN.clone() if 2 * rest_MN.nbytes <= rest_MN.untyped_storage().nbytes() else rest_MN
