"""Where the keys and values of a step's tokens lie: in blocks of a pool, which a table per sequence names.

Paged attention (Kwon et al. 2023). A layer's pool is float32 of shape (blocks, 2, G, BLOCK_TOKENS, H): keys, then
values, of G key-value heads of size H.

Shapes: S segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tsqp.arith.extension import address
from tsqp.errors import ExactnessError

# Tokens of a block. The number is native.h's.
BLOCK_TOKENS = 64
# Columns of a segment's numbers.
_COLUMNS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Rows of a step, each segment of one sequence. Checked once, then used for every layer; not to be changed.

    Tokens at positions first, first + 1, ... see the keys from 0 to their own. Their own keys and values are stored.

    Attributes:
        spans_S5: int32: first row, tokens, first position, offset and length of its table in ``tables``.
        tables: int32, the numbers of all segments' blocks.
        rows: how many rows a step must have at least.
        blocks: how many blocks a pool must have at least.
        count: S.
        spans_at: where ``spans_S5`` lies, as native.h's ``struct sequence``.
        tables_at: where ``tables`` lies.
    """

    spans_S5: Tensor
    tables: Tensor
    rows: int
    blocks: int
    count: int
    spans_at: int
    tables_at: int

    @classmethod
    def of(cls, segments: Iterable[tuple[int, int, Sequence[int]]]) -> Segments:
        """Make them from the number of tokens, first position and table of each, whose rows follow each other.

        Raises:
            ExactnessError: as ``checked``.
        """
        spans: list[tuple[int, int, int, int, int]] = []
        tables: list[int] = []
        row = 0
        for tokens, first, table in segments:
            spans.append((row, tokens, first, len(tables), len(table)))
            tables.extend(table)
            row += tokens
        spans_S5 = np.array(spans, dtype=np.int32).reshape(-1, _COLUMNS)
        return cls.checked(spans_S5, np.array(tables, dtype=np.int32))

    @classmethod
    def checked(cls, spans_S5: npt.NDArray[np.int32], tables: npt.NDArray[np.int32]) -> Segments:
        """Make them from arrays, which are copied.

        Raises:
            ExactnessError: negative numbers, a table outside ``tables`` or too short for its tokens, or a row of two
                segments.
        """
        numbers = spans_S5.astype(np.int64)
        row, tokens, first, offset, length = numbers.T
        if min(numbers.min(initial=0), tables.min(initial=0)) < 0:
            raise ExactnessError("a segment of a step, or a number of a block, is negative.")
        if (offset + length > len(tables)).any() or (first + tokens > length * BLOCK_TOKENS).any():
            raise ExactnessError(
                f"a table of a step's segments ends after the {len(tables)} numbers given, or has fewer blocks of "
                f"{BLOCK_TOKENS} than the segment's keys need."
            )
        order = np.argsort(row, kind="stable")
        if (row[order[1:]] < (row + tokens)[order[:-1]]).any():
            raise ExactnessError("two segments of a step share a row.")
        own_S5, own = (torch.from_numpy(np.array(each, dtype=np.int32)) for each in (spans_S5, tables))
        return cls(
            own_S5,
            own,
            rows=int((row + tokens).max(initial=0)),
            blocks=int(tables.max(initial=-1)) + 1,
            count=len(own_S5),
            spans_at=address(own_S5, torch.int32, len(own_S5), _COLUMNS),
            tables_at=address(own, torch.int32, len(own)),
        )

    def check_fits(self, rows: int, blocks: int) -> None:
        """Refuse a step or a pool that lacks what the segments name.

        Raises:
            ExactnessError: it has fewer rows or blocks.
        """
        if self.rows > rows or self.blocks > blocks:
            raise ExactnessError(
                f"the segments need {self.rows} rows and {self.blocks} blocks; there are {rows} and {blocks}."
            )
