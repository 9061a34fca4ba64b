"""What is fuzzed, by name. Each module has ``run``, ``mutated`` where bytes alone get nowhere, and ``seeds``.

``run(data)`` returns where a parser gives a value or the error that it is said to give; anything else that it raises is
a crash. ``mutated(data, rng)`` changes an input's structure. ``seeds()`` makes valid inputs, for the corpus.
"""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Protocol, cast

MODULES = {
    "codec": "fuzz.codec",
    "legacy": "fuzz.legacy",
    "worker": "fuzz.worker",
    "shm": "fuzz.shm",
    "packed": "fuzz.packed",
    "gguf": "fuzz.gguf",
    "safetensors": "fuzz.safetensors",
    "http": "fuzz.http_api",
    "quotes": "fuzz.quotes",
    "directory": "fuzz.directory",
}
HERE = Path(__file__).parent
CORPUS, CRASHES = HERE / "corpus", HERE / "crashes"


class Target(Protocol):
    """One module."""

    def run(self, data: bytes) -> None:
        """Give one input to the parser."""

    def mutated(self, data: bytes, rng: random.Random) -> bytes:
        """Return an input of another structure."""

    def seeds(self) -> dict[str, bytes]:
        """Return valid inputs by name."""


def load(name: str) -> Target:
    """Import a target."""
    return cast("Target", importlib.import_module(MODULES[name]))


def kept_inputs(name: str) -> list[Path]:
    """Return the committed inputs of a target: its corpus, and what once crashed it."""
    return sorted(path for folder in (CORPUS, CRASHES) for path in (folder / name).glob("*") if path.is_file())
