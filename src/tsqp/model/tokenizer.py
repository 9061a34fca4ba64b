"""Text to token ids and back, with the checkpoint's own ``tokenizer.json``."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from tsqp.errors import WeightsError


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        content: of its ``tokenizer.json``.
        origin: the file's name, for messages.

    Raises:
        WeightsError: the content is no tokenizer.
    """

    def __init__(self, content: bytes, origin: str = "tokenizer.json") -> None:
        try:
            self._tokenizer = _Tokenizer.from_buffer(content)
        except Exception as error:
            raise WeightsError(f"{origin} is not a tokenizer ({error}).") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        """Return the text's token ids, with the special tokens the checkpoint adds."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def read_tokenizer(directory: Path) -> Tokenizer:
    """Read a directory's ``tokenizer.json``.

    Raises:
        WeightsError: there is none, or it is no tokenizer.
    """
    path = directory / "tokenizer.json"
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise WeightsError(
            f"{directory} has no tokenizer.json: it is needed for text prompts. Use --tokens without one."
        ) from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    return Tokenizer(content, str(path))


def find_tokenizer(directory: Path) -> Tokenizer | None:
    """Return the directory's tokenizer, or None where it has none (random-weight shapes)."""
    return read_tokenizer(directory) if (directory / "tokenizer.json").exists() else None
