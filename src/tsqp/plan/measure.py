"""Measures what steps take of one core on this machine, with every product computed in the same process.

Time is the thread's own (``time.thread_time``): what other processes take of the machine meanwhile does not count, and
a plan needs to know how long a core is busy. Waiting is no part of it; round trips are measured on their own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import torch
from msgspec import Struct

from tsqp.arith.keystream import KEY_BYTES, keystream_rows
from tsqp.bench.child import Order
from tsqp.bench.children import free_port
from tsqp.bench.echo import EchoClient, echo_client, serving
from tsqp.bench.floors import Loopback, own_service
from tsqp.config import EnclaveConfig
from tsqp.engine.api import Sampling
from tsqp.engine.sampling import Sampler
from tsqp.errors import InternalError, TsqpError
from tsqp.launch import local_worker
from tsqp.levels import open_model, runnable
from tsqp.loaded import Runnable, Stepper, run_together
from tsqp.model.architecture import LlamaConfig
from tsqp.model.attention import BLOCK_TOKENS
from tsqp.model.locate import BUNDLED
from tsqp.model.paged_cache import PagedCache, SequencePart
from tsqp.paths import private_socket_directory
from tsqp.plan.constants import LinkConstants
from tsqp.plan.models import random_config, write_random
from tsqp.plan.work import Step, StepWork, prefill_steps, work
from tsqp.transport.base import Buffer, ClientTransport
from tsqp.transport.keys import create, read_public
from tsqp.worker.services import WorkerService

Kind = Literal["prefill", "decode"]

DTYPE = "float32"
_MASK_BYTES = 2 << 30
_TRIPS = 300
_COUNTED = 3
# A small model that waited while others had their turns took twice as long at first, and ran into its time in 0.1 s.
_SETTLE_S = 0.5
_SMALL, _LARGE = 4096, 4 << 20
_KEYSTREAM_ROWS, _KEYSTREAM_INPUTS = 64, 1 << 14


class Place(Struct, frozen=True, kw_only=True):
    """Where to measure, and what.

    Attributes:
        name: of the model.
        sizes: as ``random_config`` takes them; None for the bundled model.
        prompts: lengths of prompts that are read alone.
        batches: numbers of answers that are generated together, and how many tokens are known of each.
    """

    name: str
    sizes: tuple[int, int, int, tuple[int, int], int] | None
    prompts: tuple[int, ...]
    batches: tuple[tuple[int, int], ...]


class Point(Struct, frozen=True, kw_only=True):
    """What is timed: reading a prompt of ``size`` tokens, or a step of ``size`` answers after ``context`` tokens."""

    model: str
    level: str
    kind: Kind
    size: int
    context: int = 0


class Sample(Struct, frozen=True, kw_only=True):
    """Seconds of one core: of all, and of it in the worker's products."""

    total_s: float
    worker_s: float

    @property
    def enclave_s(self) -> float:
        """What is the enclave's."""
        return self.total_s - self.worker_s


def steps_of(point: Point) -> list[Step]:
    """Return what a point computes."""
    if point.kind == "prefill":
        return prefill_steps(point.size)
    return [Step(point.size, point.size, point.size, point.context + 1)]


class Subject:
    """A model at one level, whose products are computed here.

    Args:
        place: the model, and what is measured.
        level: `open`, `verified` or `masked`.
        architecture: the model's.
        loaded: the model over ``here``.
        here: computes the products.
    """

    def __init__(self, place: Place, level: str, architecture: LlamaConfig, loaded: Runnable, here: _Here) -> None:
        self.place, self.level, self.architecture = place, level, architecture
        self._loaded, self._here = loaded, here
        longest = max((*place.prompts, *(context + 1 for _, context in place.batches)))
        most = max((1, *(batch for batch, _ in place.batches)))
        self._each = -(-longest // BLOCK_TOKENS)
        self._cache = PagedCache(architecture, most * self._each)
        if (pool := _stepper(loaded).pool) is not None:
            pool.resize(_mask_rows(place), most, _MASK_BYTES)

    def points(self) -> list[Point]:
        """Return what is measured of it."""
        model, level = self.place.name, self.level
        read = [Point(model=model, level=level, kind="prefill", size=size) for size in self.place.prompts]
        return read + [
            Point(model=model, level=level, kind="decode", size=size, context=known)
            for size, known in self.place.batches
        ]

    def work(self, point: Point) -> list[StepWork]:
        """Count what a point computes."""
        return [work(self.architecture, self.level, DTYPE, step) for step in steps_of(point)]

    def settle(self) -> None:
        """Compute for a while without counting, after other models had their turns.

        Raises:
            TsqpError: a product failed.
        """
        steps = self._parts(self.points()[0])
        started_s = time.monotonic()
        while time.monotonic() - started_s < _SETTLE_S:
            self._once(steps)

    def run(self, point: Point) -> Sample:
        """Measure a point once, with its masks ready, after a time that does not count: caches hold something else.

        Raises:
            TsqpError: a product failed.
        """
        steps = self._parts(point)
        self._once(steps)
        samples = sorted((self._once(steps) for _ in range(_COUNTED)), key=lambda sample: sample.total_s)
        return samples[_COUNTED // 2]

    def _once(self, steps: list[list[SequencePart]]) -> Sample:
        self._loaded.prepare(lambda _done: None)
        self._here.spent_s, started_s = 0.0, time.thread_time()
        for parts in steps:
            self._step(parts)
        return Sample(total_s=time.thread_time() - started_s, worker_s=self._here.spent_s)

    def _step(self, parts: list[SequencePart]) -> None:
        stepper = _stepper(self._loaded)
        with stepper.paused():
            (outcome,) = run_together([(stepper, [self._cache.rows(parts)])])
        if isinstance(outcome, TsqpError):
            raise outcome
        (logits_RV,) = outcome
        for logits_V in logits_RV:
            Sampler(Sampling(temperature=0), (), self.architecture.vocab_size).choose(logits_V)

    def _parts(self, point: Point) -> list[list[SequencePart]]:
        """Return the sequences' parts of each step."""
        if point.kind == "decode":
            return [[self._part(number, 1, point.context, "last") for number in range(point.size)]]
        found, done = [], 0
        for step in prefill_steps(point.size):
            found.append([self._part(0, int(step.rows), done, "last" if step.kept else "none")])
            done += int(step.rows)
        return found

    def _part(self, number: int, count: int, first: int, wants: str) -> SequencePart:
        ids = _ids(count, self.architecture.vocab_size, number)
        blocks = range(number * self._each, number * self._each + -(-(first + count) // BLOCK_TOKENS))
        return SequencePart(ids, first, tuple(blocks), wants)


def _stepper(loaded: Runnable) -> Stepper:
    if loaded.stepper is None:
        raise InternalError("a level without steps was about to be measured.")
    return loaded.stepper


def _ids(count: int, vocabulary: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(vocabulary, (count,), generator=generator).tolist()
    return ids


class _Here(Loopback):
    """Computes every product where it is sent, and adds up the time.

    Args:
        link: to the worker, which is asked for all else.
        service: computes the products.
    """

    def __init__(self, link: ClientTransport, service: WorkerService) -> None:
        super().__init__(link, service)
        self.spent_s = 0.0

    def send(self, frames: Sequence[Buffer]) -> None:
        """See ``ClientTransport.send``."""
        started_s = time.thread_time()
        super().send(frames)
        self.spent_s += time.thread_time() - started_s


@contextmanager
def subjects(
    places: Sequence[Place],
    levels: Sequence[str],
    on_step: Callable[[str, float], None] = lambda _name, _done: None,
) -> Iterator[list[Subject]]:
    """Load each model at each level for the time of a ``with`` block; none is larger than some hundred megabytes."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tsqp-plan-")))
        found: list[Subject] = []
        for number, place in enumerate(places):
            on_step("loading models", number / len(places))
            name = BUNDLED
            if place.sizes is not None:
                name = str(scratch / place.name)
                write_random(random_config(*place.sizes), Path(name), torch.bfloat16)
            found += [stack.enter_context(_subject(place, level, name)) for level in levels]
        on_step("loading models", 1.0)
        yield found


def _mask_rows(place: Place) -> int:
    """Return for how many tokens masks are kept ready: for those of the longest point."""
    return max((*place.prompts, *(batch for batch, _ in place.batches)))


@contextmanager
def _subject(place: Place, level: str, name: str) -> Iterator[Subject]:
    model = open_model(name, level)
    order = Order(level=level, model=str(model.directory), ids=[], dtype=DTYPE, threads=1, worker="")
    links: list[_Here] = []
    with ExitStack() as stack:
        service = stack.enter_context(own_service(order))
        url = stack.enter_context(local_worker(["--model", str(model.directory), "--threads", "1", "--device", "cpu"]))

        def wrapped(link: ClientTransport) -> _Here:
            links.append(_Here(link, service))
            return links[-1]

        config = EnclaveConfig(
            level=level,
            worker=url,
            threads=1,
            micro_batches=1,
            mask_memory=_MASK_BYTES,
            mask_pool=_mask_rows(place) if level == "masked" else None,
        )
        loaded = stack.enter_context(
            runnable(level, model, config, wrap=lambda _peer: wrapped, on_notice=lambda _sentence: None)
        )
        yield Subject(place, level, model.architecture, loaded, links[-1])


def link_constants() -> LinkConstants:
    """Measure round trips over an encrypted tcp link. The shortest of many counts, as others may use the machine."""
    with ExitStack() as stack:
        directory = stack.enter_context(private_socket_directory())
        public, secret = create(directory, "echo")
        url = f"tcp://127.0.0.1:{free_port()}"
        stack.enter_context(serving(url, secret))
        client = stack.enter_context(echo_client(url, read_public(public)))
        small = [_trip(client, _SMALL) for _ in range(_TRIPS)]
        large = [_trip(client, _LARGE) for _ in range(_TRIPS // 5)]
    trip, long = _quick(small), _quick(large)
    moved = 2 * (_LARGE - _SMALL)
    return LinkConstants(
        trip_s=trip[0],
        trip_core_s=min(trip[0], trip[1]),
        byte_s=max(0.0, long[0] - trip[0]) / moved,
        byte_core_s=max(0.0, long[2] - trip[2]) / moved,
    )


def _trip(client: EchoClient, size: int) -> tuple[float, float, float]:
    """Return the seconds of a round trip, of this thread's core in it, and of all of this process's cores."""
    thread_s, process_s = time.thread_time(), time.process_time()
    taken_s = client.seconds(size, "copied")
    return taken_s, time.thread_time() - thread_s, time.process_time() - process_s


def _quick(taken: Sequence[tuple[float, float, float]]) -> tuple[float, ...]:
    return tuple(map(min, zip(*taken, strict=True)))


def keystream_word_s() -> float:
    """Return the seconds of one core that a word of masks takes."""
    taken = []
    for _ in range(5):
        started_s = time.thread_time()
        keystream_rows(bytes(KEY_BYTES), 0, 0, _KEYSTREAM_ROWS, _KEYSTREAM_INPUTS)
        taken.append(time.thread_time() - started_s)
    return min(taken) / (_KEYSTREAM_ROWS * _KEYSTREAM_INPUTS)
