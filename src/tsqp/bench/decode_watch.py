"""What ``tsqp bench decode`` watches an engine with: when tokens come, and how long products take.

Both are there only while a run is measured. Everything happens on the engine's thread.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tsqp.enclave.mask_pool import HEAD
from tsqp.engine.api import Engine, Event, Failed, Finished, OnEvent, Token
from tsqp.errors import InternalError, TsqpError
from tsqp.model.ops import LinearOps
from tsqp.model.overlap import Pending

_BEGINS_AT = 2


class TimedOps:
    """Others' products, with a clock around asking and collecting, and one from a step's first to its last product.

    What it costs itself counts as the engine's.

    Args:
        ops: who computes them.
    """

    def __init__(self, ops: LinearOps) -> None:
        self._ops = ops
        self._under_way = 0
        self._began_ns = 0
        self.products_ns = 0
        self.computed_ns = 0

    def embedding(self, ids_M: Tensor) -> Pending:
        """See ``LinearOps.embedding``. A step, or a part of one that takes turns with others, begins here."""
        started = time.perf_counter_ns()
        if not self._under_way:
            self._began_ns = started
        self._under_way += 1
        pending = self._ops.embedding(ids_M)
        self.products_ns += time.perf_counter_ns() - started
        return partial(self._collect, pending)

    def linear(self, group: str, x_MK: Tensor) -> Pending:
        """See ``LinearOps.linear``."""
        started = time.perf_counter_ns()
        pending = self._ops.linear(group, x_MK)
        self.products_ns += time.perf_counter_ns() - started
        return partial(self._collect_last if group == HEAD else self._collect, pending)

    def linear_chain(self, groups: tuple[str, ...], x_MK: Tensor, residual_MD: Tensor) -> Pending | None:
        """See ``LinearOps.linear_chain``."""
        started = time.perf_counter_ns()
        pending = self._ops.linear_chain(groups, x_MK, residual_MD)
        self.products_ns += time.perf_counter_ns() - started
        return pending and partial(self._collect_last if groups[-1] == HEAD else self._collect, pending)

    def _collect(self, pending: Pending) -> Tensor:
        started = time.perf_counter_ns()
        y = pending()
        self.products_ns += time.perf_counter_ns() - started
        return y

    def _collect_last(self, pending: Pending) -> Tensor:
        y = self._collect(pending)
        self._under_way -= 1
        if not self._under_way:
            self.computed_ns += time.perf_counter_ns() - self._began_ns
        return y

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``LinearOps.matmul``. Attention of generation does not use it."""
        return self._ops.matmul(a, b)

    def state(self) -> dict[str, Tensor]:
        """See ``LinearOps.state``."""
        return self._ops.state()

    def abandon(self) -> None:
        """See ``LinearOps.abandon``. The step is over."""
        self._under_way = 0
        self._ops.abandon()


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment: how many tokens the watched request has, and what has been moved and spent until then.

    ``seconds`` are the engine's own counts; ``products_s`` and ``computed_s`` are 0 where no products are timed.
    """

    at_s: float
    steps: int
    bytes_moved: int
    seconds: dict[str, float]
    products_s: float
    computed_s: float


class Watch:
    """Finds the part of a run in which every request has a token in every step.

    It begins with the second token of the request that is the last to have one, and ends with that request's token in
    the step in which the first of them has its last: both moments lie at the same place of a step. Prompts have been
    read by then. Not with the first token, since an engine counts a step's costs once it has told its tokens: that step
    read prompts, and would be among what the engine has counted since.

    Args:
        engine: whose.
        batch: how many requests.
        tokens: of each.
        products: what times them, if they are timed.
    """

    def __init__(self, engine: Engine, batch: int, tokens: int, products: TimedOps | None) -> None:
        self._engine, self._tokens, self._products = engine, tokens, products
        self._told = [0] * batch
        self._last: int | None = None
        self._marks: list[Mark] = []
        self._failure: TsqpError | None = None
        self._unfinished = batch
        self._ended = threading.Event()
        self.first_token = -1

    def listener(self, number: int) -> OnEvent:
        """Return what a request's events go to."""

        def take(event: Event) -> None:
            if isinstance(event, Token):
                self._note(number, event)
            elif isinstance(event, (Failed, Finished)):
                self._failure = self._failure or (event.error if isinstance(event, Failed) else None)
                self._unfinished -= 1
                if not self._unfinished:
                    self._ended.set()

        return take

    def _note(self, number: int, token: Token) -> None:
        if not number and not self._told[0]:
            self.first_token = token.id
        self._told[number] += 1
        if self._last is None and all(self._told):
            self._last = number
        ends = max(self._told) == self._tokens
        if number == self._last and (len(self._marks) == 1 if ends else self._told[number] == _BEGINS_AT):
            self._marks.append(self._mark(self._told[number]))

    def _mark(self, steps: int) -> Mark:
        at_s = time.perf_counter()
        stats = self._engine.stats()
        timed = (self._products.products_ns, self._products.computed_ns) if self._products else (0, 0)
        products_s, computed_s = (spent_ns / 1e9 for spent_ns in timed)
        moved = stats.bytes_sent + stats.bytes_received
        return Mark(at_s, steps, moved, stats.seconds, products_s, computed_s)

    def window(self) -> tuple[Mark, Mark]:
        """Wait for the end of every request; return the moments between which all of them had tokens.

        Raises:
            TsqpError: a request failed.
            InternalError: one ended before the last had two tokens, or in the same step.
        """
        self._ended.wait()
        if self._failure is not None:
            raise self._failure
        if len(self._marks) != 2:  # noqa: PLR2004
            raise InternalError(
                f"of {len(self._told)} requests the first ended before the last had well begun: more than "
                f"{self._tokens} tokens are needed."
            )
        return self._marks[0], self._marks[1]
