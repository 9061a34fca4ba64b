"""Pads answers to few sizes: encryption hides what a record says but not how long it is, and tokens have lengths."""

from __future__ import annotations

EVENT_BYTES = 512
BODY_BYTES = 1024
_COMMENT_BYTES = 2


def bucket(size: int, smallest: int) -> int:
    """Return the smallest power of two times ``smallest`` that is at least ``size``."""
    target = smallest
    while target < size:
        target *= 2
    return target


def event(data: bytes, *, padded: bool) -> bytes:
    """Return one server-sent event; padding is a comment line before it, which every client skips."""
    content = b"data: " + data + b"\n\n"
    if not padded:
        return content
    spare = bucket(len(content) + _COMMENT_BYTES, EVENT_BYTES) - len(content) - _COMMENT_BYTES
    return b":" + b"0" * spare + b"\n" + content


def body(data: bytes, *, padded: bool) -> bytes:
    """Return a JSON text; padding is white space after it."""
    return data + b" " * (bucket(len(data), BODY_BYTES) - len(data)) if padded else data
