"""What an engine is asked for and what it answers. Whoever serves it (a terminal, an HTTP server) knows only this.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tsqp.errors import ConfigError, InputError, TsqpError

# One fixed text decides what is reused: nothing is, across owners.
NO_OWNER = ""
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_TOP_LOGPROBS = 20
MAX_SEED = (1 << 63) - 1

FinishReason = Literal["stop", "length", "cancelled"]


class QueueFullError(TsqpError):
    """Too many requests wait; try again later."""


class ClosingError(TsqpError):
    """The engine is being closed and takes no more requests."""


class LogitsError(TsqpError):
    """No token can be chosen: the model gave logits that are not numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen from logits.

    Attributes:
        temperature: divides logits; 0 takes the likeliest token. In [0, 2].
        top_p: keep the fewest likeliest tokens whose probabilities reach it (Holtzman et al. 2020). In (0, 1].
        top_k: keep so many of the likeliest; 0 keeps all.
        min_p: keep tokens at least this times as likely as the likeliest (Nguyen et al. 2024). In [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens that occurred, in the prompt too
            (Keskar et al. 2019). Above 0, at most 10; 1 changes nothing.
        seed: of this request's own random numbers; None draws one.
        logprobs: report the log-probability of each token and of so many likeliest ones; None reports none.

    Raises:
        InputError: a value outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._require("temperature", 0 <= self.temperature <= 2, "from 0 to 2")  # noqa: PLR2004
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("top_k", self.top_k >= 0, "0 (all) or more")
        self._require("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        self._require("repetition_penalty", 0 < self.repetition_penalty <= 10, "above 0 and at most 10")  # noqa: PLR2004
        self._require("seed", self.seed is None or 0 <= self.seed <= MAX_SEED, f"from 0 to {MAX_SEED}")
        self._require(
            "logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS, f"from 0 to {MAX_TOP_LOGPROBS}"
        )

    def _require(self, name: str, holds: bool, expected: str) -> None:  # noqa: FBT001
        if not holds:
            raise InputError(f"{name} is {getattr(self, name)}; it must be {expected}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One prompt to continue.

    Attributes:
        prompt_ids: token ids.
        max_tokens: how many to generate at most; 0 only reads the prompt.
        sampling: how tokens are chosen.
        stop: texts at the first of which generation ends; the text is not part of the answer.
        prompt_logprobs: also report the log-probability of each token of the prompt.
        ignore_end: go on after the model's end-of-sequence token.
        owner: an API key's identity. Prefixes are reused within one owner only, and for ``NO_OWNER`` never.

    Raises:
        InputError: an empty prompt, too many or too long stop texts, or a negative number of tokens.
    """

    prompt_ids: tuple[int, ...] = field(repr=False)
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    prompt_logprobs: bool = False
    ignore_end: bool = False
    owner: str = NO_OWNER

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise InputError("the prompt is empty: give at least one token.")
        if self.max_tokens < 0:
            raise InputError(f"max_tokens is {self.max_tokens}; it must be 0 or more.")
        if len(self.stop) > MAX_STOPS:
            raise InputError(f"{len(self.stop)} stop texts; at most {MAX_STOPS} are allowed.")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_CHARACTERS:
                raise InputError(f"a stop text of {len(text)} characters; it must have 1 to {MAX_STOP_CHARACTERS}.")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one position: natural logarithms of softmax(logits), before sampling changes them.

    Attributes:
        logprob: of the token that is there; None for the first of a prompt, which nothing predicts.
        top: the likeliest tokens and theirs, likeliest first.
    """

    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptRead:
    """The prompt has been computed.

    Attributes:
        logprobs: of each of its tokens, if they were asked for.
        reused: how many tokens were found in the prefix cache.
    """

    logprobs: tuple[TokenLogprobs, ...] = ()
    reused: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """One more token.

    Attributes:
        id: its id.
        text: what can be shown now; a token may complete no character, or be held back as part of a stop text.
        logprobs: if they were asked for.
    """

    id: int
    text: str
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The end. ``text`` is what was held back and belongs to the answer after all."""

    reason: FinishReason
    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The end, by an error: of the link, of a check, or of a request that cannot be carried out.

    Attributes:
        error: what happened.
        begun: whether the request had started; else it waited, in vain, as no worker can be used.
    """

    error: TsqpError
    begun: bool = True


Event = PromptRead | Token | Finished | Failed
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine does and has done.

    Attributes:
        running, queued: requests now.
        blocks_free, blocks_total: of the cache, of ``block_tokens`` tokens each.
        steps: since the start.
        prompt_tokens, completion_tokens, reused_tokens: computed, generated, found in the prefix cache.
        batch_rows: rows of the last step.
        pool_held, pool_wanted: rows of mask products, over all linears; 0 where nothing is masked.
        bytes_sent, bytes_received: over the link to the worker.
        integrity_failures: how often a worker or dealer gave a wrong product or sent what it must not.
        workers, workers_usable: how many were given, and are in use now.
        each_worker: of each its address, whether it is in use, and how many rows it has computed.
        seconds: by part. worker, wire: that the enclave waited for them; enclave: the rest of the steps, of which
            attention, quantise, mask, check, ahead and mask_wait are parts; sampling: between steps; mask_fill: in
            idle time.
        ready: whether requests can be served.
        reason: why not.
    """

    running: int
    queued: int
    blocks_free: int
    blocks_total: int
    block_tokens: int
    steps: int
    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int
    batch_rows: int
    pool_held: int
    pool_wanted: int
    bytes_sent: int
    bytes_received: int
    integrity_failures: int
    workers: int
    workers_usable: int
    each_worker: tuple[tuple[str, bool, int], ...] = ()
    seconds: dict[str, float]
    ready: bool
    reason: str = ""


class Engine(Protocol):
    """Continues many prompts at once. Thread-safe."""

    @property
    def context_length(self) -> int:
        """How many tokens a prompt and its answer may have together."""

    def submit(self, generation: Generation, on_event: OnEvent) -> int:
        """Queue one request; its events come in order, one at a time, ending with ``Finished`` or ``Failed``.

        Args:
            generation: what to continue.
            on_event: called with each event, on the engine's thread or that of ``cancel`` or ``close``; it must return
                at once, not raise, and not cancel.

        Returns:
            The request's number, for ``cancel``.

        Raises:
            InputError: the prompt and ``max_tokens`` are longer than the model's context, or than the cache.
            QueueFullError: too many requests wait.
            ClosingError: the engine is closing.
            TsqpError: it is not ready: what made it so.
        """

    def cancel(self, number: int) -> None:
        """End a request: its blocks are free at once, and it gets ``Finished`` with the reason ``cancelled``."""

    def stats(self) -> EngineStats:
        """Return what it does now."""

    def close(self, *, drain_s: float = 0.0) -> None:
        """Take no more requests, let those that run finish for so long, end the others, and release everything."""


def require_positive(name: str, value: int) -> None:
    """Refuse a setting that must be at least 1.

    Raises:
        ConfigError: it is not.
    """
    if value < 1:
        raise ConfigError(f"{name} is {value}; it must be at least 1.")
