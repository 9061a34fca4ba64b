"""The model that a server offers: its name, its vocabulary and its chat template."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tsqp.errors import WeightsError
from tsqp.model.tokenizer import Tokenizer
from tsqp.serve.chat_template import ChatTemplate
from tsqp.serve.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a server knows of its model.

    Attributes:
        name: what clients call it.
        level: the protection level that the engine runs at.
        vocabulary: text to ids and back.
        template: of chats; None where the model has none.
        created: seconds since 1970, for ``/v1/models``.
    """

    name: str
    level: str
    vocabulary: Vocabulary
    template: ChatTemplate | None = None
    created: int = field(default_factory=lambda: int(time.time()))


def served(tokenizer: Tokenizer | None, size: int, name: str, level: str) -> ServedModel:
    """Return what a server needs of a model.

    Args:
        tokenizer: the model's, with its chat template.
        size: how many token ids the model has.
        name: what clients call the model.
        level: that the engine runs at.

    Raises:
        WeightsError: there is no tokenizer, or the template is malformed.
    """
    if tokenizer is None:
        raise WeightsError(f"{name} has no tokenizer.json: a model without one cannot be served.")
    own = tokenizer.conventions
    template = ChatTemplate(own.chat_template, own.named) if own.chat_template else None
    return ServedModel(name=name, level=level, vocabulary=Vocabulary(tokenizer, size), template=template)
