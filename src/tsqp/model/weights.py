"""Reads tensors of a Hugging Face directory, one at a time, with plain safetensors: no pickle, no code from the model.

The file is mapped anew for every tensor and unmapped right after, so that loading holds the weights in their final
form and one tensor's file pages, not the weights twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tsqp.errors import UnsupportedModelError, WeightsError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# 16 MiB as float32; while one is quantised there are some four of them.
_BLOCK_ELEMENTS = 1 << 22
_FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and what its header says; ``dtype`` in safetensors' names (F32, BF16, ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


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
        """Map one tensor. It keeps the whole file mapped while it lives: copy from it and drop it."""
        stored = self.tensors[name]
        try:
            with safe_open(stored.file, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{stored.file}: cannot read tensor {name!r} ({error}).") from error
        return tensor

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor in blocks of whole rows, some 16 MB of float32 each, so that memory does not grow with it.

        The file is opened anew for each: pages that a mapping has touched stay as long as it does.

        Raises:
            WeightsError: the file cannot be read.
        """
        stored = self.tensors[name]
        rows = stored.shape[0] if stored.shape else 0
        step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(stored.shape[1:])))
        for first in range(0, rows, step):
            try:
                with safe_open(stored.file, framework="pt") as file:
                    block: Tensor = file.get_slice(name)[first : first + step]
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{stored.file}: cannot read tensor {name!r} ({error}).") from error
            yield block

    def read_into(self, name: str, out: Tensor) -> None:
        """Copy one tensor into ``out``, which has its shape and may have another dtype or device."""
        out.copy_(self.read(name))


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX_NAME
    if not index.exists():
        single = directory / SINGLE_NAME
        if not single.exists():
            raise WeightsError(f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}: the weights are missing.")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    tensors = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  safe_open is no mapping
                part = opened.get_slice(name)
                tensors[name] = StoredTensor(file, part.get_dtype(), tuple(part.get_shape()))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is not a complete safetensors file ({error}).") from error
    return tensors
