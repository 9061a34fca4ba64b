"""Which rows of each group's weights a process holds where several processes, ranks, multiply together.

A group's outputs are cut into as many ranges as there are ranks, in order and as even as they go. No sum crosses ranks:
each element is computed whole, by one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tsqp.errors import ConfigError
from tsqp.model.architecture import LinearGroup


@dataclass(frozen=True, slots=True)
class Share:
    """One rank of several, counted from 0.

    Attributes:
        rank: which.
        ranks: how many there are; one alone holds all rows.
    """

    rank: int = 0
    ranks: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether there are no other ranks."""
        return self.ranks == 1

    def of(self, rows: int, rank: int | None = None) -> range:
        """Return which of a group's output rows this rank holds, or another does."""
        rank = self.rank if rank is None else rank
        return range(rows * rank // self.ranks, rows * (rank + 1) // self.ranks)

    def check(self, groups: Iterable[LinearGroup]) -> None:
        """Refuse more ranks than there are rows.

        Raises:
            ConfigError: a rank would hold no row of some group.
        """
        least = min(groups, key=lambda group: group.rows)
        if self.ranks > least.rows:
            raise ConfigError(
                f"--tensor-parallel {self.ranks}: each rank needs a row of each group, and {least.name} has "
                f"{least.rows}: at most {least.rows} ranks fit this model."
            )


WHOLE = Share()


def parts(group: LinearGroup, rows: range) -> Iterator[tuple[str, range, slice]]:
    """Say where some of a group's rows come from.

    Yields:
        For each member with such rows its module path, which of its own rows they are, and their place among ``rows``.
    """
    start = 0
    for member, count in zip(group.members, group.out_features, strict=True):
        first, end = max(rows.start, start), min(rows.stop, start + count)
        if first < end:
            yield member, range(first - start, end - start), slice(first - rows.start, end - rows.start)
        start += count
