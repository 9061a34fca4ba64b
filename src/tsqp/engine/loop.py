"""The engine: a thread that plans a step, computes it, chooses tokens, and tells whoever asked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from torch import Tensor

from tsqp.config import EnclaveConfig
from tsqp.enclave.mask_pool import largest_pool
from tsqp.engine.api import (
    EngineStats,
    Event,
    Failed,
    Finished,
    FinishReason,
    Generation,
    OnEvent,
    PromptRead,
    Token,
    TokenLogprobs,
)
from tsqp.engine.blocks import BlockPool, PrefixCache
from tsqp.engine.sampling import Sampler, prompt_logprobs
from tsqp.engine.scheduler import Scheduler, Segment, split
from tsqp.engine.text import TextStream
from tsqp.errors import (
    ConfigError,
    HostileError,
    InputError,
    InternalError,
    TransportClosedError,
    TransportError,
    TsqpError,
    WeightsError,
)
from tsqp.levels import Model, OnStep, Runnable, Stepper, runnable
from tsqp.meter import Meter
from tsqp.model.architecture import LlamaConfig, linear_groups
from tsqp.model.attention import BLOCK_TOKENS
from tsqp.model.paged_cache import PagedCache, SequencePart, block_bytes
from tsqp.model.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30
_RETRY_S = 1.0
_POOL_ROWS = 256


@dataclass(slots=True, repr=False)
class _Active:
    """A request from ``submit`` to its last event."""

    number: int
    generation: Generation
    on_event: OnEvent
    text: TextStream
    sampler: Sampler
    generated: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=lambda: [TokenLogprobs(None)])


class GenerationEngine:
    """Continues prompts of many requests together. See ``api.Engine``.

    Args:
        stepper: computes steps.
        meter: of its costs.
        architecture: the model's.
        tokenizer: the model's.
        cache_bytes: memory for keys and values.
        reuse_prefixes: whether beginnings of prompts are found again, within one owner.

    Raises:
        ConfigError: the cache holds not a single block.
    """

    def __init__(
        self,
        stepper: Stepper,
        meter: Meter,
        architecture: LlamaConfig,
        tokenizer: Tokenizer,
        *,
        cache_bytes: int = CACHE_BYTES,
        reuse_prefixes: bool,
    ) -> None:
        count = cache_bytes // block_bytes(architecture)
        if not count:
            raise ConfigError(
                f"a cache of {cache_bytes / 1e6:.1f} MB holds no block of {block_bytes(architecture) / 1e6:.1f} MB."
            )
        self._stepper, self._meter, self._architecture, self._tokenizer = stepper, meter, architecture, tokenizer
        self._cache = PagedCache(architecture, count)
        self._blocks = BlockPool(count, BLOCK_TOKENS)
        self._scheduler = Scheduler(blocks=self._blocks, prefixes=PrefixCache(self._blocks) if reuse_prefixes else None)
        self._active: dict[int, _Active] = {}
        self._cancelled: set[int] = set()
        self._next = 1
        self._closing = False
        self._broken: TsqpError | None = None
        self._counts = dict.fromkeys(("steps", "prompt", "completion", "reused", "rows", "integrity"), 0)
        self._step_s = self._sampling_s = 0.0
        # Guards all above, but for the cache and the stepper, which only the thread uses.
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="tsqp-engine", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        """See ``api.Engine``."""
        return self._architecture.context_length

    def submit(self, generation: Generation, on_event: OnEvent) -> int:
        """See ``api.Engine``."""
        total = len(generation.prompt_ids) + generation.max_tokens
        if total > self.context_length:
            raise InputError(
                f"a prompt of {len(generation.prompt_ids)} tokens and max_tokens {generation.max_tokens} are {total}; "
                f"this model takes {self.context_length} together."
            )
        if not 0 <= min(generation.prompt_ids) <= max(generation.prompt_ids) < self._architecture.vocab_size:
            raise InputError(f"a token id lies outside the vocabulary of {self._architecture.vocab_size}.")
        text = TextStream(self._tokenizer, generation.stop)
        sampler = Sampler(generation.sampling, generation.prompt_ids, self._architecture.vocab_size)
        with self._changed:
            if self._closing:
                raise TransportClosedError("the engine is closing and takes no more requests.")
            if self._broken is not None:
                raise self._broken
            number = self._next
            self._next += 1
            self._scheduler.add(number, generation)
            self._active[number] = _Active(number, generation, on_event, text, sampler)
            self._changed.notify_all()
        return number

    def cancel(self, number: int) -> None:
        """See ``api.Engine``. A step that is being computed ends first."""
        with self._changed:
            if number in self._active:
                self._cancelled.add(number)
                self._changed.notify_all()

    def stats(self) -> EngineStats:
        """See ``api.Engine``."""
        meter, pool, counts = replace(self._meter), self._stepper.pool, self._counts
        with self._changed:
            return EngineStats(
                running=self._scheduler.running,
                queued=self._scheduler.queued,
                blocks_free=self._blocks.free,
                blocks_total=self._blocks.count,
                block_tokens=BLOCK_TOKENS,
                steps=counts["steps"],
                prompt_tokens=counts["prompt"],
                completion_tokens=counts["completion"],
                reused_tokens=counts["reused"],
                batch_rows=counts["rows"],
                pool_held=pool.held if pool else 0,
                pool_wanted=pool.wanted if pool else 0,
                bytes_sent=meter.bytes_sent,
                bytes_received=meter.bytes_received,
                integrity_failures=counts["integrity"],
                seconds=self._seconds(meter),
                ready=self._broken is None and not self._closing,
                reason=str(self._broken or ("closing" if self._closing else "")),
            )

    def _seconds(self, meter: Meter) -> dict[str, float]:
        names = ("quantise", "mask", "check", "ahead", "mask_wait", "mask_fill")
        waited, worker = meter.waited_ns / 1e9, meter.compute_ns / 1e9
        return {
            "worker": worker,
            "wire": max(0.0, waited - worker),
            "enclave": max(0.0, self._step_s - waited),
            "attention": self._cache.attention_ns / 1e9,
            "sampling": self._sampling_s,
            **{name: getattr(meter, f"{name}_ns") / 1e9 for name in names},
        }

    def close(self, *, drain_s: float = 0.0) -> None:
        """See ``api.Engine``. May be called twice."""
        deadline = time.monotonic() + drain_s
        with self._changed:
            self._closing = True
            while self._active and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            self._cancelled |= self._active.keys()
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._active or self._closing or self._broken):
                    self._changed.wait()
                self._end_cancelled()
                if self._closing and not self._active:
                    return
                segments = self._scheduler.plan()
            try:
                if self._broken is not None:
                    self._recover()
                elif segments:
                    self._step(segments)
            except TsqpError as error:
                self._fail_all(error)
            except Exception as error:  # noqa: BLE001  whoever waits must hear of a bug in this thread
                # Only its type: a message may quote what was computed.
                _log.error("a step failed (%s)", type(error).__name__)
                self._fail_all(InternalError(f"a step failed ({type(error).__name__})."))

    def _end_cancelled(self) -> None:
        for number in self._cancelled & self._active.keys():
            self._scheduler.cancel(number)
            self._end(self._active[number], "cancelled", "")
        self._cancelled.clear()

    def _step(self, segments: Sequence[Segment]) -> None:
        groups = split(segments, self._stepper.groups)
        parts = [
            self._cache.rows([SequencePart(each.ids, each.first, each.blocks, each.wants) for each in group])
            for group in groups
        ]
        started = time.perf_counter()
        logits = self._stepper.run(parts)
        computed = time.perf_counter()
        with self._changed:
            for group, logits_RV in zip(groups, logits, strict=True):
                done = 0
                for segment in group:
                    rows = {"none": 0, "last": 1, "all": segment.count}[segment.wants]
                    self._advance(segment, logits_RV[done : done + rows])
                    done += rows
            self._step_s += computed - started
            self._sampling_s += time.perf_counter() - computed
            self._counts["steps"] += 1
            self._counts["rows"] = sum(segment.count for segment in segments)
            self._changed.notify_all()

    def _advance(self, segment: Segment, logits_RV: Tensor) -> None:
        request = self._active[segment.number]
        try:
            self._use(request, segment, logits_RV)
        except TsqpError as error:
            self._scheduler.cancel(request.number)
            self._tell(request, Failed(error))
            del self._active[request.number]

    def _use(self, request: _Active, segment: Segment, logits_RV: Tensor) -> None:
        """Take a segment's logits: of a prompt's tokens, and of what follows it."""
        generation, end = request.generation, segment.first + segment.count
        prompt = generation.prompt_ids
        if segment.first < len(prompt):
            self._counts["prompt"] += segment.count
            if segment.wants == "all":
                following = prompt[segment.first + 1 : end + 1]
                top = generation.sampling.logprobs or 0
                request.prompt_logprobs += prompt_logprobs(logits_RV[: len(following)], following, top)
            if end < len(prompt):
                self._scheduler.advanced(segment, None)
                return
            reused = self._scheduler.reused(request.number)
            self._counts["reused"] += reused
            known = tuple(request.prompt_logprobs) if generation.prompt_logprobs else ()
            self._tell(request, PromptRead(known, reused))
        if not generation.max_tokens:
            self._finish(request, segment, "length")
            return
        self._choose(request, segment, logits_RV[-1])

    def _choose(self, request: _Active, segment: Segment, logits_V: Tensor) -> None:
        generation = request.generation
        chosen = request.sampler.choose(logits_V)
        request.generated += 1
        self._counts["completion"] += 1
        is_end = chosen.token in self._tokenizer.conventions.end_ids and not generation.ignore_end
        text = "" if is_end else request.text.push(chosen.token)
        self._tell(request, Token(chosen.token, text, chosen.logprobs))
        if is_end or request.text.stopped:
            self._finish(request, segment, "stop")
        elif request.generated == generation.max_tokens:
            self._finish(request, segment, "length")
        else:
            self._scheduler.advanced(segment, chosen.token)

    def _finish(self, request: _Active, segment: Segment, reason: FinishReason) -> None:
        self._scheduler.advanced(segment, None)
        self._scheduler.finish(request.number)
        text = request.text.flush()
        self._end(request, "stop" if request.text.stopped else reason, text)

    def _end(self, request: _Active, reason: FinishReason, text: str) -> None:
        del self._active[request.number]
        prompt = len(request.generation.prompt_ids)
        self._tell(request, Finished(reason, text, prompt, request.generated))

    def _tell(self, request: _Active, event: Event) -> None:
        try:
            request.on_event(event)
        except Exception as error:  # noqa: BLE001  of a caller that has gone; others must not suffer
            _log.warning("a listener failed (%s)", type(error).__name__)

    def _fail_all(self, error: TsqpError) -> None:
        """End every request with an error: products that were computed together failed together."""
        with self._changed:
            self._broken = error
            self._counts["integrity"] += isinstance(error, HostileError)
            for number, request in list(self._active.items()):
                self._scheduler.cancel(number)
                del self._active[number]
                self._tell(request, Failed(error))
            if not isinstance(error, (TransportError, HostileError)):
                self._broken = None  # of one step, not of the peers
            self._changed.notify_all()

    def _recover(self) -> None:
        """Open a lost link again, sooner or later. After a lie the peers stay out of use."""
        if isinstance(self._broken, TransportError):
            with suppress(TsqpError):
                self._stepper.reopen()
                with self._changed:
                    self._broken = None
                return
        with self._changed:
            if not self._closing:
                self._changed.wait(_RETRY_S)


@contextmanager
def open_engine(
    model: Model,
    config: EnclaveConfig,
    *,
    cache_bytes: int = CACHE_BYTES,
    on_step: OnStep = lambda _name, _done: None,
    on_notice: Callable[[str], None] = lambda _sentence: None,
) -> Iterator[GenerationEngine]:
    """Load a model at its level and run an engine for the time of a ``with`` block.

    Prefixes are not reused at `masked`: a hit would show as fewer rows.

    Args:
        model: from ``levels.open_model``.
        config: level, worker, masks.
        cache_bytes: memory for keys and values.
        on_step: told the fraction done of a named step.
        on_notice: told in a sentence what the user should know.

    Raises:
        TsqpError: as loading or connecting does.
        WeightsError: the model has no tokenizer.
        ConfigError: the level cannot generate.
    """
    if model.tokenizer is None:
        raise WeightsError("a model without tokenizer.json cannot generate text.")
    if config.level == "masked" and config.mask_pool is None:
        rows = min(_POOL_ROWS, largest_pool(linear_groups(model.architecture), config.mask_memory))
        config = replace(config, mask_pool=rows)
    with runnable(config.level, model, config, on_step=on_step, on_notice=on_notice) as loaded:
        engine = GenerationEngine(
            _stepper(loaded, config.level),
            loaded.meter,
            model.architecture,
            model.tokenizer,
            cache_bytes=cache_bytes,
            reuse_prefixes=config.level != "masked",
        )
        try:
            yield engine
        finally:
            engine.close()


def _stepper(loaded: Runnable, level: str) -> Stepper:
    if loaded.stepper is None:
        raise ConfigError(f"the level {level} cannot generate: choose open, verified, masked or local.")
    return loaded.stepper
