"""The scheduler: nothing stuck, owners in turn, no block lost or used twice, and no request changed by others."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.engine.api import NO_OWNER, Generation, QueueFullError
from tsqp.engine.blocks import BlockPool, PrefixCache
from tsqp.engine.scheduler import Scheduler, Segment, split
from tsqp.errors import ConfigError, InputError, InternalError

BLOCK = 2
CHUNK = 4
PROPERTY = settings(deadline=None, max_examples=200)


def ask(
    prompt: int | tuple[int, ...], max_tokens: int = 1, owner: str = NO_OWNER, *, logprobs: bool = False
) -> Generation:
    ids = tuple(range(prompt)) if isinstance(prompt, int) else prompt
    return Generation(prompt_ids=ids, max_tokens=max_tokens, owner=owner, prompt_logprobs=logprobs)


@dataclass
class Engine:
    """Carries out steps on a cache that notes what is written where, and by whom.

    What a position's keys and values are is written as everything that they may depend on: all tokens up to there, and
    the shapes of the segments that these were computed in. Each segment reads all positions before it.
    """

    count: int = 64
    reuse: bool = False
    step_rows: int = 8
    max_running: int = 4
    max_queued: int = 1000
    steps: int = 0
    generations: dict[int, Generation] = field(default_factory=dict)
    started: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    seen: dict[int, list[Segment]] = field(default_factory=dict)
    answers: dict[int, list[int]] = field(default_factory=dict)
    written: dict[tuple[int, int], tuple[str, int, object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.count, BLOCK)
        self.prefixes = PrefixCache(self.pool) if self.reuse else None
        self.scheduler = Scheduler(
            blocks=self.pool,
            prefixes=self.prefixes,
            chunk_tokens=CHUNK,
            step_rows=self.step_rows,
            max_running=self.max_running,
            max_queued=self.max_queued,
        )

    def add(self, generation: Generation) -> int:
        number = len(self.generations)
        self.scheduler.add(number, generation)
        self.generations[number] = generation
        return number

    def step(self, give_up: frozenset[int] = frozenset(), fail: frozenset[int] = frozenset()) -> tuple[Segment, ...]:
        """Do one step. Requests in ``give_up`` are cancelled while it is under way; segments in ``fail`` never end."""
        segments = self.scheduler.plan()
        self.steps += bool(segments)
        self.started += [number for number in self.scheduler._running if number not in self.started]
        for segment in segments:
            self._note_start(segment)
            self._read_and_write(segment)
        for number in give_up:
            self.cancel(number)
        for segment in segments:
            if segment.number not in fail:
                self._advance(segment)
        return segments

    def cancel(self, number: int) -> None:
        if self.scheduler.cancel(number):
            self.ended.append(number)

    def drain(self) -> None:
        while self.step():
            pass

    def _note_start(self, segment: Segment) -> None:
        if segment.number not in self.seen:
            self.seen[segment.number] = []
            self.answers[segment.number] = []
            assert segment.first == self.scheduler.reused(segment.number)

    def _ids(self, number: int) -> tuple[int, ...]:
        return (*self.generations[number].prompt_ids, *self.answers[number])

    def _slot(self, segment: Segment, position: int) -> tuple[int, int]:
        return segment.blocks[position // BLOCK], position % BLOCK

    def _read_and_write(self, segment: Segment) -> None:
        ids, owner = self._ids(segment.number), self.generations[segment.number].owner
        end = segment.first + segment.count
        assert segment.count == len(segment.ids) > 0
        assert segment.ids == ids[segment.first : end]
        assert len(segment.blocks) == -(-end // BLOCK)
        for position in range(segment.first):
            writer_owner, writer, content = self.written[self._slot(segment, position)]
            assert writer == segment.number or (writer_owner == owner != NO_OWNER)
            assert content == self._content(segment.number, position)
        for position in range(segment.first, end):
            assert self._content(segment.number, position)[1:] == (segment.first, segment.count)
            self.written[self._slot(segment, position)] = owner, segment.number, self._content(segment.number, position)

    def _content(self, number: int, position: int) -> tuple[object, int, int]:
        """Return what must be there whatever else ran: the tokens, and the segment that this request alone has."""
        prompt = len(self.generations[number].prompt_ids)
        ids = self._ids(number)[: position + 1]
        if position >= prompt:
            return ids, position, 1
        first = position // CHUNK * CHUNK
        return ids, first, min(CHUNK, prompt - first)

    def _advance(self, segment: Segment) -> None:
        number, generation = segment.number, self.generations[segment.number]
        if number in self.ended:
            self.scheduler.advanced(segment, None)
            return
        self.seen[number].append(segment)
        at_end = segment.first + segment.count >= len(generation.prompt_ids)
        token = 100 + len(self.answers[number]) if at_end and generation.max_tokens else None
        self.scheduler.advanced(segment, token)
        if token is not None:
            self.answers[number].append(token)
        if at_end and len(self.answers[number]) == generation.max_tokens:
            self.scheduler.finish(number)
            self.ended.append(number)

    def check_blocks(self) -> None:
        """Every reference is accounted for: by running requests and the prefix cache."""
        references = Counter(block for request in self.scheduler._running.values() for block in request.blocks)
        if self.prefixes is not None:
            references.update(entry.block for entry in self.prefixes._entries.values())
        assert all(self.pool.references(block) == references[block] for block in range(self.pool.count))
        assert self.pool.free == self.pool.count - len(references)


def shapes(segments: list[Segment]) -> list[tuple[int, int, str, tuple[int, ...]]]:
    return [(segment.first, segment.count, segment.wants, segment.ids) for segment in segments]


def lone(generation: Generation) -> list[Segment]:
    """Return the segments of a request that has an engine to itself."""
    engine = Engine()
    engine.add(generation)
    engine.drain()
    return engine.seen[0]


def chunks(generation: Generation) -> int:
    return -(-len(generation.prompt_ids) // CHUNK)


def steps_of(generation: Generation) -> int:
    """In how many segments a request is computed: its chunks, the last of which gives a token, and rows."""
    return chunks(generation) + max(0, generation.max_tokens - 1)


def test_it_does_not_need_torch() -> None:
    check = "import sys, tsqp.engine.scheduler; raise SystemExit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_nothing_to_do_is_an_empty_step() -> None:
    assert Engine().scheduler.plan() == ()


def test_a_prompt_is_read_in_chunks_and_then_goes_on_token_by_token() -> None:
    assert shapes(lone(ask(10, 3))) == [
        (0, 4, "none", (0, 1, 2, 3)),
        (4, 4, "none", (4, 5, 6, 7)),
        (8, 2, "last", (8, 9)),
        (10, 1, "last", (100,)),
        (11, 1, "last", (101,)),
    ]


def test_only_the_logits_that_are_asked_for_are_wanted() -> None:
    assert [segment.wants for segment in lone(ask(6, 0))] == ["none", "none"]
    assert [segment.wants for segment in lone(ask(6, 2, logprobs=True))] == ["all", "all", "last"]
    assert [segment.wants for segment in lone(ask(6, 0, logprobs=True))] == ["all", "all"]


def test_a_request_holds_all_its_blocks_from_the_start() -> None:
    engine = Engine(count=10)
    engine.add(ask(5, 8))
    engine.step()
    assert engine.pool.free == 10 - 7  # 13 tokens in blocks of 2
    engine.drain()
    assert engine.pool.free == 10


def test_a_request_that_does_not_fit_waits_and_is_not_overtaken() -> None:
    engine = Engine(count=10)
    engine.add(ask(4, 8))  # 6 blocks
    engine.add(ask(8, 4))  # 6 blocks
    engine.add(ask(1, 1))  # 1 block: there is room for it, but it came later
    engine.step()
    assert (engine.started, engine.scheduler.running, engine.scheduler.queued) == ([0], 1, 2)
    engine.drain()
    assert engine.started == [0, 1, 2]


def test_what_waits_behind_a_request_that_is_cancelled_starts() -> None:
    engine = Engine(count=10)
    engine.add(ask(4, 8))
    waiting = engine.add(ask(8, 4))
    small = engine.add(ask(1, 1))
    engine.step()
    engine.cancel(waiting)
    assert small in {segment.number for segment in engine.step()}


@pytest.mark.parametrize(("prompt", "max_tokens"), [(21, 0), (1, 20), (20, 1)])
def test_what_can_never_fit_is_refused(prompt: int, max_tokens: int) -> None:
    engine = Engine(count=10)
    with pytest.raises(InputError, match="the cache holds 20"):
        engine.add(ask(prompt, max_tokens))
    engine.add(ask(19, 1))
    engine.drain()
    assert engine.ended == [0]


def test_too_many_waiting_requests_are_refused() -> None:
    engine = Engine(max_running=1, max_queued=2)
    engine.add(ask(1, 9))
    engine.step()
    engine.add(ask(1))
    last = engine.add(ask(1))
    with pytest.raises(QueueFullError, match="2 requests of yours wait"):
        engine.add(ask(1))
    engine.add(ask(1, owner="bob"))  # whose queue is his own
    assert engine.scheduler.queued == 3
    engine.cancel(last)
    engine.add(ask(1))
    assert engine.scheduler.queued == 3


def test_owners_take_turns_and_none_twice_before_another_once() -> None:
    engine = Engine(max_running=1)
    for owner in ("ann", "ann", "ann", "bob", "bob"):
        engine.add(ask(1, owner=owner))
    engine.step()  # ann's first starts
    engine.add(ask(1, owner="cy"))
    engine.drain()
    assert engine.started == [0, 3, 1, 5, 4, 2]


def test_who_comes_back_is_behind_those_who_wait() -> None:
    engine = Engine(max_running=1)
    engine.add(ask(1, owner="ann"))
    engine.add(ask(1, owner="bob"))
    engine.step()
    engine.add(ask(1, owner="ann"))
    engine.drain()
    assert engine.started == [0, 1, 2]


def test_an_owner_who_leaves_the_queue_leaves_no_turn_behind() -> None:
    engine = Engine(max_running=1)
    for owner in ("ann", "bob", "cy"):
        engine.add(ask(1, owner=owner))
    engine.step()
    assert (engine.scheduler.waits(0), engine.scheduler.waits(1)) == (False, True)
    engine.cancel(1)
    assert not engine.scheduler.waits(1)
    engine.drain()
    assert engine.started == [0, 2]


@pytest.mark.parametrize("name", ["chunk_tokens", "step_rows", "max_running", "max_queued"])
def test_settings_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        Scheduler(blocks=BlockPool(1, 1), prefixes=None, **{name: 0})


def test_chunks_that_cut_blocks_cannot_be_reused() -> None:
    pool = BlockPool(9, 16)
    with pytest.raises(ConfigError, match="multiple"):
        Scheduler(blocks=pool, prefixes=PrefixCache(pool), chunk_tokens=24)
    Scheduler(blocks=pool, prefixes=None, chunk_tokens=24)


def test_a_cancelled_request_frees_its_blocks_while_its_segment_is_under_way() -> None:
    engine = Engine()
    engine.add(ask(9, 5))
    (segment,) = engine.scheduler.plan()
    assert engine.scheduler.cancel(0)
    assert engine.pool.free == engine.pool.count
    engine.scheduler.advanced(segment, None)
    assert engine.scheduler.plan() == ()
    assert not engine.scheduler.cancel(0)


def test_a_step_that_failed_is_planned_again() -> None:
    engine = Engine()
    engine.add(ask(9, 5))
    assert engine.scheduler.plan() == engine.scheduler.plan()


def test_misuse_is_found() -> None:
    scheduler = Engine().scheduler
    scheduler.add(1, ask(6, 1))
    with pytest.raises(InternalError, match="added twice"):
        scheduler.add(1, ask(6, 1))
    with pytest.raises(InternalError, match="not running"):
        scheduler.finish(1)
    (segment,) = scheduler.plan()
    with pytest.raises(InternalError, match="can have none"):
        scheduler.advanced(segment, 7)
    scheduler.advanced(segment, None)
    with pytest.raises(InternalError, match="expected 4"):
        scheduler.advanced(segment, None)
    (segment,) = scheduler.plan()
    with pytest.raises(InternalError, match="positions"):
        scheduler.advanced(replace(segment, ids=(0, 0)), None)
    scheduler.advanced(segment, 7)
    with pytest.raises(InternalError, match="was not finished"):
        scheduler.plan()
    scheduler.finish(1)
    with pytest.raises(InternalError, match="not running"):
        scheduler.finish(1)
    assert scheduler.plan() == ()


def test_a_request_that_only_reads_can_have_no_token() -> None:
    scheduler = Engine().scheduler
    scheduler.add(1, ask(3, 0))
    (segment,) = scheduler.plan()
    with pytest.raises(InternalError, match="can have none"):
        scheduler.advanced(segment, 7)


def test_a_segment_does_not_show_its_tokens() -> None:
    (segment,) = lone(ask((1717,), 1))
    assert "1717" not in repr(segment)


def test_prompts_take_turns_beside_those_that_generate() -> None:
    engine = Engine(step_rows=2)  # no room for a chunk beside two rows: one is computed all the same
    for prompt, tokens in [(1, 30), (1, 30), (12, 1), (12, 1)]:
        engine.add(ask(prompt, tokens))
    assert [segment.number for segment in engine.step()] == [0, 1]
    for turn in (2, 3, 2, 3):
        assert [segment.number for segment in engine.step()] == [0, 1, turn]


def test_a_prefix_is_reused_in_whole_chunks_and_never_to_the_end() -> None:
    engine = Engine(reuse=True)
    engine.add(ask(14, 1, "ann"))
    engine.drain()
    expected = {14: 12, 13: 12, 12: 8, 11: 8, 9: 8, 8: 4, 5: 4, 4: 0, 1: 0}
    for prompt, reused in expected.items():
        number = engine.add(ask(prompt, 1, "ann"))
        engine.drain()
        assert engine.seen[number][0].first == reused, prompt
    assert engine.prefixes is not None
    assert engine.prefixes.held == 6  # three chunks of two blocks; not the last, shorter one


def test_a_running_request_can_be_reused() -> None:
    engine = Engine(reuse=True)
    engine.add(ask(14, 30, "ann"))
    engine.step()
    engine.step()
    number = engine.add(ask(14, 1, "ann"))
    engine.step()
    assert engine.scheduler.reused(number) == 8


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ask(9, 1, "ann"), ask(9, 1, "bob")),
        (ask(9, 1, NO_OWNER), ask(9, 1, NO_OWNER)),
        (ask(9, 1, NO_OWNER), ask(9, 1, "ann")),
        (ask(9, 1, "ann"), ask(9, 1, NO_OWNER)),
        (ask(9, 1, "ann"), ask(9, 1, "ann", logprobs=True)),
    ],
)
def test_nothing_is_reused_across_owners_or_where_all_logits_are_needed(first: Generation, second: Generation) -> None:
    engine = Engine(reuse=True)
    for generation in (first, second):
        engine.add(generation)
        engine.drain()
    assert shapes(engine.seen[1]) == shapes(lone(second))


def test_what_was_generated_is_computed_anew_when_it_comes_back_in_a_prompt() -> None:
    engine = Engine(reuse=True)
    engine.add(ask(6, 10, "ann"))
    engine.drain()
    number = engine.add(ask((*range(6), *engine.answers[0]), 1, "ann"))
    engine.drain()
    assert engine.seen[number][0].first == 4


def test_what_is_remembered_makes_room_for_what_waits() -> None:
    engine = Engine(count=10, reuse=True)
    engine.add(ask(17, 1, "ann"))
    engine.drain()
    assert engine.pool.free == 2
    engine.add(ask(tuple(range(50, 69)), 1, "bob"))
    engine.drain()
    assert engine.ended == [0, 1]


owners = st.sampled_from(["ann", "bob", NO_OWNER])
# Few different tokens, mostly the same: prompts share prefixes often.
requests = st.builds(
    lambda length, other, max_tokens, owner, logprobs: ask(
        tuple(int(at == other) for at in range(length)), max_tokens, owner, logprobs=logprobs
    ),
    st.integers(1, 22),
    st.integers(0, 40),
    st.integers(0, 8),
    owners,
    st.sampled_from([False, False, False, True]),
)


@PROPERTY
@given(
    requests=st.lists(requests, min_size=1, max_size=20),
    seed=st.integers(0, 1 << 32),
    count=st.integers(15, 40),
    reuse=st.booleans(),
    step_rows=st.integers(1, 20),
    max_running=st.integers(1, 6),
)
def test_no_block_is_lost_or_used_twice(
    requests: list[Generation],
    seed: int,
    count: int,
    reuse: bool,  # noqa: FBT001
    step_rows: int,
    max_running: int,
) -> None:
    """Adding, steps, cancelling and failing in any order. The engine asserts what each segment reads."""
    random = Random(seed)
    engine = Engine(count, reuse, step_rows, max_running)
    todo = list(requests)
    while todo or engine.scheduler.queued or engine.scheduler.running:
        if todo and random.random() < 0.5:
            engine.add(todo.pop(0))
        if engine.generations and random.random() < 0.2:
            engine.cancel(random.randrange(len(engine.generations)))
        everyone = range(len(engine.generations))
        give_up = frozenset(number for number in everyone if random.random() < 0.02)
        fail = frozenset(number for number in everyone if random.random() < 0.1)
        segments = engine.step(give_up, fail)
        assert sum(segment.count for segment in segments) <= engine.scheduler.most_rows
        assert len({segment.number for segment in segments}) == len(segments)
        assert engine.scheduler.running <= max_running
        engine.check_blocks()
    assert sorted(engine.ended) == list(range(len(requests)))
    for owner in {generation.owner for generation in requests}:
        own = [number for number in engine.started if engine.generations[number].owner == owner]
        assert own == sorted(own)  # in the order they came
    if engine.prefixes is not None:
        assert engine.pool.free + engine.prefixes.held == count
        engine.prefixes.clear()
    assert engine.pool.free == count


@PROPERTY
@given(requests=st.lists(requests, min_size=1, max_size=12), reuse=st.booleans(), step_rows=st.integers(1, 20))
def test_a_request_is_computed_as_if_it_were_alone(requests: list[Generation], reuse: bool, step_rows: int) -> None:  # noqa: FBT001
    """Same segments as alone; where a prefix was reused, without the first ones."""
    engine = Engine(30, reuse, step_rows)
    for generation in requests:
        engine.add(generation)
    engine.drain()
    for number, generation in enumerate(requests):
        alone, together = shapes(lone(generation)), shapes(engine.seen[number])
        skipped = together[0][0] // CHUNK
        assert together == alone[skipped:]
        assert skipped == 0 or (reuse and generation.owner != NO_OWNER)


@PROPERTY
@given(
    requests=st.lists(requests, min_size=1, max_size=16),
    count=st.integers(15, 40),
    step_rows=st.integers(1, 20),
    max_running=st.integers(1, 6),
)
def test_everyone_has_a_share_of_every_step(
    requests: list[Generation], count: int, step_rows: int, max_running: int
) -> None:
    """One token per step for who generates; a chunk within as many steps as prompts are read; steps never idle."""
    engine = Engine(count, step_rows=step_rows, max_running=max_running)
    for generation in requests:
        engine.add(generation)
    waits: dict[int, tuple[int, int]] = {}  # of a prompt: steps without a chunk, and in how many it must have one
    while engine.scheduler.queued or engine.scheduler.running:
        generating = {r.number for r in engine.scheduler._running.values() if not r.is_reading}
        segments = engine.step()
        numbers = {segment.number for segment in segments}
        assert generating <= numbers
        assert numbers - generating or engine.scheduler._reading == []
        reading = [request.number for request in engine.scheduler._reading]
        for number in reading:
            if number in numbers or number not in waits:
                waits[number] = (0, len(reading))
            else:
                waits[number] = (waits[number][0] + 1, waits[number][1])
            assert waits[number][0] < waits[number][1]
    assert engine.steps <= sum(steps_of(generation) for generation in requests)
    assert all(len(engine.seen[number]) == steps_of(generation) for number, generation in enumerate(requests))


@PROPERTY
@given(
    requests=st.lists(requests, min_size=1, max_size=30),
    seed=st.integers(0, 1 << 32),
    count=st.integers(15, 40),
    max_running=st.integers(1, 6),
)
def test_no_owner_waits_for_more_than_one_request_of_each_other(
    requests: list[Generation], seed: int, count: int, max_running: int
) -> None:
    """The k-th that an owner has waiting starts once at most k of each other owner have started after it came."""
    random = Random(seed)
    engine = Engine(count, max_running=max_running)
    came: dict[int, tuple[int, int]] = {}  # how many had started by then, and how many of its owner waited with it
    todo = list(requests)
    while todo or engine.scheduler.queued or engine.scheduler.running:
        while todo and random.random() < 0.7:
            number = engine.add(todo.pop(0))
            owner = engine.generations[number].owner
            came[number] = len(engine.started), len(engine.scheduler._queues[owner])
        if engine.generations and random.random() < 0.1:
            engine.cancel(random.randrange(len(engine.generations)))
        engine.step()
    for at, number in enumerate(engine.started):
        before, place = came[number]
        others = Counter(engine.generations[each].owner for each in engine.started[before:at])
        del others[engine.generations[number].owner]
        assert max(others.values(), default=0) <= place


@PROPERTY
@given(counts=st.lists(st.integers(1, 128), max_size=40), groups=st.integers(1, 5))
def test_groups_of_a_step_are_disjoint_and_even(counts: list[int], groups: int) -> None:
    segments = [Segment(number, 0, count, (), "none", ()) for number, count in enumerate(counts)]
    parts = split(segments, groups)
    assert len(parts) == min(groups, len(segments))
    assert sorted(s.number for part in parts for s in part) == list(range(len(counts)))
    assert all([s.number for s in part] == sorted(s.number for s in part) for part in parts)
    rows = [sum(segment.count for segment in part) for part in parts]
    assert not rows or max(rows) - min(rows) <= max(counts)
    assert all(rows)


def test_groups_are_even_in_rows_and_not_in_segments() -> None:
    segments = [Segment(number, 0, count, (), "none", ()) for number, count in enumerate([1, 1, 128, 1, 1, 60, 64])]
    numbers = [[segment.number for segment in part] for part in split(segments, 2)]
    assert numbers == [[2], [0, 1, 3, 4, 5, 6]]


def test_no_group_is_no_split() -> None:
    with pytest.raises(ConfigError, match="groups"):
        split([], 0)
