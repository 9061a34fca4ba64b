"""A checkpoint's tokenizer as the API needs it: text to ids, ids to text, and the bytes of single tokens."""

from __future__ import annotations

import re
from functools import lru_cache

from tsqp.model.tokenizer import Tokenizer

_BYTE_ENTRY = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE_ENTRY = "▁"
# How byte-level vocabularies write a space.
_SPACE_LETTER = "\u0120"


class Vocabulary:
    """A checkpoint's tokenizer.

    Args:
        tokenizer: as the engine uses it.
        size: how many token ids the model has.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        self.size = size
        self._prefix = tokenizer.encode("")
        entries = "".join(tokenizer.shown_entry(number) or "" for number in tokenizer.encode_bare("a a"))
        self._byte_level = _SPACE_LETTER in entries

    def encode(self, text: str) -> tuple[tuple[int, ...], int]:
        """Return a text's ids, and how many of the first the tokenizer put there: they are not in the text."""
        ids = self._tokenizer.encode(text)
        count = len(self._prefix)
        return tuple(ids), count if ids[:count] == self._prefix else 0

    def encode_bare(self, text: str) -> tuple[int, ...]:
        """Return the ids of a rendered chat, which writes its special tokens itself."""
        return tuple(self._tokenizer.encode_bare(text))

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return self._tokenizer.decode(ids)

    def is_special(self, number: int) -> bool:
        """Tell whether a token is one of those that answers do not show."""
        return self._tokenizer.special_text(number) is not None

    def token_bytes(self, number: int) -> bytes:
        """Return the bytes that a token stands for; they need not be whole characters."""
        special = self._tokenizer.special_text(number)
        if special is not None:
            return special.encode()
        entry = self._tokenizer.shown_entry(number)
        if entry is None:
            return b""
        if self._byte_level:
            table = _byte_of_letter()
            return b"".join(bytes([table[letter]]) if letter in table else letter.encode() for letter in entry)
        if byte := _BYTE_ENTRY.fullmatch(entry):
            return bytes([int(byte[1], 16)])
        return entry.replace(_SPACE_ENTRY, " ").encode()

    def token_text(self, number: int) -> str:
        r"""Return a token as OpenAI shows it: its text, or ``bytes:\x..`` where it is not whole characters."""
        content = self.token_bytes(number)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


@lru_cache(maxsize=1)
def _byte_of_letter() -> dict[str, int]:
    """Return the letters that byte-level tokenizers write bytes with (GPT-2): printable ones are themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
