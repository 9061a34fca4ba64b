"""Looks for plaintext in recorded traffic: any window of eight words of an activation, wherever it lies in a frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hostile import Sent
from torch import Tensor

from tsqp.arith.quantize import quantize_activations
from tsqp.model import exact

WINDOW = 8
FORMS = (torch.float32, torch.float16, torch.bfloat16)
Words = npt.NDArray[np.uint64]
# Odd, so that no word is lost modulo 2^64; a chance agreement of two hashes has probability 2^-64.
_BASE = np.uint64(0x9E3779B97F4A7C15)


class Plaintext:
    """Everything that must not leave, as the enclave computes it: integers, floats and scales of every linear.

    Args:
        patch: undoes the spying.
        forms: dtypes in which to look for floats.
    """

    def __init__(self, patch: pytest.MonkeyPatch, forms: Sequence[torch.dtype] = FORMS) -> None:
        self._forms = forms
        self.integers: list[Tensor] = []
        self.floats: list[Tensor] = []
        self.scales: list[Tensor] = []
        quantize = quantize_activations

        def spying(x_MK: Tensor, largest: float) -> tuple[Tensor, Tensor]:
            xq_MK, scale_M1 = quantize(x_MK, largest)
            self.integers.append(xq_MK.clone())
            self.floats.append(x_MK.clone())
            self.scales.append(scale_M1.clone())
            return xq_MK, scale_M1

        patch.setattr(exact, "quantize_activations", spying)

    def windows(self) -> Words:
        """Hash every window of integers, and of floats in each form that a wire could carry."""
        floats = [x_MK.to(dtype) for x_MK in self.floats for dtype in self._forms]
        return np.unique(np.concatenate([_hashes(_words(rows)).ravel() for rows in (*self.integers, *floats)]))

    def found_in(self, frames: Iterable[bytes]) -> int:
        """Count the windows of frames, at every byte offset, that are windows of an activation."""
        secret = _Set(self.windows())
        return sum(secret.count(_hashes(words)) for frame in frames for words in _shifted(frame, 4))

    def scales_found_in(self, frames: Iterable[bytes]) -> int:
        """Count the places in frames that hold a token's scale as float64."""
        secret = _Set(np.unique(torch.cat([scales.flatten() for scales in self.scales]).view(torch.int64).numpy()))
        return sum(secret.count(words) for frame in frames for words in _shifted(frame, 8))


class _Set:
    """Membership in a large sorted set of 64-bit values; a table of their middle bits answers most of it."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._values: Words = values.view(np.uint64)
        self._values.sort()
        self._table = np.zeros(1 << 24, dtype=np.bool_)
        self._table[self._places(self._values)] = True

    def _places(self, values: Words) -> Words:
        return values >> np.uint64(16) & np.uint64((1 << 24) - 1)

    def count(self, values: Words) -> int:
        likely = values[self._table[self._places(values)]]
        places = np.minimum(np.searchsorted(self._values, likely), len(self._values) - 1)
        return int((self._values[places] == likely).sum())


def _words(rows: Tensor) -> npt.NDArray[np.uint32]:
    words: npt.NDArray[np.uint32] = np.frombuffer(
        rows.contiguous().view(torch.uint8).numpy().tobytes(), dtype=np.uint32
    ).reshape(len(rows), -1)
    return words


def _shifted(frame: bytes, size: int) -> list[npt.NDArray[Any]]:
    """Read a frame as words of a size in bytes, from each offset that a word can start at."""
    dtype = {4: np.uint32, 8: np.uint64}[size]
    return [np.frombuffer(frame, dtype, (len(frame) - shift) // size, shift) for shift in range(min(size, len(frame)))]


def _hashes(words: npt.NDArray[np.uint32]) -> Words:
    """Hash each window of the last axis."""
    count = max(0, words.shape[-1] - WINDOW + 1)
    wide = words.astype(np.uint64)
    total = np.zeros((*words.shape[:-1], count), dtype=np.uint64)
    for place in range(WINDOW):
        total *= _BASE
        total += wide[..., place : place + count]
    return total


def frames_of(journal: Sequence[Sent]) -> list[bytes]:
    """Return all bytes that left, headers among them."""
    return [frame for sent in journal for frame in sent.frames]


def headers_of(journal: Sequence[Sent]) -> list[dict[str, Any]]:
    """Decode headers without their schema, so that a field nobody knows of shows."""
    return [msgspec.msgpack.decode(sent.frames[0]) for sent in journal]


def _runs(ids: Sequence[int], length: int) -> list[Sequence[int]]:
    return [ids[start : start + length] for start in range(len(ids) - length + 1)]


def holds_ids(frame: bytes, ids: Sequence[int]) -> bool:
    """Tell whether token ids lie in a frame: three in a row in any usual width, or five in MessagePack.

    Ids are one byte each there, and three given bytes are found by chance in one of some hundred runs of uniform words.
    """
    forms = [np.array(run, dtype).tobytes() for run in _runs(ids, 3) for dtype in ("<i8", "<i4", "<u2")]
    forms += [b"".join(map(msgspec.msgpack.encode, run)) for run in _runs(ids, 5)]
    return any(form in frame for form in forms)
