"""Text to token ids and back, with the checkpoint's own ``tokenizer.json``."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from tsqp.errors import WeightsError


class Tokenizer:
    """A checkpoint's tokenizer.

    Raises:
        WeightsError: the directory has no readable ``tokenizer.json``.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.exists():
            raise WeightsError(
                f"{directory} has no tokenizer.json: it is needed for text prompts. Use --tokens without one."
            )
        try:
            self._tokenizer = _Tokenizer.from_file(str(path))
        except Exception as error:
            raise WeightsError(f"{path} is not a tokenizer ({error}).") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        """Return the text's token ids, with the special tokens the checkpoint adds."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def find_tokenizer(directory: Path) -> Tokenizer | None:
    """Return the directory's tokenizer, or None where it has none (random-weight shapes)."""
    return Tokenizer(directory) if (directory / "tokenizer.json").exists() else None
