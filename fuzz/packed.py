"""Packed models: one file of one is the input's. The manifest is made to agree with it, so that its content is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
from functools import cache
from pathlib import Path

import torch

from fuzz import models
from fuzz.files import changed_json, changed_safetensors
from tsqp.errors import SetupError
from tsqp.model.packed import open_codes, open_enclave
from tsqp.model.tensor_file import read_header, read_tensor, tensors_in

_FILES = (
    "enclave/manifest.json",
    "enclave/config.json",
    "enclave/state.safetensors",
    "enclave/embedding.safetensors",
    "worker/layer-00000.safetensors",
    "worker/head.safetensors",
)
_MANIFEST = _FILES[0]


def run(data: bytes) -> None:
    """Put the input in place of the file that its first byte names, and read the model as both sides do."""
    name, content = _FILES[data[0] % len(_FILES) if data else 0], data[1:]
    directory, original = _directory(), models.packed() / name
    path = directory / name
    path.write_bytes(content)
    try:
        if name.startswith("enclave/"):
            if name != _MANIFEST:
                _sign(directory, path)
            with contextlib.suppress(SetupError):
                open_enclave(directory)
        else:
            _read_codes(directory)
        if name.endswith(".safetensors"):
            _read_tensors(path, content)
    finally:
        shutil.copyfile(original, path)
        shutil.copyfile(models.packed() / _MANIFEST, directory / _MANIFEST)


@cache
def _directory() -> Path:
    return Path(shutil.copytree(models.packed(), models.scratch() / "changed"))


def _sign(directory: Path, path: Path) -> None:
    manifest = json.loads((directory / _MANIFEST).read_bytes())
    manifest["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (directory / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _read_codes(directory: Path) -> None:
    with contextlib.suppress(SetupError):
        codes = open_codes(directory)
        for group in codes.groups:
            codes.read(group.name)


def _read_tensors(path: Path, content: bytes) -> None:
    with contextlib.suppress(SetupError):
        for place in read_header(path).tensors.values():
            read_tensor(path, place)
    with contextlib.suppress(SetupError):
        tensors_in(torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8), path)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change one place of the file's JSON."""
    name = _FILES[data[0] % len(_FILES) if data else 0]
    change = changed_json if name.endswith(".json") else changed_safetensors
    return data[:1] + change(data[1:], rng)


def seeds() -> dict[str, bytes]:
    """Return the files of a packed model."""
    return {
        Path(name).name.partition(".")[0]: bytes([place]) + (models.packed() / name).read_bytes()
        for place, name in enumerate(_FILES)
    }
