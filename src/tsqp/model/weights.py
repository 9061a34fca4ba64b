"""Reads tensors of a Hugging Face directory, one at a time, from plain safetensors: no pickle, no code from the model.

Bytes are read where a file's header says, and nothing is mapped: loading holds the weights in their final form and one
tensor as it is stored, not the weights twice, also within Gramine, where a mapping is read whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from tsqp.errors import UnsupportedModelError, WeightsError
from tsqp.model.reading import reading
from tsqp.model.tensor_file import DTYPES, bytes_of

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# 16 MiB as float32; while one is quantised there are some four of them.
_BLOCK_ELEMENTS = 1 << 22
_FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}
_LENGTH_BYTES = 8
# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000
_Natural = Annotated[int, Meta(ge=0, le=1 << 62)]


class _Entry(msgspec.Struct, frozen=True):
    """One tensor in a header."""

    dtype: str
    shape: Annotated[tuple[_Natural, ...], Meta(max_length=8)]
    data_offsets: tuple[_Natural, _Natural]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and what its header says; ``dtype`` in safetensors' names (F32, BF16, ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class Checkpoint:
    """The safetensors files of one Hugging Face directory.

    Raises:
        WeightsError: a file is missing or malformed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = _weight_files(directory)
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            self.tensors.update(_read_header(file))

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that every named tensor is there with its shape and a float dtype.

        Raises:
            WeightsError: a tensor is missing or has another shape.
            UnsupportedModelError: a tensor is stored in a dtype that is not a plain float.
        """
        for name, shape in shapes.items():
            stored = self.tensors.get(name)
            if stored is None:
                raise WeightsError(
                    f"{self.directory} has no tensor {name!r}: the model is incomplete, download it again."
                )
            if stored.shape != shape:
                raise WeightsError(
                    f"{stored.file}: tensor {name!r} has shape {list(stored.shape)}, config.json implies {list(shape)}."
                )
            if stored.dtype not in _FLOAT_DTYPES:
                raise UnsupportedModelError(
                    f"{stored.file}: tensor {name!r} is stored as {stored.dtype}; "
                    f"supported: {', '.join(sorted(_FLOAT_DTYPES))}. Use the model's unquantised weights."
                )

    def read(self, name: str) -> Tensor:
        """Read one tensor, which ``require`` has named, as it is stored.

        Raises:
            WeightsError: the file cannot be read.
        """
        return self._read(name, self.tensors[name].shape, 0)

    def blocks(self, name: str, rows: range | None = None) -> Iterator[Tensor]:
        """Yield a tensor in blocks of whole rows, some 16 MB of float32 each, so that memory does not grow with it.

        Args:
            name: the tensor's.
            rows: consecutive ones of it, which alone are read; by default all.

        Raises:
            WeightsError: the file cannot be read.
        """
        stored = self.tensors[name]
        rows = range(stored.shape[0] if stored.shape else 0) if rows is None else rows
        step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(stored.shape[1:])))
        for first in range(rows.start, rows.stop, step):
            shape = (min(step, rows.stop - first), *stored.shape[1:])
            yield self._read(name, shape, first * math.prod(stored.shape[1:]))

    def _read(self, name: str, shape: tuple[int, ...], skipped: int) -> Tensor:
        stored = self.tensors[name]
        value = torch.empty(shape, dtype=DTYPES[stored.dtype])
        content = bytes_of(value)
        try:
            with stored.file.open("rb", buffering=0) as file:
                file.seek(stored.start + skipped * value.element_size())
                done = 0
                while done < len(content):
                    count = file.readinto(content[done:])
                    if not count:
                        raise WeightsError(
                            f"{stored.file}: cannot read tensor {name!r} (the file ends before it does)."
                        )
                    done += count
        except OSError as error:
            raise WeightsError(f"{stored.file}: cannot read tensor {name!r} ({error.strerror}).") from error
        return value

    def read_into(self, name: str, out: Tensor, rows: range | None = None) -> None:
        """Copy one tensor, or some rows, into ``out``, which has their shape and may have another dtype or device."""
        first = 0
        for block in self.blocks(name, rows):
            out[first : first + len(block)].copy_(block)
            first += len(block)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX_NAME
    with reading(directory):
        if not index.exists():
            single = directory / SINGLE_NAME
            if not single.exists():
                raise WeightsError(f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}: the weights are missing.")
            return [single]
        listed = index.read_bytes()
    try:
        names = sorted(set(json.loads(listed.decode())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} is not a safetensors index ({error}).") from error
    present = {entry.name for entry in directory.iterdir()}
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightsError(f"{index} names {name!r}; expected a file name inside the directory.")
        if name not in present:
            raise WeightsError(
                f"{directory} has no file {name!r}, which {INDEX_NAME} lists: the download is incomplete."
            )
        files.append(directory / name)
    return files


def _read_header(file: Path) -> dict[str, StoredTensor]:
    with reading(file), file.open("rb") as opened:
        size = file.stat().st_size
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        if not 0 < length <= min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise WeightsError(f"{file} is not a complete safetensors file (its header is not there).")
        header = opened.read(length)
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(part, type=_Entry) for name, part in raw.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(f"{file} is not a complete safetensors file ({error}).") from error
    base = _LENGTH_BYTES + length
    for name, entry in entries.items():
        start, end = entry.data_offsets
        known = DTYPES.get(entry.dtype)
        if not start <= end <= size - base or (known and end - start != math.prod(entry.shape) * known.itemsize):
            raise WeightsError(f"{file} is not a complete safetensors file (tensor {name!r} does not lie in it).")
    return {
        name: StoredTensor(file, entry.dtype, entry.shape, base + entry.data_offsets[0])
        for name, entry in entries.items()
    }
