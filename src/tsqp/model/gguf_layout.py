"""Walks a GGUF file's header before the gguf package reads it, which believes every count that it finds there.

A file of 49 bytes that announces an array of 2^40 numbers would have it collect 2^40 empty ones. Here each number and
text must lie in the file, so that what is counted is bounded by the file's size. What else may be wrong is for the
package to find.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from tsqp.errors import WeightsError
from tsqp.model.reading import reading

# GGUF's numbers of value types, and the sizes of those that have one.
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MAX_DIMENSIONS = 4
_VERSION_AT, _COUNTS_AT = 4, 8


def check_layout(source: Path) -> None:
    """Check that all that a file's header counts is there.

    Raises:
        WeightsError: it is not, or the file cannot be read.
    """
    with reading(source), source.open("rb") as file:
        if not source.stat().st_size:
            raise WeightsError(f"{source} is not a complete GGUF file (it is empty).")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                _Walk(content).header()
            except (struct.error, ValueError) as error:
                raise WeightsError(f"{source} is not a complete GGUF file ({error}).") from error


class _Walk:
    """Steps over a header; what is beyond the end raises struct.error or ValueError."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._at = _COUNTS_AT
        (version,) = struct.unpack_from("<I", content, _VERSION_AT)
        order = "<" if version & 0xFFFF else ">"  # files of the other byte order show their version in the upper half
        self._int32, self._int64 = struct.Struct(f"{order}I"), struct.Struct(f"{order}Q")

    def header(self) -> None:
        """Step over all fields and all descriptions of tensors."""
        tensors, fields = self._number(self._int64), self._number(self._int64)
        for _ in range(fields):
            self._text()
            self._value(self._number(self._int32))
        for _ in range(tensors):
            self._text()
            dimensions = self._number(self._int32)
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions; at most {_MAX_DIMENSIONS}")
            self._skip(dimensions * self._int64.size + self._int32.size + self._int64.size)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._text()
        elif kind == _ARRAY:
            self._array(self._number(self._int32), self._number(self._int64))
        else:
            self._skip(_size_of(kind))

    def _array(self, kind: int, count: int) -> None:
        if kind != _STRING:
            self._skip(count * _size_of(kind))
            return
        for _ in range(count):
            self._text()

    def _text(self) -> None:
        self._skip(self._number(self._int64))

    def _number(self, layout: struct.Struct) -> int:
        (number,) = layout.unpack_from(self._content, self._at)
        self._at += layout.size
        return int(number)

    def _skip(self, size: int) -> None:
        if size > len(self._content) - self._at:
            raise ValueError(f"{size} bytes should follow at {self._at}, the file ends before")
        self._at += size


def _size_of(kind: int) -> int:
    size = _SIZES.get(kind)
    if size is None:  # an array within an array too
        raise ValueError(f"a value of unknown type {kind}")
    return size
