"""Linear maps: the linear layers of any model, named by their modules' paths, and nothing else of it.

    worker/codes.safetensors     int8 codes: for a worker at `verified` and `masked`, and for dealers
    floats/weights.safetensors   the weights, in the model's own dtype: for a worker at `open`, and to give them back
    enclave/linears.json         the manifest; enclave/scales.safetensors: of the codes' output channels

docs/any-decoder.md has the details. Matrices pass through in blocks of rows; the rules of packed models hold here too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from tsqp.arith.quantize import largest_norm, quantize_weights
from tsqp.errors import WeightsError
from tsqp.model.architecture import LinearGroup
from tsqp.model.manifest import (
    CODES,
    ENCLAVE,
    JSON_ERRORS,
    MAX_JSON_BYTES,
    WORKER,
    CodesManifest,
    PackedGroup,
    Quantisation,
    Sha256,
)
from tsqp.model.pack import NO_DIGEST, new_directory, printable_name
from tsqp.model.stacked import StackedGroups, label
from tsqp.model.tensor_file import (
    DTYPE_NAMES,
    MAX_HEADER_BYTES,
    TensorFileWriter,
    bytes_of,
    file_digest,
    read_all,
    read_header,
    read_small,
    tensors_in,
)

FORMAT: Final = "tsqp-linear-map-1"
FLOATS, WEIGHTS, MANIFEST, SCALES = "floats", "weights.safetensors", "linears.json", "scales.safetensors"
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FLOATS_FORMAT: Final = "tsqp-floats-1"
_BLOCK_ELEMENTS = 1 << 22


class GroupWeights(NamedTuple):
    """A linear group and the float weights of its members, each (N_i, K), all of one dtype."""

    group: LinearGroup
    weights: tuple[Tensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Their dtype."""
        return self.weights[0].dtype

    def blocks(self) -> Iterator[Tensor]:
        """Yield the stacked matrix in blocks of rows, contiguous."""
        rows = max(1, _BLOCK_ELEMENTS // self.group.in_features)
        for weight_NK in self.weights:
            for block_RK in weight_NK.detach().split(rows):
                yield block_RK.contiguous()


class MapManifest(CodesManifest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``enclave/linears.json``: what a linear map consists of; ``source_digest`` is its ``floats_digest``."""

    scales_sha256: Sha256
    format: Literal["tsqp-linear-map-1"] = FORMAT


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """What the enclave keeps of a linear map's codes.

    Attributes:
        manifest: digests and norms.
        groups: the linear groups in order.
        scales: of each group's output channels, float32, shape (N,).
        biases: none: whoever takes a product adds the module's own.
    """

    manifest: MapManifest
    groups: tuple[LinearGroup, ...]
    scales: dict[str, Tensor]
    biases: dict[str, Tensor] = field(default_factory=dict)

    @property
    def largest_norms(self) -> dict[str, float]:
        """B of each group, by name."""
        return {group.name: group.largest_norm for group in self.manifest.groups}


class FloatWeights(StackedGroups):
    """The float weights of a linear map. Opened with ``open_floats``."""

    content = "weights"

    def __init__(self, directory: Path) -> None:
        path = directory / WEIGHTS
        header = read_header(path)
        super().__init__(directory, [(path, header, tuple(header.tensors))], FLOAT_DTYPES)

    @property
    def digest(self) -> str:
        """What a worker announces that has read them all; equal to ``floats_digest``."""
        return _digest((group, DTYPE_NAMES[self.dtype(group.name)], self.sha256(group.name)) for group in self.groups)


def is_floats(directory: Path) -> bool:
    """Tell whether a directory is the ``floats/`` of a linear map."""
    return (directory / WEIGHTS).is_file()


def open_floats(directory: Path) -> FloatWeights:
    """Open the float weights of a linear map: headers only, ``FloatWeights.read`` reads the weights.

    Args:
        directory: the linear map, or its ``floats/``.

    Raises:
        WeightsError: there are none, or the file is malformed.
    """
    for candidate in (directory / FLOATS, directory):
        if is_floats(candidate):
            return FloatWeights(candidate)
    raise WeightsError(f"{directory} has no {FLOATS}/{WEIGHTS}: expected the directory that tsqp.export wrote.")


def floats_digest(matrices: Iterable[GroupWeights]) -> str:
    """Return the digest of weights as they are: dtypes, shapes and every bit, 64 hexadecimal digits."""
    return _digest((each.group, DTYPE_NAMES[each.dtype], _sha256(each.blocks())) for each in matrices)


def _digest(parts: Iterable[tuple[LinearGroup, str, str]]) -> str:
    total = hashlib.sha256(f"{_FLOATS_FORMAT}\n".encode())
    for group, dtype, sha256 in parts:
        members = " ".join(f"{name}:{rows}" for name, rows in zip(group.members, group.out_features, strict=True))
        total.update(f"{group.name} {group.in_features} {members} {dtype} {sha256}\n".encode())
    return total.hexdigest()


def _sha256(blocks: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(bytes_of(block))
    return digest.hexdigest()


def write_map(
    matrices: Sequence[GroupWeights],
    name: str,
    out: Path,
    on_progress: Callable[[float], None] = lambda _done: None,
) -> MapManifest:
    """Write a linear map; ``out`` is complete or absent.

    Args:
        matrices: the groups, in the order in which a forward pass uses them.
        name: what the manifest calls the model.
        out: the directory to create.
        on_progress: called with the fraction done.

    Raises:
        SetupError: ``out`` exists or cannot be written.
        WeightsError: a weight is infinite or not a number.
    """
    count = _counting(matrices, 2, on_progress)
    with new_directory(out, "linear map") as target:
        for folder in (WORKER, FLOATS, ENCLAVE):
            (target / folder).mkdir()
        source = _write_floats(matrices, target / FLOATS / WEIGHTS, count)
        groups, scales = _write_codes(matrices, target / WORKER / CODES, count)
        scales_path = target / ENCLAVE / SCALES
        with TensorFileWriter(
            scales_path, {name: (torch.float32, tuple(scale.shape)) for name, scale in scales.items()}, {}
        ) as file:
            for scale_N in scales.values():
                file.append(scale_N)
            file.finish({})
        manifest = MapManifest(
            model=printable_name(name),
            source_digest=source,
            quantisation=Quantisation(),
            groups=tuple(groups),
            scales_sha256=file_digest(scales_path),
        )
        text = json.dumps(msgspec.to_builtins(manifest), indent=1)
        (target / ENCLAVE / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def write_floats(
    matrices: Sequence[GroupWeights], out: Path, on_progress: Callable[[float], None] = lambda _done: None
) -> str:
    """Write a linear map's float weights alone, for a worker at `open`; return their digest.

    Args and errors are those of ``write_map``.
    """
    with new_directory(out, "linear map") as target:
        (target / FLOATS).mkdir()
        return _write_floats(matrices, target / FLOATS / WEIGHTS, _counting(matrices, 1, on_progress))


def _counting(
    matrices: Sequence[GroupWeights], times: int, on_progress: Callable[[float], None]
) -> Callable[[Tensor], None]:
    """Return what is told of every block that is done, where each passes so many times."""
    total = times * sum(each.group.rows * each.group.in_features for each in matrices)
    done = 0

    def count(block: Tensor) -> None:
        nonlocal done
        done += block.numel()
        on_progress(done / total)

    return count


def _write_floats(matrices: Sequence[GroupWeights], path: Path, count: Callable[[Tensor], None]) -> str:
    shapes = {each.group.name: (each.dtype, (each.group.rows, each.group.in_features)) for each in matrices}
    sums = []
    with TensorFileWriter(path, shapes, {each.group.name: label(each.group, NO_DIGEST) for each in matrices}) as file:
        for each in matrices:
            digest = hashlib.sha256()
            for block in each.blocks():
                digest.update(bytes_of(block))
                file.append(block)
                count(block)
            sums.append(digest.hexdigest())
        labels = {each.group.name: label(each.group, sha256) for each, sha256 in zip(matrices, sums, strict=True)}
        file.finish(labels)
    return _digest((each.group, DTYPE_NAMES[each.dtype], sha256) for each, sha256 in zip(matrices, sums, strict=True))


def _write_codes(
    matrices: Sequence[GroupWeights], path: Path, count: Callable[[Tensor], None]
) -> tuple[list[PackedGroup], dict[str, Tensor]]:
    shapes = {each.group.name: (torch.int8, (each.group.rows, each.group.in_features)) for each in matrices}
    groups, scales = [], {}
    with TensorFileWriter(path, shapes, {each.group.name: label(each.group, NO_DIGEST) for each in matrices}) as file:
        for each in matrices:
            digest, largest, parts = hashlib.sha256(), 0.0, []
            for block in each.blocks():
                codes_RK, scale_R = _quantized(each.group.name, block)
                digest.update(bytes_of(codes_RK))
                file.append(codes_RK)
                largest = max(largest, largest_norm(codes_RK))
                parts.append(scale_R)
                count(block)
            scales[each.group.name] = torch.cat(parts)
            groups.append(
                PackedGroup(
                    name=each.group.name,
                    rows=each.group.rows,
                    in_features=each.group.in_features,
                    sha256=digest.hexdigest(),
                    largest_norm=largest,
                )
            )
        file.finish(
            {each.group.name: label(each.group, done.sha256) for each, done in zip(matrices, groups, strict=True)}
        )
    return groups, scales


def _quantized(name: str, block_RK: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return quantize_weights(block_RK)
    except WeightsError as error:
        raise WeightsError(f"linear group {name}: {error}") from error


def open_map(directory: Path, groups: tuple[LinearGroup, ...]) -> LinearMap:
    """Read and check the enclave's part of a linear map.

    Args:
        directory: what ``write_map`` wrote.
        groups: those of the model it is for.

    Raises:
        WeightsError: a file is missing or malformed, was changed, or is of another model.
    """
    folder = directory / ENCLAVE
    path = folder / MANIFEST
    if not path.is_file():
        raise WeightsError(f"{directory} has no {ENCLAVE}/{MANIFEST}: expected the directory that tsqp.export wrote.")
    try:
        manifest = msgspec.json.decode(read_small(path, MAX_JSON_BYTES)[0], type=MapManifest)
    except JSON_ERRORS as error:
        raise WeightsError(f"{path} is not a manifest of a linear map ({error}). Export the model again.") from error
    listed = [(group.name, group.rows, group.in_features) for group in manifest.groups]
    if listed != [(group.name, group.rows, group.in_features) for group in groups]:
        raise WeightsError(
            f"{directory} lists {len(listed)} linear groups that are not the model's {len(groups)}: it was exported "
            "from another model, or by another version. Export the model again."
        )
    return LinearMap(manifest=manifest, groups=groups, scales=_read_scales(folder / SCALES, manifest))


def _read_scales(path: Path, manifest: MapManifest) -> dict[str, Tensor]:
    shapes = {group.name: (group.rows,) for group in manifest.groups}
    largest = sum(math.prod(shape) for shape in shapes.values()) * torch.float32.itemsize + MAX_HEADER_BYTES
    content, found = read_all(path, largest)
    if found != manifest.scales_sha256:
        raise WeightsError(
            f"{path} was changed: expected sha256 {manifest.scales_sha256}, got {found}. Export the model again."
        )
    scales = tensors_in(content, path)
    if {name: (tuple(scale.shape), scale.dtype) for name, scale in scales.items()} != {
        name: (shape, torch.float32) for name, shape in shapes.items()
    }:
        raise WeightsError(f"{path} does not hold the scales of its manifest's groups. Export the model again.")
    if not all((torch.isfinite(scale_N) & (scale_N > 0)).all() for scale_N in scales.values()):
        raise WeightsError(f"{path}: a scale is not a positive number. Export the model again.")
    return scales
