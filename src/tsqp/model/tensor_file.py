"""Reads and writes safetensors files of packed models: bytes at known places, hashed while they pass.

The ``safetensors`` package maps files and orders metadata at random. A packed model needs the opposite: what is hashed
is the copy that is used, tensors are written a block of rows at a time, and packing twice gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from tsqp.errors import WeightsError
from tsqp.model.reading import reading

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 1 << 24
_LENGTH_BYTES = 8
_CHUNK_BYTES = 1 << 24

_Size = Annotated[int, Meta(ge=1, le=1 << 40)]
_Offset = Annotated[int, Meta(ge=0, le=1 << 62)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor in a safetensors header."""

    dtype: str
    shape: Annotated[tuple[_Size, ...], Meta(max_length=8)]
    data_offsets: tuple[_Offset, _Offset]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes lie in its file, and what they mean; ``dtype`` is one of ``DTYPES``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself: its tensors in the order of their bytes, and its metadata."""

    tensors: dict[str, Place]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        WeightsError: the file cannot be read, or is not a complete safetensors file of known dtypes.
    """
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        length = _header_length(file.read(_LENGTH_BYTES), size, path)
        return _parse(file.read(length), size, path)


def _header_length(prefix: bytes, size: int, path: Path) -> int:
    length = int.from_bytes(prefix, "little")
    if len(prefix) != _LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        raise WeightsError(f"{path} is not a complete safetensors file; copy it again or pack the model again.")
    return length


def _parse(header: bytes, size: int, path: Path) -> Header:
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(raw.pop("__metadata__", b"{}"), type=dict[str, str])
        entries = {name: msgspec.json.decode(part, type=_Entry) for name, part in raw.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(f"{path} has a malformed safetensors header ({error}); pack the model again.") from error
    base = _LENGTH_BYTES + len(header)
    places = {}
    for name, entry in entries.items():
        start, end = (base + offset for offset in entry.data_offsets)
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise WeightsError(f"{path}: tensor {name!r} is of type {entry.dtype!r}; expected {', '.join(DTYPES)}.")
        if end > size or end - start != math.prod(entry.shape) * dtype.itemsize or start % dtype.itemsize:
            raise WeightsError(
                f"{path}: tensor {name!r} does not lie where its header says: the file is incomplete or damaged; "
                "copy it again or pack the model again."
            )
        places[name] = Place(entry.dtype, entry.shape, start, end)
    return Header(dict(sorted(places.items(), key=lambda item: item[1].start)), metadata)


def read_tensor(path: Path, place: Place, rows: range | None = None) -> tuple[Tensor, str]:
    """Copy one tensor out of its file, or some rows of it.

    Args:
        path: the file.
        place: where in it.
        rows: consecutive ones that are wanted; by default all. The others are read and hashed, and not kept.

    Returns:
        The rows, and the SHA-256 of the whole tensor's bytes, 64 hexadecimal digits.

    Raises:
        WeightsError: the file cannot be read or has become shorter.
    """
    before, shape = 0, place.shape
    if rows is not None:
        before, shape = rows.start * ((place.end - place.start) // shape[0]), (len(rows), *shape[1:])
    value = torch.empty(shape, dtype=DTYPES[place.dtype])
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        file.seek(place.start)
        _skip(file, before, digest, path)
        _fill(file, value.view(-1).view(torch.uint8), digest, path)
        _skip(file, place.end - file.tell(), digest, path)
    return value, digest.hexdigest()


def read_all(path: Path, limit_bytes: int) -> tuple[Tensor, str]:
    """Copy a whole file into memory.

    Args:
        path: the file.
        limit_bytes: the largest size accepted.

    Returns:
        Its bytes, uint8, shape (size,), and their SHA-256.

    Raises:
        WeightsError: it cannot be read, is empty or is larger than ``limit_bytes``.
    """
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        if not 0 < size <= limit_bytes:
            raise WeightsError(f"{path} has {size} bytes; expected 1 to {limit_bytes}. Pack the model again.")
        content, digest = torch.empty(size, dtype=torch.uint8), hashlib.sha256()
        _fill(file, content, digest, path)
        return content, digest.hexdigest()


def read_small(path: Path, limit_bytes: int) -> tuple[bytes, str]:
    """Copy a whole file into memory, as ``read_all`` does, but give its content as bytes."""
    content, digest = read_all(path, limit_bytes)
    return content.numpy().tobytes(), digest


def _fill(file: BufferedReader, out: Tensor, digest: hashlib._Hash, path: Path) -> None:
    """Read into all of ``out`` (uint8) and hash what was read."""
    for part in out.split(_CHUNK_BYTES):
        view = memoryview(part.numpy())
        if file.readinto(view) != len(view):
            raise WeightsError(f"{path} became shorter while it was read; nothing may write to a packed model.")
        digest.update(view)


def _skip(file: BufferedReader, size: int, digest: hashlib._Hash, path: Path) -> None:
    """Read and hash so many bytes, and keep none."""
    chunk = torch.empty(min(size, _CHUNK_BYTES), dtype=torch.uint8)
    while size > 0:
        part = chunk[: min(size, _CHUNK_BYTES)]
        _fill(file, part, digest, path)
        size -= len(part)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file of any size, 64 hexadecimal digits.

    Raises:
        WeightsError: it cannot be read.
    """
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def tensors_in(content: Tensor, path: Path) -> dict[str, Tensor]:
    """Give the tensors of a safetensors file that is already in memory, as views into it.

    Args:
        content: the file's bytes, uint8, one-dimensional.
        path: its name in messages.

    Raises:
        WeightsError: it is not a complete safetensors file of known dtypes.
    """
    size = len(content)
    length = _header_length(content[:_LENGTH_BYTES].numpy().tobytes(), size, path)
    header = _parse(content[_LENGTH_BYTES : _LENGTH_BYTES + length].numpy().tobytes(), size, path)
    return {
        name: content[place.start : place.end].view(DTYPES[place.dtype]).view(place.shape)
        for name, place in header.tensors.items()
    }


def bytes_of(value: Tensor) -> memoryview:
    """View a tensor's bytes, in the order they have in a file."""
    view: memoryview = value.contiguous().view(-1).view(torch.uint8).numpy().data
    return view


class TensorFileWriter:
    """Writes one safetensors file block by block: declare all tensors, append their bytes in that order, finish.

    The header is written last, into room kept for it, since it may name digests that are known only then; it must
    therefore have the length that ``metadata`` promised.

    Args:
        path: the file to create.
        tensors: dtype and shape by name, in the order of their bytes.
        metadata: texts of the final length.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self._entries: dict[str, object] = {}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            end = offset + math.prod(shape) * dtype.itemsize
            self._entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
            offset = end
        self._metadata = dict(metadata)
        self._room = len(self._header())
        self._file = path.open("xb")
        self._file.seek(self._room)

    def _header(self) -> bytes:
        content = {"__metadata__": self._metadata, **self._entries} if self._metadata else self._entries
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text

    def __enter__(self) -> TensorFileWriter:  # noqa: PYI034  typing.Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, block: Tensor) -> None:
        """Write the next bytes."""
        self._file.write(bytes_of(block))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header.

        Raises:
            ValueError: the header is not as long as promised.
        """
        self._metadata = dict(metadata)
        header = self._header()
        if len(header) != self._room:
            raise ValueError(f"the header has {len(header)} bytes, room was kept for {self._room}.")
        self._file.seek(0)
        self._file.write(header)
