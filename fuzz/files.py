"""What targets that read model files share: JSON with one place changed, safetensors files with such headers."""

from __future__ import annotations

import json
import random

from fuzz import framing

_LENGTH_BYTES = 8


def changed_json(raw: bytes, rng: random.Random) -> bytes:
    """Change one place of a JSON text; what is none stays as it is."""
    try:
        return json.dumps(framing.changed(json.loads(raw), rng), default=repr).encode()
    except (ValueError, RecursionError, OverflowError, TypeError):
        return raw


def changed_safetensors(raw: bytes, rng: random.Random) -> bytes:
    """Change one place of a safetensors file's header, and most of the time its length with it."""
    length = int.from_bytes(raw[:_LENGTH_BYTES], "little")
    header = changed_json(raw[_LENGTH_BYTES : _LENGTH_BYTES + length], rng)
    told = len(header) if rng.random() < 0.9 else rng.choice((0, length, 1 << 24, (1 << 64) - 1))
    return told.to_bytes(_LENGTH_BYTES, "little") + header + raw[_LENGTH_BYTES + length :]
