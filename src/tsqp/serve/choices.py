"""What one prompt's answer is made of, from an engine's events; the same for streams and for whole answers. Pure."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from tsqp.engine.api import Finished, PromptRead, Token, TokenLogprobs
from tsqp.serve.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt.

    Attributes:
        ids: its tokens.
        text: as ``echo`` returns it.
        hidden: how many of the first tokens the tokenizer put there; they are not in ``text``.
    """

    ids: tuple[int, ...]
    text: str
    hidden: int = 0


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with its log-probabilities, and where in the answer's text it begins."""

    id: int
    offset: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event adds to an answer. ``finish`` is set in the last one."""

    text: str
    tokens: tuple[Scored, ...] = ()
    finish: str | None = None


class Choice:
    """Follows one generation.

    Args:
        index: in the answer's list.
        prompt: that is continued.
        vocabulary: for the place of tokens in the text.
        echo: the answer begins with the prompt.
    """

    def __init__(self, index: int, prompt: Prompt, vocabulary: Vocabulary, *, echo: bool) -> None:
        self.index, self.prompt, self.echo = index, prompt, echo
        self.completion_tokens = 0
        self.reused = 0
        self._vocabulary = vocabulary
        self._shown = 0
        self._offset = 0
        self._waiting: list[Scored] = []
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def advance(self, event: PromptRead | Token | Finished) -> Piece | None:
        """Return what an event adds, or None if it adds nothing.

        A token is told once its text is: a token that is held back because it may begin a stop text waits.
        """
        if isinstance(event, PromptRead):
            self.reused = event.reused
            return self._echoed(event) if self.echo else None
        if isinstance(event, Token):
            self._score(event.id, event.logprobs, hidden=self._vocabulary.is_special(event.id))
            self._shown += len(event.text)
            piece = Piece(event.text, self._released())
            return piece if piece.text or piece.tokens else None
        self.completion_tokens = event.completion_tokens
        self._shown += len(event.text)
        released = self._released()
        if event.reason == "length" or self._ended_by_token():
            released += tuple(self._waiting)
        return Piece(event.text, released, event.reason)

    def _echoed(self, event: PromptRead) -> Piece:
        if event.logprobs:
            for place, (number, logprobs) in enumerate(zip(self.prompt.ids, event.logprobs, strict=True)):
                self._score(number, logprobs, hidden=place < self.prompt.hidden)
        # What is decoded next belongs to the completion; an unfinished character of the prompt stays with the prompt.
        self._offset = self._shown = len(self.prompt.text)
        self._characters.reset()
        scored, self._waiting = tuple(self._waiting), []
        return Piece(self.prompt.text, scored)

    def _score(self, number: int, logprobs: TokenLogprobs | None, *, hidden: bool = False) -> None:
        if logprobs is not None:
            self._waiting.append(Scored(number, self._offset, logprobs))
        if not hidden:
            self._offset += len(self._characters.decode(self._vocabulary.token_bytes(number)))

    def _ended_by_token(self) -> bool:
        """Tell an end-of-sequence token, which belongs to the answer, from a stop text, whose tokens do not."""
        return bool(self._waiting) and self._vocabulary.is_special(self._waiting[-1].id)

    def _released(self) -> tuple[Scored, ...]:
        count = 0
        while count < len(self._waiting) and self._waiting[count].offset < self._shown:
            count += 1
        released, self._waiting = tuple(self._waiting[:count]), self._waiting[count:]
        return released
