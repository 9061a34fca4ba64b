"""What a packed model consists of: its manifest, its digests, and where its two sides lie (docs/packed-model.md)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal, Protocol

import msgspec
from msgspec import Meta, Struct

from tsqp.errors import WeightsError
from tsqp.model.architecture import LinearGroup
from tsqp.model.reading import reading
from tsqp.model.tensor_file import read_small

FORMAT: Final = "tsqp-packed-1"
WORKER, ENCLAVE = "worker", "enclave"
MANIFEST, CONFIG, TOKENIZER = "manifest.json", "config.json", "tokenizer.json"
STATE, EMBEDDING, HEAD = "state.safetensors", "embedding.safetensors", "head.safetensors"
# Of a linear map (model/linear_map.py): all its codes.
CODES: Final = "codes.safetensors"
WEIGHTS_RULE: Final = "int8, symmetric, one scale per output channel"
ACTIVATIONS_RULE: Final = "one scale per token, ||x|| B / (2^31-1 - B sqrt(K)/2)"

_CODES_FORMAT: Final = "tsqp-codes-1"
_MAX_SHOWN = 64
MAX_JSON_BYTES = 1 << 24
MAX_CODE = 127

Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Size = Annotated[int, Meta(ge=1, le=1 << 40)]
Name = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"\A[^\x00-\x1f\x7f]+\Z")]
JSON_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class PackedGroup(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One linear group: its codes' shape and SHA-256, and B, the largest Euclidean norm of their rows."""

    name: Name
    rows: Size
    in_features: Size
    sha256: Sha256
    largest_norm: Annotated[float, Meta(ge=0)]


class Quantisation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How numbers became integers; this version knows one way."""

    weights: Literal["int8, symmetric, one scale per output channel"] = WEIGHTS_RULE
    activations: Literal["one scale per token, ||x|| B / (2^31-1 - B sqrt(K)/2)"] = ACTIVATIONS_RULE


class CodesManifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What any model in int8 consists of: its name, where it came from, and the groups of its codes in order."""

    model: Name
    source_digest: Sha256
    quantisation: Quantisation
    groups: Annotated[tuple[PackedGroup, ...], Meta(min_length=1)]

    def __post_init__(self) -> None:
        """Check what types cannot say; msgspec turns a ValueError into a ValidationError while decoding."""
        for group in self.groups:
            # B of the largest codes, and the rounding up of ``largest_norm``.
            if group.largest_norm > MAX_CODE * math.sqrt(group.in_features) * (1 + 1e-15):
                raise ValueError(f"largest_norm of {group.name} is above what {group.in_features} codes can have")

    @property
    def codes_digest(self) -> str:
        """SHA-256 over all codes: what a worker announces of its own, 64 hexadecimal digits."""
        return codes_digest((group.name, group.rows, group.in_features, group.sha256) for group in self.groups)

    @property
    def digest(self) -> str:
        """SHA-256 of the whole manifest in canonical JSON: what a measurement or a report binds."""
        text = json.dumps(msgspec.to_builtins(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Manifest(CodesManifest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``enclave/manifest.json``: what a packed model consists of.

    ``groups`` follow ``architecture.linear_groups``; ``files`` gives the SHA-256 of every other file in ``enclave/``;
    ``source_digest`` is the model digest of the float weights.
    """

    files: dict[Name, Sha256]
    format: Literal["tsqp-packed-1"] = FORMAT

    def __post_init__(self) -> None:
        """Check what types cannot say, of the files too."""
        super().__post_init__()
        for name in self.files:
            if Path(name).name != name or name in (MANIFEST, ".", ".."):
                raise ValueError(f"{name!r} is no file name inside {ENCLAVE}/")
        for name in (CONFIG, STATE, EMBEDDING):
            if name not in self.files:
                raise ValueError(f"{name} is not among its files")


class CodedModel(Protocol):
    """What the enclave needs to know of a model whose codes a worker has."""

    @property
    def manifest(self) -> CodesManifest:
        """Digests and norms of the codes."""

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linear groups, in the manifest's order."""


def codes_digest(groups: Iterable[tuple[str, int, int, str]]) -> str:
    """Return the digest of a model's codes, 64 hexadecimal digits.

    Args:
        groups: name, rows, in_features and SHA-256 of each group, in the order of ``linear_groups``.
    """
    total = hashlib.sha256(f"{_CODES_FORMAT}\n".encode())
    for name, rows, in_features, sha256 in groups:
        total.update(f"{name} {rows} {in_features} {sha256}\n".encode())
    return total.hexdigest()


def is_packed(directory: Path) -> bool:
    """Tell whether a directory is a packed model or a linear map, or one side of it: ``enclave/`` or ``worker/``."""
    with reading(directory):
        if (directory / ENCLAVE / MANIFEST).is_file() or any((directory / WORKER).glob("*.safetensors")):
            return True
        if (directory / MANIFEST).is_file() and (directory / STATE).is_file():
            return True
        found = (directory / HEAD).is_file() or (directory / CODES).is_file()
        return found and not (directory / CONFIG).exists()


def enclave_directory(directory: Path) -> Path:
    """Return the ``enclave/`` of a packed model; ``directory`` may be that folder itself.

    Raises:
        WeightsError: there is none.
    """
    with reading(directory):
        for candidate in (directory / ENCLAVE, directory):
            if (candidate / MANIFEST).is_file():
                return candidate
    raise WeightsError(
        f"{directory} has no {ENCLAVE}/{MANIFEST}: expected the directory that 'tsqp pack' wrote, or its {ENCLAVE}/."
    )


def read_manifest(directory: Path) -> Manifest:
    """Read and validate the manifest of a packed model.

    Args:
        directory: the packed model, or its ``enclave/``.

    Raises:
        WeightsError: it is missing, malformed, or of another format version.
    """
    path = enclave_directory(directory) / MANIFEST
    raw = read_small(path, MAX_JSON_BYTES)[0]
    try:
        found = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("format", b"null")
        version = msgspec.json.decode(found)
        if version != FORMAT:
            shown = repr(version)[:_MAX_SHOWN]
            raise WeightsError(f"{path} is of format {shown}; this version reads {FORMAT!r}. Pack the model again.")
        return msgspec.json.decode(raw, type=Manifest)
    except JSON_ERRORS as error:
        raise WeightsError(f"{path} is not a manifest of a packed model ({error}). Pack the model again.") from error


def layer_file(index: int) -> str:
    """Name the codes file of one layer."""
    return f"layer-{index:05d}.safetensors"
