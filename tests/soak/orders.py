"""What a serving process is told, and what it tells."""

from __future__ import annotations

from msgspec import Struct

MODEL = "soaked"


class Order(Struct, frozen=True, kw_only=True):
    """What to serve.

    Attributes:
        model: as ``tsqp serve`` takes it.
        level: of protection.
        keys: names of API keys to make.
        body_limit: bytes of a request's body.
        cache_tokens: that the cache of keys and values has room for; None takes its default.
    """

    model: str
    level: str
    keys: tuple[str, ...]
    body_limit: int = 1 << 20
    cache_tokens: int | None = None


class Ready(Struct, frozen=True, kw_only=True):
    """What is served.

    Attributes:
        host: name and port.
        keys: by name.
        context: tokens of a prompt and its answer.
        layers: of the model.
        inputs: the most of one product.
    """

    host: str
    keys: dict[str, str]
    context: int
    layers: int
    inputs: int
