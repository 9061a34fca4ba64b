"""An engine without a model: continues prompts with given text, one byte a token, and fails or waits when told to."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tsqp.engine.api import (
    ClosingError,
    EngineStats,
    Failed,
    Finished,
    Generation,
    OnEvent,
    PromptRead,
    QueueFullError,
    Token,
    TokenLogprobs,
)
from tsqp.errors import InputError, TransportClosedError, TsqpError
from tsqp.model.tokenizer import Tokenizer as OurTokenizer
from tsqp.serve.served_model import ServedModel, served

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODEL = "tiny"
LOGPROB = -0.25
OTHER_LOGPROB = -2.5
CONTEXT = 512
_WAIT_S = 60


def byte_tokenizer(*, begins: bool = False, template: str | None = TEMPLATE) -> OurTokenizer:
    """A byte-level tokenizer of single bytes; ``begins``: it puts <|im_start|> before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 256)])
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"} | (
        {"chat_template": template} if template else {}
    )
    companions = {"tokenizer_config.json": json.dumps(config).encode()}
    return OurTokenizer(tokenizer.to_str().encode(), companions=companions)


def write_tokenizer(directory: Path, *, template: str | None = TEMPLATE) -> None:
    """Write ``byte_tokenizer`` into a checkpoint's directory, as transformers reads it too."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(byte_tokenizer()._tokenizer.to_str(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    chat = {"chat_template": template} if template else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | chat), encoding="utf-8")


def tiny_served(level: str = "open", *, begins: bool = False, template: str | None = TEMPLATE) -> ServedModel:
    """The model that goes with a ``FakeEngine``."""
    return served(byte_tokenizer(begins=begins, template=template), 258, MODEL, level)


@dataclass
class _Request:
    generation: Generation
    on_event: OnEvent
    cancelled: bool = False


@dataclass
class FakeEngine:
    """Answers every prompt with ``reply``.

    Attributes:
        reply: text of the answer, one token a byte; a stop text cuts it.
        hold_after: wait after so many tokens until ``release`` or ``cancel``.
        fail_after: fail with ``error`` after so many tokens.
        queue_limit: refuse more requests than this.
        refusal: of every submission.
        ready, reason: what ``stats`` tells.
    """

    reply: str = "Hello, world"
    hold_after: int | None = None
    fail_after: int | None = None
    error: TsqpError = field(default_factory=lambda: TransportClosedError("the worker is gone."))
    queue_limit: int = 64
    refusal: TsqpError | None = None
    ready: bool = True
    reason: str = ""
    context_length: int = CONTEXT

    def __post_init__(self) -> None:
        self.tokenizer = byte_tokenizer()
        self.submitted: list[Generation] = []
        self.cancelled: list[int] = []
        self.closed_with: float | None = None
        self.running: dict[int, _Request] = {}
        self._free = self.hold_after is None
        self.changed = threading.Condition()
        self._counts = {"prompt": 0, "completion": 0}

    def submit(self, generation: Generation, on_event: OnEvent) -> int:
        """See ``Engine``."""
        with self.changed:
            if self.refusal is not None:
                raise self.refusal
            if self.closed_with is not None:
                raise ClosingError("the engine is closing.")
            if len(generation.prompt_ids) + generation.max_tokens > self.context_length:
                raise InputError("prompt is longer than the context.")
            if len(self.running) >= self.queue_limit:
                raise QueueFullError("too many requests wait.")
            number = len(self.submitted)
            self.submitted.append(generation)
            self.running[number] = _Request(generation, on_event)
            self.changed.notify_all()
        threading.Thread(target=self._run, args=(number, self.running[number]), daemon=True).start()
        return number

    def cancel(self, number: int) -> None:
        """See ``Engine``."""
        with self.changed:
            self.cancelled.append(number)
            if number in self.running:
                self.running[number].cancelled = True
            self.changed.notify_all()

    def release(self) -> None:
        """Let requests that wait go on."""
        with self.changed:
            self._free = True
            self.changed.notify_all()

    def stats(self) -> EngineStats:
        """See ``Engine``."""
        return EngineStats(
            running=len(self.running),
            queued=3,
            blocks_free=10,
            blocks_total=64,
            block_tokens=16,
            steps=7,
            prompt_tokens=self._counts["prompt"],
            completion_tokens=self._counts["completion"],
            reused_tokens=5,
            batch_rows=4,
            pool_held=100,
            pool_wanted=200,
            bytes_sent=1000,
            bytes_received=2000,
            integrity_failures=1,
            workers=2,
            workers_usable=1,
            each_worker=(("tcp://a:1", True, 70), ("tcp://b:1", False, 30)),
            seconds={"worker": 1.5, "wire": 0.5},
            ready=self.ready,
            reason=self.reason,
        )

    def close(self, *, drain_s: float = 0.0) -> None:
        """See ``Engine``."""
        with self.changed:
            self.closed_with = drain_s
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.running, drain_s)
            for request in self.running.values():
                request.cancelled = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.running, _WAIT_S)

    def wait_until_idle(self) -> None:
        """Wait until no request runs."""
        with self.changed:
            assert self.changed.wait_for(lambda: not self.running, _WAIT_S), "requests are still running"

    def wait_until_submitted(self, count: int) -> None:
        """Wait until so many requests have come."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.submitted) >= count, _WAIT_S), "requests did not come"

    def _run(self, number: int, request: _Request) -> None:
        ending = self._emit(request)
        with self.changed:
            del self.running[number]
            self.changed.notify_all()
        request.on_event(ending)

    def _emit(self, request: _Request) -> Finished | Failed:
        generation = request.generation
        scored = generation.prompt_logprobs
        prompt = tuple(self._scores(number, place, generation) for place, number in enumerate(generation.prompt_ids))
        request.on_event(PromptRead(prompt if scored else (), reused=0))
        text, reason = self._answer(generation)
        count = 0
        for count, byte in enumerate(text[: generation.max_tokens], 1):
            if self._stopped(request, count - 1):
                return self._ended(generation, "cancelled", count - 1)
            if self.fail_after is not None and count > self.fail_after:
                return Failed(self.error)
            number = self.tokenizer.encode_bare(byte)[0]
            scores = self._scores(number, count, generation) if generation.sampling.logprobs is not None else None
            request.on_event(Token(number, byte, scores))
        if self._stopped(request, count):
            return self._ended(generation, "cancelled", count)
        if self.fail_after is not None and count <= self.fail_after:
            return Failed(self.error)
        return self._ended(generation, "length" if len(text) > generation.max_tokens else reason, count)

    def _stopped(self, request: _Request, count: int) -> bool:
        with self.changed:
            if self.hold_after is not None and count >= self.hold_after:
                self.changed.wait_for(lambda: self._free or request.cancelled, _WAIT_S)
            return request.cancelled

    def _answer(self, generation: Generation) -> tuple[str, Literal["stop", "length"]]:
        text = self.reply
        for stop in generation.stop:
            text = text.partition(stop)[0]
        return text, "stop"

    def _ended(self, generation: Generation, reason: Literal["stop", "length", "cancelled"], count: int) -> Finished:
        self._counts["prompt"] += len(generation.prompt_ids)
        self._counts["completion"] += count
        return Finished(reason, "", len(generation.prompt_ids), count)

    def _scores(self, number: int, place: int, generation: Generation) -> TokenLogprobs:
        if place == 0:
            return TokenLogprobs(None)
        wanted = generation.sampling.logprobs or 0
        return TokenLogprobs(LOGPROB, ((number, LOGPROB), ((number + 1) % 256, OTHER_LOGPROB))[:wanted])
