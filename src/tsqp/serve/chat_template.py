"""Renders a checkpoint's chat template as transformers does, in a sandbox: a template is code from a model's files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tsqp.errors import InputError, WeightsError


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; here its content counts as it is."""

    tags = {"generation"}  # noqa: RUF012  jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: jinja2, as in ``chat_template.jinja`` or ``tokenizer_config.json``.
        special: what templates call by name: ``bos_token``, ``eos_token`` and others.

    Raises:
        WeightsError: the source is no template.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise, strftime_now=_now)
        self._special = dict(special)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise WeightsError(f"the model's chat template is malformed: line {_line(error)}.") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of a conversation, up to where the assistant's next words go.

        Args:
            messages: with ``role`` and ``content``.

        Raises:
            InputError: the template refuses the conversation, such as one that does not alternate.
        """
        plain = [dict(message) for message in messages]
        try:
            return self._template.render(
                messages=plain, tools=None, documents=None, add_generation_prompt=True, **self._special
            )
        except _RefusedError as error:
            raise InputError(f"the model's chat template refuses these messages: {error.message}") from None
        except Exception:  # noqa: BLE001  whatever a template does; its message may quote the conversation
            raise InputError("the model's chat template cannot render these messages.") from None


class _RefusedError(TemplateError):
    """The template called ``raise_exception``."""


def _raise(message: str) -> None:
    raise _RefusedError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005  local time, as transformers gives it


def _to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  a filter's own arguments
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _line(error: TemplateError) -> object:
    return getattr(error, "lineno", "unknown")
