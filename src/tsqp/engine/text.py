"""Turns a request's tokens into text as they come: whole characters only, nothing that would have to be taken back."""

from __future__ import annotations

from collections.abc import Sequence

from tsqp.model.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# A prompt that ends in more tokens that are no text by themselves is continued as a text of its own.
_MAX_LOOK_BACK = 16


class TextStream:
    """The text of one answer, piece by piece, up to the first stop text.

    The pieces together are the tokenizer's own decoding of all tokens. A few tokens before the new ones are decoded
    with them, since the first token of a text may lose its leading space. A piece waits while its last character is
    incomplete, or while it ends in single bytes of a vocabulary with byte fallback: a later byte can change the
    decoding of a whole run of them.

    The first stop text is the one that is complete first, whatever the tokens' boundaries. A special token ends the
    text if it is one of the stop texts; else it is not shown.

    Args:
        tokenizer: of the model.
        stop: texts at the first of which the answer ends.
        prompt_ids: the answer continues their text, so its first token keeps its leading space; without them it is a
            text of its own.

    Attributes:
        stopped: whether a stop text was found. What comes after it is ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), prompt_ids: Sequence[int] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = _Stops(stop)
        # Text that may be the beginning of a stop text.
        self._held = ""
        # Tokens whose text is out already, that text as they alone decode, and tokens whose text is not out.
        self._context = _last_shown(tokenizer, prompt_ids)
        self._context_text = tokenizer.decode_shown(self._context)
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """Take one more token and return the text that can be shown now."""
        if self.stopped:
            return ""
        if self._stops.contain(self._tokenizer.special_text(token)):
            text = self.flush()
            self.stopped = True
            return text
        entry = self._tokenizer.shown_entry(token)
        if entry is None:
            return ""
        self._new.append(token)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT) or _is_byte(entry):
            # The stop text ends the tokens too, so no later byte can change it.
            foreseen = text.rstrip(_REPLACEMENT)
            return self._show(foreseen) if self._stops.ahead(foreseen) else ""
        self._context, self._new = self._new, []
        self._context_text = self._tokenizer.decode_shown(self._context)
        return self._show(text)

    def flush(self) -> str:
        """End the text: return what was held back. Look at ``stopped`` afterwards: it may complete a stop text."""
        if self.stopped:
            return ""
        shown = self._show(self._pending()) + self._held
        self._held, self._new = "", []
        return shown

    def _pending(self) -> str:
        return self._tokenizer.decode_shown(self._context + self._new)[len(self._context_text) :]

    def _show(self, text: str) -> str:
        """Return what can be shown of final text: up to a stop text, or to what may be the beginning of one."""
        found = self._stops.feed(text)
        known = self._held + text
        if found is not None:
            self.stopped, self._held = True, ""
            end, length = found
            return known[: len(known) - len(text) + end - length]
        shown = len(known) - self._stops.begun
        self._held = known[shown:]
        return known[:shown]


class _Stops:
    """Finds the first of several texts in a text that comes in pieces (Knuth, Morris and Pratt 1977).

    Attributes:
        begun: length of the longest end of the text so far that begins a stop text.
    """

    def __init__(self, texts: tuple[str, ...]) -> None:
        self._texts = texts
        self._borders = [_borders(text) for text in texts]
        # Per stop text: how many of its characters the text so far ends with.
        self._matched = [0] * len(texts)

    @property
    def begun(self) -> int:
        return max(self._matched, default=0)

    def contain(self, text: str | None) -> bool:
        return text in self._texts

    def feed(self, text: str) -> tuple[int, int] | None:
        """Go on with more text; return where in it the first stop text ends, and that one's length."""
        return self._advance(self._matched, text)

    def ahead(self, text: str) -> bool:
        """Tell whether more text would complete a stop text, without going on."""
        return self._advance(self._matched.copy(), text) is not None

    def _advance(self, matched: list[int], text: str) -> tuple[int, int] | None:
        if not matched:
            return None
        for end, character in enumerate(text, 1):
            longest = 0
            for index, stop in enumerate(self._texts):
                length = matched[index]
                while length and stop[length] != character:
                    length = self._borders[index][length]
                matched[index] = length = length + (stop[length] == character)
                if length == len(stop):
                    longest = max(longest, length)
            if longest:
                return end, longest
        return None


def _borders(text: str) -> list[int]:
    """Return for each length n the longest proper end of ``text[:n]`` that is also its beginning."""
    borders = [0] * (len(text) + 1)
    for end in range(1, len(text)):
        length = borders[end]
        while length and text[length] != text[end]:
            length = borders[length]
        borders[end + 1] = length + (text[length] == text[end])
    return borders


def _is_byte(entry: str) -> bool:
    """Tell whether a vocabulary's entry stands for one byte: ``<0xE2>``."""
    return len(entry) == len("<0xE2>") and entry.startswith("<0x") and entry.endswith(">")


def _last_shown(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> list[int]:
    """Return the prompt's last token that is a text by itself, alone in a list, or none."""
    for token in reversed(prompt_ids[-_MAX_LOOK_BACK:]):
        if tokenizer.shown_entry(token) is not None and _REPLACEMENT not in tokenizer.decode_shown([token]):
            return [token]
    return []
