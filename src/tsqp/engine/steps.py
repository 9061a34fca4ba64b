"""Computes a step on several workers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tsqp import loaded
from tsqp.engine.replica import Replica
from tsqp.engine.scheduler import Segment
from tsqp.engine.shares import Groups, divide, rows_of
from tsqp.errors import TsqpError
from tsqp.model.llama import Rows


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one worker's share of a step.

    Attributes:
        replica: the worker.
        groups: its segments.
        result: logits of each group's kept rows, shape (R, V), or why nothing of the share can be used.
    """

    replica: Replica
    groups: Groups
    result: list[Tensor] | TsqpError


def step(
    replicas: Sequence[Replica],
    segments: Sequence[Segment],
    rows: Callable[[Sequence[Segment]], Rows],
    rows_each: int,
    number: int,
) -> list[Outcome]:
    """Compute a step; the least loaded worker gets the most rows of it.

    Args:
        replicas: the workers that can be used, at least one.
        segments: of the step.
        rows: makes a group's rows.
        rows_each: see ``shares.divide``.
        number: of this step; each has a larger one than those before.

    Returns:
        What became of the share of each worker that had one.
    """
    chosen = sorted(replicas, key=Replica.order)
    groups = max(replica.stepper.groups for replica in replicas)
    shares = list(zip(chosen, divide(segments, len(chosen), groups, rows_each), strict=False))
    for replica, _ in shares:
        replica.last_step = number
    results = loaded.run_together([(replica.stepper, [rows(group) for group in cut]) for replica, cut in shares])
    for (replica, cut), result in zip(shares, results, strict=True):
        if not isinstance(result, TsqpError):
            replica.rows += sum(map(rows_of, cut))
    return [Outcome(*share, result) for share, result in zip(shares, results, strict=True)]
