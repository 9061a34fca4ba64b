"""Micro-batches: parts of one prediction that take turns, so that one is computed while another's product is away.

A part is a generator. It yields each product that it has asked for and is resumed with the result. ``in_turns``
collects products in the order in which they were asked for, so of two parts the first stays ahead: a chunk of a prompt
finds the keys and values of the chunks before it in each layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

# A product that has been asked for; call it once for the result.
Pending = Callable[[], Tensor]
Result = TypeVar("Result")
# Yields products, is sent their results, and returns what the part is computed for.
Part = Generator[Pending, Tensor, Result]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some sequences of a batch, and some tokens of each.

    Attributes:
        sequences: from which to which sequence.
        first: position of the first token.
        end: position after the last one.
    """

    sequences: slice
    first: int
    end: int


def micro_batches(batch: int, tokens: int, count: int) -> list[MicroBatch]:
    """Cut a batch into parts of about the same size: between sequences first, then each prompt into chunks.

    Args:
        batch: sequences, B.
        tokens: of each, T.
        count: how many parts at most.

    Returns:
        Chunk by chunk, every sequence's first before any one's second; none where there is nothing to cut.
    """
    groups = _cuts(batch, min(batch, count))
    chunks = _cuts(tokens, min(tokens, max(1, count // max(1, len(groups)))))
    return [MicroBatch(slice(*group), *chunk) for chunk in chunks for group in groups]


def _cuts(size: int, count: int) -> list[tuple[int, int]]:
    return [(size * part // count, size * (part + 1) // count) for part in range(count)]


def in_turns(parts: Sequence[Part[Result]], abandon: Callable[[], None]) -> list[Result]:
    """Run parts to their ends.

    Args:
        parts: not started yet. A part may use what an earlier one did before the product it waits for.
        abandon: called where a part fails: nobody will collect the products that are on their way.

    Returns:
        What each part returns, in order.
    """
    results: dict[int, Result] = {}
    # Products in the order in which they were asked for, by the number of their part; None starts a part.
    waiting: deque[tuple[int, Pending | None]] = deque((number, None) for number in range(len(parts)))
    try:
        while waiting:
            number, pending = waiting.popleft()
            try:
                waiting.append((number, parts[number].send(pending()) if pending else next(parts[number])))
            except StopIteration as end:
                results[number] = end.value
    except BaseException:
        abandon()
        raise
    return [results[number] for number in range(len(parts))]
