"""Which tokens of which requests the next step computes. Decides only: no clock, no thread, no tensor, no torch.

A step has one row for each request that is generating, and chunks of the prompts that are being read:

- **Nothing is stuck.** A request starts when every block that its prompt and ``max_tokens`` can ever take is free, and
  takes them all at once. Taking blocks as an answer grows would admit more requests at first; then all could stand
  with full caches, each waiting for a block of another, and one would have to lose its work. The price is that blocks
  reserved for tokens that a stop text cuts off lie idle until the request ends.
- **Owners take turns, and each is served first come, first served.** While a request waits as the first of its owner,
  each other owner starts one at most, however many wait. None overtakes a larger one whose turn it is: that one starts
  once those that started before it have ended, at the latest. The queue is bounded for each owner, so that nobody finds
  it full of others' requests; how many owners there are is the server's choice.
- **Fair.** A generating request has one token in each step. Prompts being read take turns: in each step the one whose
  turn it is has a chunk whatever the number of rows, others where they fit. So a prompt that has started has a chunk
  in one of as many consecutive steps as there are prompts being read.
- **Apart.** Chunks lie between multiples of ``chunk_tokens``, counted from a prompt's first token, whatever else runs
  and whatever was found in the prefix cache: reuse ends at such a multiple too, and only blocks of whole chunks are
  remembered, never those that were generated row by row or lie in a prompt's last, shorter chunk. So each position is
  always computed in a segment of the same shape, and what a request computes never depends on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tsqp.engine.api import Generation, QueueFullError, require_positive
from tsqp.engine.blocks import BlockPool, PrefixCache
from tsqp.errors import ConfigError, InputError, InternalError

Wants = Literal["none", "last", "all"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one request that a step computes.

    Attributes:
        number: the request's.
        first: position of the first of them; keys and values of all before it are in the cache.
        count: how many.
        blocks: those that hold positions 0 to ``first + count``, in order, and no more.
        wants: of which tokens logits are needed.
        ids: the tokens.
    """

    number: int
    first: int
    count: int
    blocks: tuple[int, ...]
    wants: Wants
    ids: tuple[int, ...] = field(repr=False)


@dataclass(slots=True, repr=False, eq=False)
class _Running:
    """A request that has its blocks.

    Attributes:
        number, generation: as they were added.
        blocks: all that it can ever need.
        ids: its prompt and what has been generated.
        computed: of how many tokens keys and values are in the cache.
        reused: how many of these were found there at the start.
    """

    number: int
    generation: Generation
    blocks: tuple[int, ...]
    ids: list[int]
    computed: int
    reused: int

    @property
    def prompt_tokens(self) -> int:
        return len(self.generation.prompt_ids)

    @property
    def is_reading(self) -> bool:
        return self.computed < self.prompt_tokens

    @property
    def may_have_more(self) -> bool:
        return len(self.ids) < self.prompt_tokens + self.generation.max_tokens

    @property
    def is_over(self) -> bool:
        return not self.is_reading and (self.computed == len(self.ids) or not self.may_have_more)


class Scheduler:
    """Decides steps, one after the other: ``plan``, then ``advanced`` for each segment, then ``plan`` again.

    Not thread-safe. Groups of a step may be in flight together, but the step is over before the next one is planned:
    blocks of a request that ends meanwhile are free at once, and only ``plan`` gives them to another. Segments of a
    step that failed are planned again, unless their requests are cancelled.

    Args:
        blocks: of the cache; only the scheduler and ``prefixes`` take any.
        prefixes: what can be used again, of the same pool; None switches reuse off.
        chunk_tokens: of a prompt, in one step.
        step_rows: of a step, unless generating requests and one chunk are more.
        max_running: requests that have blocks.
        max_queued: requests of one owner that wait for them.

    Raises:
        ConfigError: a number below 1, or chunks of no whole number of blocks where prefixes are reused.
    """

    def __init__(
        self,
        *,
        blocks: BlockPool,
        prefixes: PrefixCache | None,
        chunk_tokens: int = 128,
        step_rows: int = 256,
        max_running: int = 64,
        max_queued: int = 256,
    ) -> None:
        for name, value in (
            ("chunk_tokens", chunk_tokens),
            ("step_rows", step_rows),
            ("max_running", max_running),
            ("max_queued", max_queued),
        ):
            require_positive(name, value)
        if prefixes is not None and chunk_tokens % blocks.tokens:
            raise ConfigError(
                f"chunk_tokens is {chunk_tokens}; to reuse prefixes it must be a multiple of a cache block's "
                f"{blocks.tokens} tokens."
            )
        self._blocks = blocks
        self._prefixes = prefixes
        self._chunk_tokens = chunk_tokens
        self._step_rows = step_rows
        self._max_running = max_running
        self._max_queued = max_queued
        # What waits, by owner; the first owner has the next turn.
        self._queues: dict[str, dict[int, Generation]] = {}
        self._running: dict[int, _Running] = {}
        # Whose prompts are not computed yet; the first has the next turn.
        self._reading: list[_Running] = []
        # The request whose turn it is did not fit, and nothing has become free since.
        self._is_full = False

    def __repr__(self) -> str:
        return f"Scheduler({self.running} running, {self.queued} queued)"

    @property
    def running(self) -> int:
        """How many requests have blocks."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """How many requests wait for blocks."""
        return sum(map(len, self._queues.values()))

    @property
    def most_rows(self) -> int:
        """How many rows no step exceeds."""
        return max(self._step_rows, self._max_running - 1 + self._chunk_tokens)

    def reused(self, number: int) -> int:
        """Return how many tokens of a running request's prompt were found in the prefix cache.

        Raises:
            InternalError: it is not running.
        """
        return self._get(number).reused

    def add(self, number: int, generation: Generation) -> None:
        """Let a request wait for its blocks.

        Raises:
            InputError: the prompt and ``max_tokens`` together are more than the whole cache holds.
            QueueFullError: too many requests of its owner wait.
            InternalError: the number is in use.
        """
        if number in self._running or self.waits(number):
            raise InternalError(f"request {number} was added twice.")
        prompt, room = len(generation.prompt_ids), self._blocks.count * self._blocks.tokens
        if prompt + generation.max_tokens > room:
            raise InputError(
                f"a prompt of {prompt} tokens and max_tokens {generation.max_tokens} need room for "
                f"{prompt + generation.max_tokens} tokens; the cache holds {room}. Shorten the prompt, lower "
                "max_tokens, or start the server with a larger cache."
            )
        waiting = self._queues.get(generation.owner, {})
        if len(waiting) >= self._max_queued:
            raise QueueFullError(f"{len(waiting)} requests of yours wait, as many as may; try again later.")
        waiting[number] = generation
        self._queues[generation.owner] = waiting

    def plan(self) -> tuple[Segment, ...]:
        """Start what can start, and return the next step; empty where there is nothing to do.

        Returns:
            At most one segment of each request: first one row for each that is generating, then chunks of prompts.

        Raises:
            InternalError: a request has had its last token and was not finished.
        """
        self._admit()
        for request in self._running.values():
            if request.is_over:
                raise InternalError(f"request {request.number} has had its last token and was not finished.")
        rows = [self._segment(request, 1) for request in self._running.values() if not request.is_reading]
        return (*rows, *self._take_turns(self._step_rows - len(rows)))

    def advanced(self, segment: Segment, token: int | None) -> None:
        """Take note that a segment has been computed. Where its request has ended meanwhile, nothing changes.

        Args:
            segment: of the step that was planned last.
            token: what follows the segment; None after a chunk that is not a prompt's last, or where nothing follows,
                and then ``finish`` is due.

        Raises:
            InternalError: the segment is not the request's next one, or no token can follow it.
        """
        request = self._running.get(segment.number)
        if request is None:
            return
        end = segment.first + segment.count
        if segment.first != request.computed or segment.ids != tuple(request.ids[segment.first : end]):
            raise InternalError(
                f"positions {segment.first} to {end} of request {segment.number} came; expected {request.computed}."
            )
        if token is not None and not (end >= request.prompt_tokens and request.may_have_more):
            raise InternalError(f"a token came for request {segment.number}, which can have none after {end} tokens.")
        was_reading, request.computed = request.is_reading, end
        if was_reading:
            self._remember(request, segment)
            if not request.is_reading:
                self._reading.remove(request)
        if token is not None:
            request.ids.append(token)

    def finish(self, number: int) -> None:
        """End a running request; its blocks are free at once.

        Raises:
            InternalError: it is not running.
        """
        self._release(self._get(number))

    def cancel(self, number: int) -> bool:
        """End a request, whether it waits or runs; its blocks are free at once. Return whether there was one."""
        owner = self._waiting_owner(number)
        if owner is not None:
            del self._queues[owner][number]
            if not self._queues[owner]:
                del self._queues[owner]
            self._is_full = False
        elif number in self._running:
            self._release(self._running[number])
        else:
            return False
        return True

    def waits(self, number: int) -> bool:
        """Tell whether a request waits for its blocks: nothing of it has been computed."""
        return self._waiting_owner(number) is not None

    def _waiting_owner(self, number: int) -> str | None:
        return next((owner for owner, waiting in self._queues.items() if number in waiting), None)

    def _get(self, number: int) -> _Running:
        if number not in self._running:
            raise InternalError(f"request {number} is not running.")
        return self._running[number]

    def _release(self, request: _Running) -> None:
        del self._running[request.number]
        if request.is_reading:
            self._reading.remove(request)
        self._blocks.release(request.blocks)
        self._is_full = False

    def _admit(self) -> None:
        while self._queues and len(self._running) < self._max_running and not self._is_full:
            owner, waiting = next(iter(self._queues.items()))
            number, generation = next(iter(waiting.items()))
            request = self._reserve(number, generation)
            if request is None:
                self._is_full = True
                return
            del self._queues[owner], waiting[number]
            if waiting:
                self._queues[owner] = waiting  # behind the others
            self._running[number] = request
            self._reading.append(request)

    def _reserve(self, number: int, generation: Generation) -> _Running | None:
        """Take all blocks that a request can ever need; None, and nothing taken, where they are not to be had.

        If nothing runs they always are: the pool is large enough, and the prefix cache gives up all others.
        """
        known = self._known_prefix(generation)
        self._blocks.share(known)  # before room is made, which may otherwise take these
        total = self._blocks.needed(len(generation.prompt_ids) + generation.max_tokens)
        if self._prefixes is not None:
            self._prefixes.make_room(total - len(known))
        own = self._blocks.allocate(total - len(known))
        if own is None:
            self._blocks.release(known)
            return None
        reused = len(known) * self._blocks.tokens
        return _Running(number, generation, known + own, list(generation.prompt_ids), reused, reused)

    def _known_prefix(self, generation: Generation) -> tuple[int, ...]:
        """Return blocks of whole chunks that are computed already: never of all tokens, as the last predicts the next.

        None where log-probabilities of the prompt are asked for: they take logits of every position.
        """
        if self._prefixes is None or generation.prompt_logprobs:
            return ()
        most = (len(generation.prompt_ids) - 1) // self._chunk_tokens * self._chunk_tokens
        known = self._prefixes.match(generation.owner, generation.prompt_ids[:most])
        chunk_blocks = self._chunk_tokens // self._blocks.tokens
        return known[: len(known) // chunk_blocks * chunk_blocks]

    def _remember(self, request: _Running, segment: Segment) -> None:
        if self._prefixes is not None and segment.count == self._chunk_tokens:
            ids = request.generation.prompt_ids[: request.computed]
            self._prefixes.insert(request.generation.owner, ids, segment.blocks)

    def _take_turns(self, room: int) -> list[Segment]:
        """Return chunks of prompts: of the first in any case, of others in turn where they fit into ``room`` rows."""
        chosen: list[_Running] = []
        segments: list[Segment] = []
        left: list[_Running] = []
        for request in self._reading:
            count = min(self._chunk_tokens, request.prompt_tokens - request.computed)
            if not chosen or count <= room:
                chosen.append(request)
                segments.append(self._segment(request, count))
                room -= count
            else:
                left.append(request)
        self._reading = left + chosen
        return segments

    def _segment(self, request: _Running, count: int) -> Segment:
        first, end = request.computed, request.computed + count
        blocks = request.blocks[: self._blocks.needed(end)]
        return Segment(request.number, first, count, blocks, _wanted(request, end), tuple(request.ids[first:end]))


def _wanted(request: _Running, end: int) -> Wants:
    if request.is_reading and request.generation.prompt_logprobs:
        return "all"
    return "last" if end >= request.prompt_tokens and request.generation.max_tokens else "none"


def split(segments: Sequence[Segment], groups: int) -> tuple[tuple[Segment, ...], ...]:
    """Divide a step into groups of about as many rows: while the worker has one, the enclave works on another.

    Each segment is in one group, in the order given; the largest are placed first, each into the smallest group. So
    groups differ by at most the rows of the largest segment. Where segments are fewer than groups, so are the results.

    Raises:
        ConfigError: fewer than one group.
    """
    require_positive("the number of groups", groups)
    rows = [0] * min(groups, len(segments))
    members: list[list[int]] = [[] for _ in rows]
    for at in sorted(range(len(segments)), key=lambda at: -segments[at].count):
        smallest = rows.index(min(rows))
        rows[smallest] += segments[at].count
        members[smallest].append(at)
    return tuple(tuple(segments[at] for at in sorted(group)) for group in members)
