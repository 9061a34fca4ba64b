"""One fuzzed input as a kind and some messages, each of some frames, and mutations that keep that structure.

The first byte chooses what is done with the rest. Each frame has its length before it, two bytes, little-endian; the
highest bit of the length says that a new message begins. What is cut short is taken as far as it goes.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec

_NEW, _LENGTH = 0x8000, 0x7FFF
_INTEGERS = (0, 1, 2, 3, 4, 7, 8, 16, 48, 101, 255, 4096, 65535, *(1 << bits for bits in (16, 20, 24, 31, 32, 60, 62)))
_OTHERS: tuple[Any, ...] = (None, True, False, "", "x", "head", b"", b"x", [], {}, 0.5, -1, -(1 << 63), (1 << 64) - 1)
_DESCEND = 0.8

Messages = list[list[bytes]]


def pack(kind: int, messages: Messages) -> bytes:
    """Return an input."""
    parts = [bytes([kind])]
    for message in messages:
        for place, frame in enumerate(message):
            length = min(len(frame), _LENGTH)
            parts += (((_NEW if place == 0 else 0) | length).to_bytes(2, "little"), frame[:length])
    return b"".join(parts)


def unpack(data: bytes) -> tuple[int, Messages]:
    """Return an input's kind and messages; any bytes are some."""
    messages: Messages = []
    at = 1
    while at + 2 <= len(data):
        head = int.from_bytes(data[at : at + 2], "little")
        frame = data[at + 2 : at + 2 + (head & _LENGTH)]
        at += 2 + (head & _LENGTH)
        if head & _NEW or not messages:
            messages.append([])
        messages[-1].append(frame)
    return (data[0] if data else 0), messages


def changed(value: Any, rng: random.Random) -> Any:  # noqa: ANN401  whatever MessagePack or JSON holds
    """Return a decoded message with one place of it changed."""
    if isinstance(value, dict) and value:
        return _changed_map(dict(value), rng)
    if isinstance(value, list) and value:
        return _changed_list(list(value), rng)
    if isinstance(value, bool) or value is None:
        return rng.choice(_OTHERS)
    if isinstance(value, int) and rng.random() < _DESCEND:
        return rng.choice((*_INTEGERS, value + 1, value - 1, value * 2, -value))
    if isinstance(value, (str, bytes)) and value and rng.random() < _DESCEND:
        return _changed_text(value, rng)
    return rng.choice((*_OTHERS, *_INTEGERS))


def _changed_text(value: Any, rng: random.Random) -> Any:  # noqa: ANN401  str or bytes
    at = rng.randrange(len(value))
    return rng.choice((value[:at], value[at:], value + value, value * 40, value[:at] + value[at + 1 :]))


def _changed_map(value: dict[Any, Any], rng: random.Random) -> dict[Any, Any]:
    key = rng.choice(list(value))
    if rng.random() < _DESCEND:
        value[key] = changed(value[key], rng)
    elif rng.random() < 0.5:
        del value[key]
    else:
        value[rng.choice((f"{key}x", *map(str, value)))] = value[key]
    return value


def _changed_list(value: list[Any], rng: random.Random) -> list[Any]:
    at = rng.randrange(len(value))
    if rng.random() < _DESCEND:
        value[at] = changed(value[at], rng)
    elif rng.random() < 0.5:
        del value[at]
    else:
        value.insert(at, value[rng.randrange(len(value))])
    return value


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change an input's structure: a header's field, a tensor frame's size, which frames and messages there are."""
    kind, messages = unpack(data)
    if not messages:
        return data + bytes(rng.randrange(1, 8))
    message = rng.choice(messages)
    choice = rng.random()
    if choice < 0.6 and message:
        message[0] = changed_header(message[0], rng)
        if rng.random() < 0.5:
            _fit(message)
    elif choice < 0.75 and len(message) > 1:
        place = rng.randrange(1, len(message))
        message[place] = rng.choice((message[place][:-1], message[place] + b"\0", message[place] * 2, b""))
    elif choice < 0.85:
        message.insert(rng.randrange(len(message) + 1), rng.choice((b"", bytes(8), *message)))
    elif choice < 0.9:
        messages.insert(rng.randrange(len(messages) + 1), list(message))
    elif choice < 0.95:
        messages.remove(message)
    else:
        kind = rng.randrange(8)
    return pack(kind, messages)


def changed_header(header: bytes, rng: random.Random) -> bytes:
    """Change one field of a MessagePack header; one that cannot be read, or written, stays as it is."""
    try:
        return msgspec.msgpack.encode(changed(msgspec.msgpack.decode(header), rng))
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError, TypeError, ValueError):
        return header


SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1}
_MOST_FITTED = 2048


def zeros(shape: Any, element_bytes: int) -> bytes:  # noqa: ANN401  whatever a mutation made of it
    """Return a frame of a shape, all zeros; a shorter one where that is long.

    Raises:
        TypeError: the shape is none.
    """
    size = element_bytes
    for dimension in shape:
        if not isinstance(dimension, int):
            raise TypeError
        size *= dimension
    return bytes(min(max(size, 0), _MOST_FITTED))


def _fit(message: list[bytes]) -> None:
    """Give the frames the sizes that the header names, so that what comes after that check is reached."""
    try:
        header = msgspec.msgpack.decode(message[0])
        specs = [header[name] for name in ("x", "ids", "a", "b", "y") if name in header]
        message[1:] = [zeros(spec["shape"], SIZES[spec["dtype"]]) for spec in specs]
    except (msgspec.MsgspecError, UnicodeError, RecursionError, TypeError, KeyError, IndexError):
        return
