"""The engine: a thread that plans a step, computes it, chooses tokens, and tells whoever asked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from torch import Tensor

from tsqp.config import EngineConfig
from tsqp.engine.active import Active
from tsqp.engine.api import (
    ClosingError,
    EngineStats,
    Failed,
    Finished,
    FinishReason,
    Generation,
    OnEvent,
    PromptRead,
    Token,
)
from tsqp.engine.blocks import BlockPool, PrefixCache
from tsqp.engine.costs import Costs
from tsqp.engine.memory import cache_blocks, chunk_tokens
from tsqp.engine.sampling import Sampler, prompt_logprobs
from tsqp.engine.scheduler import Scheduler, Segment
from tsqp.engine.shares import rows_of
from tsqp.engine.steps import Outcome
from tsqp.engine.text import TextStream
from tsqp.engine.workers import Workers
from tsqp.errors import HostileError, InputError, InternalError, TransportError, TsqpError, bare
from tsqp.loaded import Stepper
from tsqp.model.architecture import LlamaConfig
from tsqp.model.attention import BLOCK_TOKENS
from tsqp.model.llama import Rows
from tsqp.model.paged_cache import PagedCache, SequencePart
from tsqp.model.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_RETRY_S = 1.0
# Between looks at a worker while nothing runs.
_LOOK_S = 1.0


class GenerationEngine:
    """Continues prompts of many requests together. See ``api.Engine``.

    Args:
        workers: compute steps.
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
        self._active: dict[int, Active] = {}
        self._next = 1
        self._closing = self._stepping = False
        self._broken: TsqpError | None = None
        self._costs = Costs(workers.meter())
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
            self._active[number] = Active(number, generation, on_event, text, sampler)
            self._changed.notify_all()
        return number

    def cancel(self, number: int) -> None:
        """See ``api.Engine``. Where a step is being computed for nobody now, a worker that hangs is not waited for."""
        with self._changed:
            if request := self._active.get(number):
                self._cancel(request)

    def _cancel(self, request: Active) -> None:
        self._scheduler.cancel(request.number)
        self._end(request, "cancelled", "")
        if self._stepping and not self._scheduler.running:
            self._workers.given_up.set()
        self._changed.notify_all()

    def stats(self) -> EngineStats:
        """See ``api.Engine``."""
        meter, costs = self._workers.meter(), self._costs
        held, wanted = self._workers.pool()
        workers_usable, each_worker = self._workers.usable(), self._workers.states()
        with self._changed:
            return EngineStats(
                running=self._scheduler.running,
                queued=self._scheduler.queued,
                blocks_free=self._blocks.free,
                blocks_total=self._blocks.count,
                block_tokens=BLOCK_TOKENS,
                steps=costs.steps,
                prompt_tokens=costs.prompt,
                completion_tokens=costs.completion,
                reused_tokens=costs.reused,
                batch_rows=costs.rows,
                pool_held=held,
                pool_wanted=wanted,
                bytes_sent=meter.bytes_sent,
                bytes_received=meter.bytes_received,
                integrity_failures=self._workers.lies,
                workers=self._workers.count,
                workers_usable=workers_usable,
                each_worker=each_worker,
                seconds=costs.seconds(self._cache.attention_ns / 1e9, meter.mask_fill_ns / 1e9),
                ready=self._broken is None and not self._closing,
                reason=str(self._broken or ("closing" if self._closing else "")),
            )

    def close(self, *, drain_s: float = 0.0) -> None:
        """See ``api.Engine``. May be called twice."""
        deadline = time.monotonic() + drain_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self._active and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            for request in list(self._active.values()):
                self._cancel(request)
            self._workers.stop()
        self._thread.join()

    def _work(self) -> None:
        while not self._is_over:
            try:
                self._turn()
            except TsqpError as error:  # noqa: PERF203  one try for each step
                self._fail_all(bare(error))
            except Exception as error:  # noqa: BLE001  whoever waits must hear of a bug in this thread
                # Only its type: a message may quote what was computed.
                _log.error("a step failed (%s)", type(error).__name__)
                self._fail_all(InternalError(f"a step failed ({type(error).__name__})."))

    @property
    def _is_over(self) -> bool:
        return self._closing and not self._active

    def _turn(self) -> None:
        """Do what is next, once there is something to do."""
        with self._changed:
            self._stepping = False
            is_idle = not self._changed.wait_for(lambda: self._active or self._closing or self._broken, _LOOK_S)
            if self._is_over:
                return
            self._workers.given_up.clear()
        if self._workers.settle():
            with self._changed:
                self._costs.leave_out(self._workers.meter())
                self._broken = self._broken or self._workers.nobody()
        with self._changed:
            segments = () if self._broken else self._scheduler.plan()
            self._stepping = bool(segments)
        if self._broken:
            self._recover()
        elif segments:
            self._step(segments)
        elif is_idle:
            self._look()

    def _look(self) -> None:
        self._workers.look()
        broken = self._workers.nobody()
        with self._changed:
            self._broken = broken
            self._costs.leave_out(self._workers.meter())

    def _step(self, segments: Sequence[Segment]) -> None:
        started = time.perf_counter()
        outcomes = self._workers.compute(segments, self._rows)
        computed = time.perf_counter()
        broken = self._workers.nobody()
        with self._changed:
            self._broken = broken
            rows = sum(self._use_share(outcome) for outcome in outcomes)
            if rows:
                self._costs.add(rows, computed - started, time.perf_counter() - computed, self._workers.meter())
            else:
                self._costs.leave_out(self._workers.meter())
            self._changed.notify_all()

    def _rows(self, group: Sequence[Segment]) -> Rows:
        return self._cache.rows([SequencePart(each.ids, each.first, each.blocks, each.wants) for each in group])

    def _use_share(self, outcome: Outcome) -> int:
        """Take one worker's logits, or end or repeat who wanted them; return how many rows were computed."""
        segments = [segment for group in outcome.groups for segment in group]
        if isinstance(outcome.result, TsqpError):
            shared = (self._active.get(segment.number) for segment in segments)
            self._lose([request for request in shared if request], bare(outcome.result))
            return 0
        for group, logits_RV in zip(outcome.groups, outcome.result, strict=True):
            done = 0
            for segment in group:
                kept = {"none": 0, "last": 1, "all": segment.count}[segment.wants]
                self._advance(segment, logits_RV[done : done + kept])
                done += kept
        return rows_of(segments)

    def _lose(self, requests: Sequence[Active], error: TsqpError) -> None:
        """End those whose products were lost together, but where only a link failed: they are computed again.

        That is by whoever is found, as long as it may be. After a lie what is to be reused is thrown away too.
        """
        if isinstance(error, HostileError) and self._prefixes is not None:
            self._prefixes.clear()
        lost = error if isinstance(error, TransportError) and not isinstance(self._broken, HostileError) else None
        for request in requests:
            if not (lost and request.may_repeat(lost)):
                self._fail(request, error)

    def _advance(self, segment: Segment, logits_RV: Tensor) -> None:
        request = self._active.get(segment.number)
        if request is None:  # cancelled meanwhile
            return
        request.losses = 0
        try:
            self._use(request, segment, logits_RV)
        except TsqpError as error:
            self._fail(request, error)

    def _fail(self, request: Active, error: TsqpError) -> None:
        begun = not self._scheduler.waits(request.number)
        self._scheduler.cancel(request.number)
        del self._active[request.number]
        request.tell(Failed(bare(error), begun))

    def _use(self, request: Active, segment: Segment, logits_RV: Tensor) -> None:
        """Take a segment's logits: of a prompt's tokens, and of what follows it."""
        generation, end = request.generation, segment.first + segment.count
        prompt = generation.prompt_ids
        if segment.first < len(prompt):
            self._costs.prompt += segment.count
            if segment.wants == "all":
                following = prompt[segment.first + 1 : end + 1]
                top = generation.sampling.logprobs or 0
                request.prompt_logprobs += prompt_logprobs(logits_RV[: len(following)], following, top)
            if end < len(prompt):
                self._scheduler.advanced(segment, None)
                return
            reused = self._scheduler.reused(request.number)
            self._costs.reused += reused
            known = tuple(request.prompt_logprobs) if generation.prompt_logprobs else ()
            request.tell(PromptRead(known, reused))
        if not generation.max_tokens:
            self._finish(request, segment, "length")
            return
        self._choose(request, segment, logits_RV[-1])

    def _choose(self, request: Active, segment: Segment, logits_V: Tensor) -> None:
        generation = request.generation
        chosen = request.sampler.choose(logits_V)
        request.generated += 1
        self._costs.completion += 1
        is_end = chosen.token in self._tokenizer.conventions.end_ids and not generation.ignore_end
        text = "" if is_end else request.text.push(chosen.token)
        request.tell(Token(chosen.token, text, chosen.logprobs))
        if is_end or request.text.stopped:
            self._finish(request, segment, "stop")
        elif request.generated == generation.max_tokens:
            self._finish(request, segment, "length")
        else:
            self._scheduler.advanced(segment, chosen.token)

    def _finish(self, request: Active, segment: Segment, reason: FinishReason) -> None:
        self._scheduler.advanced(segment, None)
        self._scheduler.finish(request.number)
        text = request.text.flush()
        self._end(request, "stop" if request.text.stopped else reason, text)

    def _end(self, request: Active, reason: FinishReason, text: str) -> None:
        del self._active[request.number]
        prompt = len(request.generation.prompt_ids)
        request.tell(Finished(reason, text, prompt, request.generated))

    def _fail_all(self, error: TsqpError) -> None:
        """End every request that has started, as nothing of a step can be used.

        Those that wait have used nothing of what failed, and go on waiting; but where nobody has started, nobody can.
        """
        broken = self._workers.nobody()
        with self._changed:
            self._broken = broken
            begun = [each for each in self._active.values() if not self._scheduler.waits(each.number)]
            self._lose(begun or ([] if broken else list(self._active.values())), error)
            self._changed.notify_all()

    def _recover(self) -> None:
        """Go on with a worker that can be used, sooner or later; until then, tell everybody why there is none."""
        try:
            self._workers.recover(lambda: self._is_over)
        except TsqpError as error:
            with self._changed:
                self._broken = bare(error)
                for request in list(self._active.values()):
                    self._fail(request, request.lost or error)
                if not self._closing:
                    self._changed.wait(_RETRY_S)
            return
        with self._changed:
            self._costs.leave_out(self._workers.meter())  # what failed, and opening
            self._broken = None
