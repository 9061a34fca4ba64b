"""GGUF files, converted to a directory."""

from __future__ import annotations

import contextlib
import random
import shutil
import struct
import warnings
from functools import cache
from pathlib import Path

from fuzz import models
from tsqp.errors import SetupError
from tsqp.model.gguf import convert


def run(data: bytes) -> None:
    """Convert a file."""
    source, target = _places()
    source.write_bytes(data)
    target.mkdir()
    try:
        with contextlib.suppress(SetupError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convert(source, target, lambda _done: None)
    finally:
        shutil.rmtree(target)


@cache
def _places() -> tuple[Path, Path]:
    return models.scratch() / "model.gguf", models.scratch() / "converted"


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a number, of 32 or 64 bits, with one that is near a bound."""
    raw = bytearray(data)
    number = rng.choice((0, 1, 2, 4, 8, 9, 10, 12, 32, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 60))
    at = rng.randrange(max(1, len(raw) - 8))
    layout = rng.choice(("<I", "<Q"))
    raw[at : at + struct.calcsize(layout)] = struct.pack(layout, number & ((1 << 8 * struct.calcsize(layout)) - 1))
    return bytes(raw)


def seeds() -> dict[str, bytes]:
    """Return a tiny model."""
    from gguf import GGMLQuantizationType  # noqa: PLC0415  takes long to load
    from tiny_gguf import quantised, write_gguf  # noqa: PLC0415
    from tiny_models import tiny_reference  # noqa: PLC0415

    model = tiny_reference(**models.TINY)
    found = {}
    for kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        path = write_gguf(models.scratch() / "seed.gguf", model, quantised(model, kind))
        found[kind.name.lower()] = path.read_bytes()
    return found
