"""Text to token ids and back, with the checkpoint's own ``tokenizer.json``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as _Tokenizer

from tsqp.errors import InputError, WeightsError
from tsqp.model.reading import reading

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TOKENIZER_CONFIG, _CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_COMPANIONS = (_CONFIG, _GENERATION, _TOKENIZER_CONFIG, _CHAT_TEMPLATE)
_MAX_COMPANION_BYTES = 1 << 24
# What Python makes of a byte on a command line that is not UTF-8; no text has it.
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class Conventions:
    """How a checkpoint uses its tokens.

    Attributes:
        end_ids: tokens that end an answer: those of generation_config.json, else of config.json, and the tokenizer's
            own end-of-sequence token.
        named: texts of the special tokens by role (``bos_token``, ``eos_token``, ...), as chat templates expect them.
        chat_template: in Jinja; untrusted text, to be rendered in a sandbox. None where the checkpoint has none.
    """

    end_ids: frozenset[int] = frozenset()
    named: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        content: of its ``tokenizer.json``.
        origin: the file's name, for messages.
        companions: contents of the files beside it (``read_companions``).

    Attributes:
        conventions: end-of-sequence tokens and chat template; empty without companions.

    Raises:
        WeightsError: the content is no tokenizer, or a companion is malformed.
    """

    def __init__(
        self, content: bytes, origin: str = "tokenizer.json", companions: Mapping[str, bytes] | None = None
    ) -> None:
        try:
            self._tokenizer = _Tokenizer.from_buffer(content)
        except Exception as error:
            raise WeightsError(f"{origin} is not a tokenizer ({error}).") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token: entry.content for token, entry in added.items() if entry.special}
        self.conventions = _conventions(companions or {}, self._tokenizer.token_to_id)

    def encode(self, text: str) -> list[int]:
        """Return the text's token ids, with the special tokens the checkpoint adds.

        Raises:
            InputError: the text cannot be UTF-8.
        """
        return list(self._tokenizer.encode(_utf8(text)).ids)

    def encode_bare(self, text: str) -> list[int]:
        """Return the text's token ids alone: of a rendered chat template, which writes its special tokens itself.

        Raises:
            InputError: the text cannot be UTF-8.
        """
        return list(self._tokenizer.encode(_utf8(text), add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def decode_shown(self, ids: list[int]) -> str:
        """Return the text of token ids as a reader sees it: without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def special_text(self, token: int) -> str | None:
        """Return a special token's text, or None if it is none."""
        return self._special.get(token)

    def shown_entry(self, token: int) -> str | None:
        """Return the vocabulary's entry of a token that ``decode_shown`` shows; None if special or no token at all."""
        return None if token in self._special else self._tokenizer.id_to_token(token)


def read_tokenizer(directory: Path) -> Tokenizer:
    """Read a directory's ``tokenizer.json``.

    Raises:
        WeightsError: there is none, or it is no tokenizer.
    """
    path = directory / "tokenizer.json"
    with reading(path):
        if not path.exists():
            raise WeightsError(
                f"{directory} has no tokenizer.json: it is needed for text prompts. Use --tokens without one."
            )
        content = path.read_bytes()
    return Tokenizer(content, str(path), read_companions(directory))


def find_tokenizer(directory: Path) -> Tokenizer | None:
    """Return the directory's tokenizer, or None where it has none (random-weight shapes)."""
    return read_tokenizer(directory) if (directory / "tokenizer.json").exists() else None


def read_companions(directory: Path, expected: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """Read the files beside a ``tokenizer.json`` that say how its tokens are used.

    Args:
        directory: where they lie.
        expected: of a packed model: SHA-256 of its files by name; others are not looked at.

    Returns:
        The contents of those that there are, by name.

    Raises:
        WeightsError: a file cannot be read, is larger than any such file, or was changed.
    """
    found = {}
    for name in _COMPANIONS:
        path = directory / name
        if (expected is None and not path.exists()) or (expected is not None and name not in expected):
            continue
        with reading(path), path.open("rb") as file:
            content = file.read(_MAX_COMPANION_BYTES + 1)
        if len(content) > _MAX_COMPANION_BYTES:
            raise WeightsError(f"{path} is larger than {_MAX_COMPANION_BYTES >> 20} MiB; the model's file is damaged.")
        digest = hashlib.sha256(content).hexdigest()
        if expected is not None and digest != expected[name]:
            raise WeightsError(
                f"file {name} of the packed model was changed: expected sha256 {expected[name]}, got {digest}; "
                "pack the model again."
            )
        found[name] = content
    return found


def _utf8(text: str) -> str:
    """Return a text that can be written in UTF-8.

    Raises:
        InputError: it cannot.
    """
    if (found := _SURROGATE.search(text)) is not None:
        raise InputError(f"the text is not UTF-8 from character {found.start() + 1} on: check the terminal's encoding.")
    return text


def _conventions(companions: Mapping[str, bytes], find: Callable[[str], int | None]) -> Conventions:
    """Gather what the companions say; ``find`` returns a token's id by its text."""
    tokenizer = _json_object(companions, _TOKENIZER_CONFIG)
    named = {role: text for role in _NAMED if (text := _token_text(tokenizer, role)) is not None}
    model = _GENERATION if "eos_token_id" in _json_object(companions, _GENERATION) else _CONFIG
    end_ids = _ids(_json_object(companions, model).get("eos_token_id"), model)
    own = find(named["eos_token"]) if "eos_token" in named else None
    template = _chat_template(tokenizer.get("chat_template"))
    if _CHAT_TEMPLATE in companions:
        template = _text(companions, _CHAT_TEMPLATE)
    return Conventions(end_ids if own is None else end_ids | {own}, named, template)


def _text(companions: Mapping[str, bytes], name: str) -> str:
    try:
        return companions[name].decode()
    except UnicodeDecodeError as error:
        raise WeightsError(f"{name} is not UTF-8 text ({error}).") from error


def _json_object(companions: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in companions:
        return {}
    try:
        found = json.loads(_text(companions, name))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{name} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{name}: expected a JSON object.")
    return found


def _ids(value: object, name: str) -> frozenset[int]:
    """Read ``eos_token_id``: absent, one id, or several."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise WeightsError(f"{name}: eos_token_id is {value!r}; expected a token id or a list of them.")
    return frozenset(ids)


def _token_text(config: Mapping[str, Any], role: str) -> str | None:
    """Read a token's text: itself, or an object that holds it."""
    value = config.get(role)
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise WeightsError(f"{_TOKENIZER_CONFIG}: {role} is no text.")
    return text


def _chat_template(value: object) -> str | None:
    """Read a template, or the one called ``default`` of several."""
    if isinstance(value, list):
        named = (entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default")
        value = next(named, {}).get("template")
    if value is not None and not isinstance(value, str):
        raise WeightsError(f"{_TOKENIZER_CONFIG}: chat_template is no text.")
    return value
