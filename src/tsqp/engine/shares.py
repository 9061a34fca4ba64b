"""Which part of a step each worker computes. Decides only: no clock, no thread, no tensor, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from tsqp.engine.scheduler import Segment, split

# One worker's groups, which take turns.
Groups = tuple[tuple[Segment, ...], ...]


def divide(segments: Sequence[Segment], workers: int, groups: int, rows_each: int) -> tuple[Groups, ...]:
    """Divide a step over workers by rows, and each one's share into groups that take turns.

    A step that would be cut into groups anyway costs the enclave no more when each group has a worker of its own.
    Beyond that another worker must be worth its own round trips: few rows are bound by the reading of weights, which
    every worker does.

    Args:
        segments: of the step; each is computed by one worker.
        workers: how many there are, at least 1.
        groups: into how many parts one worker's step is cut.
        rows_each: another worker is used for each so many rows.

    Returns:
        For each worker that is used its groups, the share with the most rows first.
    """
    used = max(1, min(workers, max(groups, rows_of(segments) // rows_each)))
    if used == 1:
        return (split(segments, groups),)
    shares = sorted(split(segments, used), key=rows_of, reverse=True)
    return tuple(split(share, -(-groups // len(shares))) for share in shares)


def rows_of(segments: Sequence[Segment]) -> int:
    """Return how many rows segments have together."""
    return sum(segment.count for segment in segments)
