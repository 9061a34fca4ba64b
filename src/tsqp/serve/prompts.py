"""Prompts as clients give them, to token ids: text, texts, ids or lists of ids, or a chat."""

from __future__ import annotations

from collections.abc import Sequence

from tsqp.errors import InputError
from tsqp.serve.choices import Prompt
from tsqp.serve.errors import ApiError, from_engine, refused
from tsqp.serve.schemas import ChatRequest
from tsqp.serve.served_model import ServedModel
from tsqp.serve.vocabulary import Vocabulary

_FORMS = "expected a text, a list of texts, a list of token ids or a list of such lists."


def completion_prompts(value: object, vocabulary: Vocabulary, most: int) -> list[Prompt]:
    """Return the prompts of ``/v1/completions``, in their order.

    Args:
        value: as it came.
        vocabulary: of the model.
        most: so many at most.

    Raises:
        ApiError: none of the four forms, an empty prompt, an id that the model has not, or too many prompts.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise refused("prompt", f"prompt: {_FORMS}")
    if value and all(_is_id(item) for item in value):
        value = [value]
    if not value:
        raise _empty()
    if len(value) > most:
        raise refused("prompt", f"{len(value)} prompts in one request; at most {most} choices are allowed.")
    if len({type(item) for item in value}) > 1:
        raise refused("prompt", f"prompt: {_FORMS}")
    return [_prompt(item, vocabulary) for item in value]


def chat_prompt(request: ChatRequest, model: ServedModel) -> Prompt:
    """Return the prompt that the model's template makes of a chat.

    Raises:
        ApiError: the model has no template, or it refuses the chat.
    """
    if model.template is None:
        raise ApiError(
            400,
            f"{model.name} has no chat template: its files hold neither chat_template.jinja nor a chat_template in "
            "tokenizer_config.json, or it was packed without them. Use /v1/completions, or serve a model with one.",
            code="no_chat_template",
            param="messages",
        )
    try:
        text = model.template.render(request.conversation())
    except InputError as error:
        raise ApiError(400, str(error), param="messages") from None
    ids = model.vocabulary.encode_bare(text)
    if not ids:
        raise _empty("messages")
    return Prompt(ids, text)


def answer_tokens(prompt: Prompt, asked: int | None, default: int, room: int) -> int:
    """Return how many tokens may be generated after a prompt.

    Args:
        prompt: that is continued.
        asked: what the client wants; None where it does not say.
        default: what that means, where there is room for it.
        room: for prompt and answer together.

    Raises:
        ApiError: they do not fit.
    """
    count = len(prompt.ids)
    least = 1 if asked is None else asked
    if count + least > room:
        raise refused(
            "prompt",
            f"the prompt has {count} tokens and the answer may have {least}: together more than the {room} that this "
            "server holds. Shorten the prompt or lower max_tokens.",
            code="context_length_exceeded",
        )
    left = room - count
    return asked if asked is not None else min(left, default)


def as_generation_error(error: InputError) -> ApiError:
    """Return what a client is told when a generation cannot be made of its request."""
    text = str(error)
    return refused("stop", text) if "stop text" in text else from_engine(error)


def _prompt(item: object, vocabulary: Vocabulary) -> Prompt:
    if isinstance(item, str):
        ids, hidden = vocabulary.encode(item)
        if not item or not ids:
            raise _empty()
        return Prompt(ids, item, hidden)
    if not isinstance(item, list) or not all(_is_id(number) for number in item):
        raise refused("prompt", f"prompt: {_FORMS}")
    if not item:
        raise _empty()
    ids = _known(item, vocabulary.size)
    return Prompt(ids, vocabulary.decode(item))


def _known(ids: Sequence[int], size: int) -> tuple[int, ...]:
    if not all(0 <= number < size for number in ids):
        raise refused("prompt", f"prompt: a token id is outside of 0 to {size - 1}.")
    return tuple(ids)


def _is_id(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _empty(param: str = "prompt") -> ApiError:
    return refused(param, "the prompt is empty: give at least one token.")
