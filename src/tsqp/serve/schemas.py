"""What clients may ask: OpenAI's parameters that this server carries out, and none besides.

A parameter that it does not carry out is refused with its name, unless its value asks for nothing. Messages tell types
and names, never a value: a value may be a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta, Struct

from tsqp.engine.api import MAX_TOP_LOGPROBS, Sampling
from tsqp.errors import InputError
from tsqp.serve.errors import ApiError, from_engine, refused

DEFAULT_COMPLETION_TOKENS: Final = 16
MAX_MESSAGES: Final = 4096
ROLES: Final = ("system", "user", "assistant")
_MAX_SHOWN_NAME = 64
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`", re.DOTALL)

# Values that ask for nothing, of parameters that are not carried out. None always asks for nothing.
_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "metadata": ({},),
    "user": (),
}
_NEUTRAL_COMPLETION: Final[dict[str, tuple[object, ...]]] = {**_NEUTRAL, "best_of": (1,), "suffix": ("",)}
_NEUTRAL_CHAT: Final[dict[str, tuple[object, ...]]] = {
    **_NEUTRAL,
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_cache_key": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
_NEUTRAL_MESSAGE: Final[dict[str, tuple[object, ...]]] = {"annotations": ([],), "tool_calls": ([],)}

Count = Annotated[int, Meta(ge=0, le=1 << 31)]
Choices = Annotated[int, Meta(ge=1, le=1 << 16)]


class StreamOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a stream is told: with a last event of counts, and padded or not whatever the server's setting."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Asked(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of request have."""

    model: str
    max_tokens: Count | None = None
    n: Choices = 1
    stop: str | list[str] = []
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, logprobs: int | None, choice: int) -> Sampling:
        """Return how tokens of the n-th choice of a prompt are drawn; each has random numbers of its own.

        Raises:
            ApiError: a value out of range.
        """
        try:
            return Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                seed=None if self.seed is None else self.seed + choice,
                logprobs=logprobs,
            )
        except InputError as error:
            raise from_engine(error) from None


class CompletionRequest(Asked, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/completions``."""

    prompt: Any
    echo: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class TextPart(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a message; only text is known."""

    type: str
    text: str


class Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message of a chat."""

    role: str
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content; parts are joined by line breaks."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ChatRequest(Asked, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] = 0

    def conversation(self) -> list[dict[str, str]]:
        """Return the messages as templates take them; ``developer`` is another name of ``system``."""
        return [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in self.messages
        ]


Request = TypeVar("Request", CompletionRequest, ChatRequest)


def parse_completion(body: bytes) -> CompletionRequest:
    """Read the body of ``/v1/completions``.

    Raises:
        ApiError: not JSON, or a parameter that is unknown, not supported, missing or of the wrong type.
    """
    values = _object(body)
    if values.get("best_of") == values.get("n", 1):
        values.pop("best_of", None)
    request = _converted(values, CompletionRequest, _NEUTRAL_COMPLETION)
    _require_stream(request)
    return request


def parse_chat(body: bytes) -> ChatRequest:
    """Read the body of ``/v1/chat/completions``.

    Raises:
        ApiError: as ``parse_completion``.
    """
    values = _object(body)
    messages = values.get("messages")
    if isinstance(messages, list):
        values["messages"] = [_without_neutral(message, _NEUTRAL_MESSAGE) for message in messages]
    request = _converted(values, ChatRequest, _NEUTRAL_CHAT)
    _require_stream(request)
    for place, message in enumerate(request.messages):
        if message.role not in (*ROLES, "developer"):
            raise refused(
                "messages", f"messages[{place}].role: expected one of {', '.join(ROLES)}; tools are not supported."
            )
        if not isinstance(message.content, str) and any(part.type != "text" for part in message.content):
            raise refused("messages", f"messages[{place}].content: only parts of type text are supported.")
    if request.top_logprobs and not request.logprobs:
        raise refused("top_logprobs", "top_logprobs needs logprobs to be true.")
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise refused("max_tokens", "give max_tokens or max_completion_tokens, not both.")
    return request


def _require_stream(request: Asked) -> None:
    if request.stream_options is not None and not request.stream:
        raise refused("stream_options", "stream_options needs stream to be true.")


def _object(body: bytes) -> dict[str, Any]:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 text (byte {error.start}).", code="invalid_utf8") from None
    try:
        values = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        raise ApiError(400, "the body is not JSON: expected one object.", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object.", code="invalid_json")
    return values


def _converted(values: dict[str, Any], kind: type[Request], neutral: Mapping[str, tuple[object, ...]]) -> Request:
    known = set(kind.__struct_fields__)
    for name in values.keys() - known:
        shown = name[:_MAX_SHOWN_NAME]
        if name not in neutral:
            raise refused(shown, f"unknown parameter {shown!r}.", code="unknown_parameter")
        if not _asks_nothing(values[name], neutral[name]):
            raise refused(name, f"{name} is not supported by this server: leave it out.", code="unsupported_parameter")
    given = {name: value for name, value in values.items() if name in known and value is not None}
    try:
        return msgspec.convert(given, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise _invalid(str(error)) from None


def _invalid(text: str) -> ApiError:
    """Turn msgspec's sentence, which names types and a path, into ours."""
    path = _PATH.search(text)
    where = path[1] if path else ""
    if missing := re.match(r"Object missing required field `(\w+)`", text):
        return refused(missing[1], f"{where + '.' if where else ''}{missing[1]} is required.")
    sentence = _PATH.sub("", text).replace("`", "")
    if unknown := _UNKNOWN.match(text):
        sentence = f"unknown field {unknown[1][:_MAX_SHOWN_NAME]!r}"
    param = re.split(r"[.\[]", where, maxsplit=1)[0]
    return refused(param or "body", f"{where or 'the body'}: {sentence[:200]}.")


def _without_neutral(message: object, neutral: Mapping[str, tuple[object, ...]]) -> object:
    if not isinstance(message, dict):
        return message
    return {
        name: value
        for name, value in message.items()
        if value is not None and not (name in neutral and _asks_nothing(value, neutral[name]))
    }


def _asks_nothing(value: object, neutral: tuple[object, ...]) -> bool:
    return value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)
