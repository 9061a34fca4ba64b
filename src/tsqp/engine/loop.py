"""The engine: a thread that plans a step, computes it, chooses tokens, and tells whoever asked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine.api import (
    ClosingError,
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
from tsqp.engine.memory import cache_blocks, chunk_tokens, memory
from tsqp.engine.sampling import Sampler, prompt_logprobs
from tsqp.engine.scheduler import Scheduler, Segment, split
from tsqp.engine.text import TextStream
from tsqp.engine.workers import Workers, one_each
from tsqp.errors import (
    InputError,
    InternalError,
    TsqpError,
    WeightsError,
    bare,
)
from tsqp.levels import Model
from tsqp.loaded import OnStep, Stepper
from tsqp.meter import Meter
from tsqp.model.architecture import LlamaConfig
from tsqp.model.attention import BLOCK_TOKENS
from tsqp.model.paged_cache import PagedCache, SequencePart
from tsqp.model.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_RETRY_S = 1.0


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
        workers: compute steps; one is in use.
        architecture: the model's.
        tokenizer: the model's.
        settings: of memory and numbers of requests.
        reuse_prefixes: whether beginnings of prompts are found again, within one owner.

    Raises:
        ConfigError: the cache holds not a single block.
    """

    def __init__(
        self,
        workers: Workers,
        architecture: LlamaConfig,
        tokenizer: Tokenizer,
        settings: EngineConfig,
        *,
        reuse_prefixes: bool,
    ) -> None:
        count = cache_blocks(architecture, settings)
        self._workers, self._architecture, self._tokenizer = workers, architecture, tokenizer
        self._cache = PagedCache(architecture, count)
        self._blocks = BlockPool(count, BLOCK_TOKENS)
        self._prefixes = PrefixCache(self._blocks) if reuse_prefixes else None
        self._scheduler = Scheduler(
            blocks=self._blocks,
            prefixes=self._prefixes,
            chunk_tokens=chunk_tokens(settings),
            step_rows=settings.step_tokens,
            max_running=settings.max_running,
            max_queued=settings.max_queued,
        )
        self._active: dict[int, _Active] = {}
        self._cancelled: set[int] = set()
        self._next = 1
        self._closing = False
        self._broken: TsqpError | None = None
        self._counts = dict.fromkeys(("steps", "prompt", "completion", "reused", "rows"), 0)
        self._step_s = self._sampling_s = 0.0
        # What steps cost, as of the last one's end: in the middle of one, its waiting is metered and its time is not.
        self._before, self._settled = workers.meter(), Meter()
        # Guards all above, but for the cache and the workers, which only the thread uses.
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="tsqp-engine", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        """See ``api.Engine``."""
        return self._architecture.context_length

    @property
    def stepper(self) -> Stepper:
        """What computes its steps; for measurements."""
        return self._workers.stepper

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
        text = TextStream(self._tokenizer, generation.stop, generation.prompt_ids)
        sampler = Sampler(generation.sampling, generation.prompt_ids, self._architecture.vocab_size)
        with self._changed:
            if self._closing:
                raise ClosingError("the engine is closing and takes no more requests.")
            if self._broken is not None:
                raise bare(self._broken)
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
        meter, counts = self._workers.meter(), self._counts
        held, wanted = self._workers.pool()
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
                pool_held=held,
                pool_wanted=wanted,
                bytes_sent=meter.bytes_sent,
                bytes_received=meter.bytes_received,
                integrity_failures=self._workers.lies,
                seconds=self._seconds(meter.mask_fill_ns / 1e9),
                ready=self._broken is None and not self._closing,
                reason=str(self._broken or ("closing" if self._closing else "")),
            )

    def _seconds(self, filling_s: float) -> dict[str, float]:
        meter, names = self._settled, ("quantise", "mask", "check", "ahead", "mask_wait")
        waited, worker = meter.waited_ns / 1e9, meter.compute_ns / 1e9
        return {
            "worker": min(worker, waited),
            "wire": max(0.0, waited - worker),
            "enclave": max(0.0, self._step_s - waited),
            "attention": self._cache.attention_ns / 1e9,
            "sampling": self._sampling_s,
            **{name: getattr(meter, f"{name}_ns") / 1e9 for name in names},
            "mask_fill": filling_s,
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
            try:
                with self._changed:
                    segments = self._scheduler.plan()
                if self._broken is not None:
                    self._recover()
                elif segments:
                    self._step(segments)
            except TsqpError as error:
                self._fail_all(bare(error))
            except Exception as error:  # noqa: BLE001  whoever waits must hear of a bug in this thread
                # Only its type: a message may quote what was computed.
                _log.error("a step failed (%s)", type(error).__name__)
                self._fail_all(InternalError(f"a step failed ({type(error).__name__})."))

    def _end_cancelled(self) -> None:
        for number in self._cancelled & self._active.keys():
            self._scheduler.cancel(number)
            self._end(self._active[number], "cancelled", "")
        self._cancelled.clear()
        self._changed.notify_all()  # whoever waits for the last one to end

    def _step(self, segments: Sequence[Segment]) -> None:
        stepper = self._workers.stepper
        groups = split(segments, stepper.groups)
        parts = [
            self._cache.rows([SequencePart(each.ids, each.first, each.blocks, each.wants) for each in group])
            for group in groups
        ]
        started = time.perf_counter()
        logits = stepper.run(parts)
        computed = time.perf_counter()
        with self._changed:
            for group, logits_RV in zip(groups, logits, strict=True):
                done = 0
                for segment in group:
                    rows = {"none": 0, "last": 1, "all": segment.count}[segment.wants]
                    self._advance(segment, logits_RV[done : done + rows])
                    done += rows
            self._step_s += computed - started
            self._settled = self._workers.meter().since(self._before)
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
            self._tell(request, Failed(bare(error)))
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
        broken = self._workers.blame(error)
        with self._changed:
            self._broken = broken
            for number, request in list(self._active.items()):
                self._scheduler.cancel(number)
                del self._active[number]
                self._tell(request, Failed(error))
            self._changed.notify_all()

    def _recover(self) -> None:
        """Go on with a worker that can be used, sooner or later; until then, say why there is none."""
        try:
            opened_anew = self._workers.recover(lambda: self._closing)
        except TsqpError as error:
            with self._changed:
                self._broken = bare(error)
                if not self._closing:
                    self._changed.wait(_RETRY_S)
            return
        with self._changed:
            if opened_anew and self._prefixes is not None:
                self._prefixes.clear()  # computed with another worker, perhaps one that lied
            self._before = self._workers.meter().since(self._settled)  # what failed and what opening cost is no step's
            self._broken = None


@contextmanager
def open_engine(
    model: Model,
    config: EnclaveConfig,
    settings: EngineConfig | None = None,
    *,
    on_step: OnStep = lambda _name, _done: None,
    on_notice: Callable[[str], None] = lambda _sentence: None,
) -> Iterator[GenerationEngine]:
    """Load a model at its level and run an engine for the time of a ``with`` block.

    Args:
        model: from ``levels.open_model``.
        config: level, worker, masks.
        settings: workers, memory, numbers of requests; by default one worker, that of ``config``.
        on_step: told the fraction done of a named step.
        on_notice: told in a sentence what the user should know, also later, when another worker is used.

    Raises:
        TsqpError: as loading or connecting does, where no worker can be used.
        WeightsError: the model has no tokenizer.
        ConfigError: the level cannot generate, or the settings do not fit together.
    """
    if model.tokenizer is None:
        raise WeightsError("a model without tokenizer.json cannot generate text.")
    settings = settings or EngineConfig()
    sizes = memory(model.architecture, config, settings)
    if config.level == "masked":
        config = replace(config, mask_pool=sizes.mask_rows)
    reuse = settings.reuse_prefixes or ("off" if config.level == "masked" else "on")
    with ExitStack() as stack:
        workers = stack.enter_context(closing(Workers(model, one_each(config, settings), sizes.head_rows, on_notice)))
        workers.open(on_step)
        yield stack.enter_context(
            closing(
                GenerationEngine(workers, model.architecture, model.tokenizer, settings, reuse_prefixes=reuse == "on")
            )
        )
