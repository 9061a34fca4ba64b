"""Answers in OpenAI's two forms, of the same pieces: completions and chats, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tsqp.serve.choices import Choice, Piece, Scored
from tsqp.serve.vocabulary import Vocabulary

# JSON has no infinity; OpenAI writes this for a token that cannot be.
LEAST_LOGPROB = -9999.0

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One choice of a whole answer: all its pieces together."""

    choice: Choice
    piece: Piece


class Form(Protocol):
    """How pieces are written."""

    def opening(self, index: int) -> Json | None:
        """Return the chunk that a choice begins with, if there is one."""

    def chunk(self, index: int, piece: Piece) -> Json:
        """Return a chunk of a stream."""

    def whole(self, outcomes: Sequence[Outcome]) -> Json:
        """Return a whole answer."""

    def last(self, choices: Sequence[Choice]) -> Json:
        """Return the chunk of counts that ends a stream."""


def usage(choices: Sequence[Choice]) -> Json:
    """Return the counts of an answer. A prompt counts once, however many choices it has."""
    prompts = {id(choice.prompt): choice for choice in choices}
    prompt_tokens = sum(len(choice.prompt.ids) for choice in prompts.values())
    completion_tokens = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(choice.reused for choice in prompts.values())},
    }


class _Form:
    """What both forms share. ``counted``: chunks have a field for counts, which is null but in the last."""

    def __init__(self, prefix: str, kind: str, model: str, *, counted: bool) -> None:
        self._head: Json = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._counts: Json = {"usage": None} if counted else {}

    def last(self, choices: Sequence[Choice]) -> Json:
        """Return the chunk of counts that ends a stream."""
        return {**self._chunk_head, "choices": [], "usage": usage(choices)}

    @property
    def _chunk_head(self) -> Json:
        return self._head


class CompletionForm(_Form):
    """``/v1/completions``.

    Args:
        model: its name.
        vocabulary: to write tokens with.
        counted: the stream ends with counts.
        logprobs: whether they were asked for.
    """

    def __init__(self, model: str, vocabulary: Vocabulary, *, counted: bool, logprobs: bool) -> None:
        super().__init__("cmpl", "text_completion", model, counted=counted)
        self._vocabulary, self._logprobs = vocabulary, logprobs

    def opening(self, index: int) -> None:
        """There is none."""

    def chunk(self, index: int, piece: Piece) -> Json:
        """Return a chunk of a stream."""
        return {**self._head, "choices": [self._choice(index, piece)], **self._counts}

    def whole(self, outcomes: Sequence[Outcome]) -> Json:
        """Return a whole answer."""
        choices = [self._choice(outcome.choice.index, outcome.piece) for outcome in outcomes]
        return {**self._head, "choices": choices, "usage": usage([outcome.choice for outcome in outcomes])}

    def _choice(self, index: int, piece: Piece) -> Json:
        return {
            "text": piece.text,
            "index": index,
            "logprobs": self._scores(piece.tokens) if self._logprobs else None,
            "finish_reason": piece.finish,
        }

    def _scores(self, tokens: Sequence[Scored]) -> Json:
        return {
            "tokens": [self._vocabulary.token_text(token.id) for token in tokens],
            "token_logprobs": [_finite(token.logprobs.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: Scored) -> Json | None:
        """Return the likeliest tokens and the one that is there, as OpenAI does; of equal texts the likelier."""
        if token.logprobs.logprob is None:
            return None
        found: Json = {}
        for number, logprob in (*token.logprobs.top, (token.id, token.logprobs.logprob)):
            found.setdefault(self._vocabulary.token_text(number), _finite(logprob))
        return found


class ChatForm(_Form):
    """``/v1/chat/completions``; arguments as of ``CompletionForm``."""

    def __init__(self, model: str, vocabulary: Vocabulary, *, counted: bool, logprobs: bool) -> None:
        super().__init__("chatcmpl", "chat.completion", model, counted=counted)
        self._vocabulary, self._logprobs = vocabulary, logprobs

    @property
    def _chunk_head(self) -> Json:
        return {**self._head, "object": "chat.completion.chunk"}

    def opening(self, index: int) -> Json:
        """Return the chunk that says who speaks."""
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, piece: Piece) -> Json:
        """Return a chunk of a stream."""
        delta: Json = {"content": piece.text} if piece.text or piece.tokens else {}
        scores = self._scores(piece.tokens) if self._logprobs and piece.tokens else None
        return self._delta(index, delta, scores, piece.finish)

    def whole(self, outcomes: Sequence[Outcome]) -> Json:
        """Return a whole answer."""
        choices: list[Json] = [
            {
                "index": outcome.choice.index,
                "message": {"role": "assistant", "content": outcome.piece.text, "refusal": None},
                "logprobs": self._scores(outcome.piece.tokens) if self._logprobs else None,
                "finish_reason": outcome.piece.finish,
            }
            for outcome in outcomes
        ]
        return {**self._head, "choices": choices, "usage": usage([outcome.choice for outcome in outcomes])}

    def _delta(self, index: int, delta: Json, scores: Json | None, finish: str | None) -> Json:
        choice: Json = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish}
        return {**self._chunk_head, "choices": [choice], **self._counts}

    def _scores(self, tokens: Sequence[Scored]) -> Json:
        content = [
            {
                **self._entry(token.id, token.logprobs.logprob),
                "top_logprobs": [self._entry(number, logprob) for number, logprob in token.logprobs.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, number: int, logprob: float | None) -> Json:
        return {
            "token": self._vocabulary.token_text(number),
            "logprob": _finite(logprob),
            "bytes": list(self._vocabulary.token_bytes(number)),
        }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
