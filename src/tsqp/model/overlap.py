"""Micro-batches: parts of one prediction that take turns, so that one is computed while another's product is away.

A part is a generator. It yields each product that it has asked for and is resumed with the result. ``in_turns``
collects products in the order in which they were asked for, so of two parts the first stays ahead: a chunk of a prompt
finds the keys and values of the chunks before it in each layer. ``teams_in_turns`` does so for several workers at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from tsqp.errors import TsqpError

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


@dataclass(frozen=True, slots=True)
class Team(Generic[Result]):
    """Parts whose products one worker computes.

    Attributes:
        parts: not started yet. A part may use what an earlier one did before the product it waits for.
        abandon: called where a part fails: nobody will collect the products that are on their way.
    """

    parts: Sequence[Part[Result]]
    abandon: Callable[[], None]


def in_turns(parts: Sequence[Part[Result]], abandon: Callable[[], None]) -> list[Result]:
    """Run the parts of one team to their ends; see ``Team``.

    Returns:
        What each part returns, in order.
    """
    (outcome,) = teams_in_turns([Team(parts, abandon)])
    if isinstance(outcome, TsqpError):
        raise outcome
    return outcome


def teams_in_turns(teams: Sequence[Team[Result]]) -> list[list[Result] | TsqpError]:
    """Run the parts of all teams to their ends: products of one are away while others' are asked for and collected.

    Where a part raises a ``TsqpError`` its team is over, and nothing of it is returned; the others go on. Any other
    exception ends all.

    Returns:
        For each team what its parts return, in order, or what one of them raised.
    """
    results: list[dict[int, Result]] = [{} for _ in teams]
    failures: dict[int, TsqpError] = {}
    # Products in the order in which they were asked for, by the numbers of their team and part; None starts a part.
    # The first parts of all teams come first, so that every worker soon has something to do.
    most = max((len(team.parts) for team in teams), default=0)
    waiting: deque[tuple[int, int, Pending | None]] = deque(
        (at, number, None) for number in range(most) for at, team in enumerate(teams) if number < len(team.parts)
    )
    try:
        while waiting:
            at, number, pending = waiting.popleft()
            if at in failures:
                continue
            part = teams[at].parts[number]
            try:
                waiting.append((at, number, part.send(pending()) if pending else next(part)))
            except StopIteration as end:
                results[at][number] = end.value
            except TsqpError as error:
                failures[at] = error
                teams[at].abandon()
    except BaseException:
        for team in teams:
            team.abandon()
        raise
    return [failures.get(at) or [done[number] for number in range(len(done))] for at, done in enumerate(results)]
