"""Reads packed models (docs/packed-model.md): ``enclave/`` on the trusted side, ``worker/`` on the other.

Every byte is hashed as it is read and the hashed copy is what is used. Whether the *manifest* is the right one is for
its reader to decide: ``Manifest.digest`` is what a measurement or a report binds.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor

from tsqp.errors import WeightsError
from tsqp.model.architecture import (
    EMBEDDING_MODULE,
    LinearGroup,
    LlamaConfig,
    linear_groups,
    norm_shapes,
    parse_config,
)
from tsqp.model.manifest import (
    CONFIG,
    EMBEDDING,
    ENCLAVE,
    HEAD,
    JSON_ERRORS,
    MANIFEST,
    MAX_CODE,
    MAX_JSON_BYTES,
    STATE,
    TOKENIZER,
    WORKER,
    Manifest,
    Name,
    PackedGroup,
    Sha256,
    Size,
    codes_digest,
    enclave_directory,
    is_packed,
    layer_file,
    read_manifest,
)
from tsqp.model.tensor_file import (
    DTYPES,
    MAX_HEADER_BYTES,
    Header,
    file_digest,
    read_all,
    read_header,
    read_small,
    read_tensor,
    tensors_in,
)

__all__ = [
    "Manifest",
    "PackedEnclave",
    "PackedGroup",
    "WorkerCodes",
    "is_packed",
    "open_codes",
    "open_enclave",
    "read_manifest",
]

EMBEDDING_TENSOR = f"{EMBEDDING_MODULE}.weight"
LAYER_FILES = "layer-*.safetensors"
LAYER_PARTS = ("qkv", "o", "gate_up", "down")
_MAX_TOKENIZER_BYTES = 1 << 28
_CHECK_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PackedEnclave:
    """What the enclave keeps of a packed model, read and checked once.

    Attributes:
        directory: of config and tokenizer.
        manifest: as in the directory; compare its ``digest`` with the expected one where there is one.
        config: the model's architecture.
        state: norm weights by checkpoint name, float32.
        scales: of each group's output channels, float32, shape (N,), positive and finite.
        biases: of groups that have them, float32, shape (N,).
        embedding_VD: the embedding table in its stored float dtype.
        tokenizer_json: the checked content of tokenizer.json, where the model has one.
    """

    directory: Path
    manifest: Manifest
    config: LlamaConfig
    state: dict[str, Tensor]
    scales: dict[str, Tensor]
    biases: dict[str, Tensor]
    embedding_VD: Tensor
    tokenizer_json: bytes | None

    @property
    def largest_norms(self) -> dict[str, float]:
        """B of each group, by name."""
        return {group.name: group.largest_norm for group in self.manifest.groups}


def open_enclave(directory: Path) -> PackedEnclave:
    """Read and check the enclave's part of a packed model. Files that the manifest does not list are not looked at.

    Args:
        directory: the packed model, or its ``enclave/``.

    Raises:
        WeightsError: a file is missing, was changed, or does not fit the others.
        UnsupportedModelError: config.json asks for what TSQP does not compute.
    """
    directory = enclave_directory(directory)
    manifest = read_manifest(directory)
    config = _verified_config(directory, manifest)
    groups = linear_groups(config)
    _require_groups(manifest, groups, directory)
    state = _verified_tensors(directory, manifest, STATE, state_shapes(config))
    embedding_VD = _verified_tensors(
        directory, manifest, EMBEDDING, {EMBEDDING_TENSOR: (config.vocab_size, config.hidden_size)}
    )[EMBEDDING_TENSOR]
    scales = {group.name: state.pop(f"{group.name}.scale") for group in groups}
    for name, scale_N in scales.items():
        if not (scale_N > 0).all():
            raise WeightsError(f"{directory / STATE}: a scale of {name} is not positive; pack the model again.")
    tokenizer = None
    for name in manifest.files.keys() - {CONFIG, STATE, EMBEDDING}:
        if name == TOKENIZER:
            tokenizer, found = read_small(_existing(directory / name), _MAX_TOKENIZER_BYTES)
        else:
            found = file_digest(_existing(directory / name))
        _require_digest(manifest, directory, name, found)
    return PackedEnclave(
        directory=directory,
        manifest=manifest,
        config=config,
        scales=scales,
        biases={group.name: state.pop(f"{group.name}.bias") for group in groups if group.bias},
        state=state,
        embedding_VD=embedding_VD,
        tokenizer_json=tokenizer,
    )


def state_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name the tensors of ``state.safetensors`` with their shapes, in the order they are written."""
    shapes = norm_shapes(config)
    for group in linear_groups(config):
        shapes[f"{group.name}.scale"] = (group.rows,)
        if group.bias:
            shapes[f"{group.name}.bias"] = (group.rows,)
    return shapes


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise WeightsError(f"{path} is missing: the packed model is incomplete; copy or pack it again.")
    return path


def _require_digest(manifest: Manifest, directory: Path, name: str, found: str) -> None:
    expected = manifest.files[name]
    packed = directory.parent if directory.name == ENCLAVE else directory
    if found != expected:
        raise WeightsError(
            f"file {name} of the packed model was changed: expected sha256 {expected}, got {found}; "
            f"remove {packed} and pack the model again."
        )


def _verified_config(directory: Path, manifest: Manifest) -> LlamaConfig:
    path = _existing(directory / CONFIG)
    raw, found = read_small(path, MAX_JSON_BYTES)
    _require_digest(manifest, directory, CONFIG, found)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object.")
    return parse_config(content, str(path))


def _require_groups(manifest: Manifest, groups: tuple[LinearGroup, ...], directory: Path) -> None:
    listed = [(group.name, group.rows, group.in_features) for group in manifest.groups]
    implied = [(group.name, group.rows, group.in_features) for group in groups]
    if listed != implied:
        raise WeightsError(
            f"{directory}: {MANIFEST} lists {len(listed)} linear groups, {CONFIG} implies {len(implied)}, and they do "
            f"not agree: {ENCLAVE}/ mixes two models; pack the model again."
        )


def _verified_tensors(
    directory: Path, manifest: Manifest, name: str, shapes: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Read a file of float tensors: exactly those named, finite; float32 but for the embedding table."""
    path = _existing(directory / name)
    largest = sum(math.prod(shape) for shape in shapes.values()) * torch.float64.itemsize + MAX_HEADER_BYTES
    content, found = read_all(path, largest)
    _require_digest(manifest, directory, name, found)
    tensors = tensors_in(content, path)
    if tensors.keys() != shapes.keys():
        other = min(tensors.keys() ^ shapes.keys())
        raise WeightsError(f"{path}: tensor {other!r} is missing or does not belong there; pack the model again.")
    for tensor_name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[tensor_name]:
            raise WeightsError(
                f"{path}: tensor {tensor_name!r} has shape {list(tensor.shape)}, {CONFIG} implies "
                f"{list(shapes[tensor_name])}; pack the model again."
            )
        if tensor.dtype == torch.int8 or (tensor.dtype != torch.float32 and name != EMBEDDING):
            raise WeightsError(f"{path}: tensor {tensor_name!r} is of type {tensor.dtype}; pack the model again.")
        if not all(torch.isfinite(part).all() for part in tensor.view(-1).split(_CHECK_ELEMENTS)):
            raise WeightsError(f"{path}: tensor {tensor_name!r} has values that are infinite or not numbers.")
    return tensors


class GroupLabel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a codes file says of one group, in its metadata: enough for a worker without a config."""

    members: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=8)]
    out_features: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=8)]
    sha256: Sha256


class WorkerCodes:
    """The codes of a packed model: all that a worker has of it. Opened with ``open_codes``.

    Attributes:
        directory: of the codes files.
        groups: the linear groups in the model's order. ``bias`` is False throughout: the enclave adds biases.
    """

    def __init__(self, directory: Path, files: list[Path]) -> None:
        self.directory = directory
        self._labels: dict[str, GroupLabel] = {}
        self._files: dict[str, tuple[Path, Header]] = {}
        groups = []
        for index, path in enumerate(files):
            header = read_header(path)
            names = ("head",) if path.name == HEAD else tuple(f"layers.{index}.{part}" for part in LAYER_PARTS)
            if other := header.tensors.keys() ^ set(names):
                raise WeightsError(
                    f"{path}: tensor {min(other)!r} is missing or does not belong there; pack the model again."
                )
            for name in names:
                self._labels[name] = label = _read_label(path, header, name)
                self._files[name] = (path, header)
                in_features = header.tensors[name].shape[1]
                groups.append(LinearGroup(name, label.members, in_features, label.out_features, bias=False))
        self.groups: tuple[LinearGroup, ...] = tuple(groups)

    @property
    def codes_digest(self) -> str:
        """What the worker announces; equal to ``Manifest.codes_digest``.

        It follows from the labels, which ``read`` checks the codes against: it is true of a worker that read them all.
        """
        return codes_digest(
            (group.name, group.rows, group.in_features, self._labels[group.name].sha256) for group in self.groups
        )

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Copy one group's codes out of its file.

        Args:
            name: the group's.
            rows: consecutive ones that are wanted; by default all. The digest is of all, so the others are read too, a
                piece at a time.

        Returns:
            int8, shape (N, K), within [-127, 127].

        Raises:
            WeightsError: no such group, the codes were changed, or one is -128.
        """
        if name not in self._files:
            raise WeightsError(f"{self.directory} has no codes of {name!r}.")
        path, header = self._files[name]
        codes_NK, found = read_tensor(path, header.tensors[name], rows)
        expected = self._labels[name].sha256
        if found != expected:
            raise WeightsError(
                f"{path}: tensor {name!r} was changed: expected sha256 {expected}, got {found}; pack the model again."
            )
        if int(codes_NK.amin()) < -MAX_CODE:
            raise WeightsError(f"{path}: tensor {name!r} holds -128, which no packed model does; pack the model again.")
        return codes_NK


def _read_label(path: Path, header: Header, name: str) -> GroupLabel:
    place = header.tensors[name]
    if DTYPES[place.dtype] is not torch.int8 or len(place.shape) != 2:  # noqa: PLR2004  a matrix
        raise WeightsError(f"{path}: tensor {name!r} is {place.dtype} {list(place.shape)}; expected an int8 matrix.")
    try:
        label = msgspec.json.decode(header.metadata.get(name, ""), type=GroupLabel)
    except JSON_ERRORS as error:
        raise WeightsError(f"{path}: metadata of {name!r} are malformed ({error}); pack the model again.") from error
    if len(label.members) != len(label.out_features) or sum(label.out_features) != place.shape[0]:
        raise WeightsError(
            f"{path}: metadata of {name!r} name {len(label.members)} modules and {sum(label.out_features)} rows, "
            f"the tensor has {place.shape[0]} rows; pack the model again."
        )
    return label


def open_codes(directory: Path) -> WorkerCodes:
    """Open the worker's part of a packed model: headers only, ``WorkerCodes.read`` reads the codes.

    Args:
        directory: the packed model, or its ``worker/``.

    Raises:
        WeightsError: there is none, or a file is missing or malformed.
    """
    candidates = (directory / WORKER, directory)
    folder = next((path for path in candidates if (path / HEAD).is_file() or any(path.glob(LAYER_FILES))), None)
    if folder is None:
        raise WeightsError(
            f"{directory} has no {WORKER}/ with int8 codes: expected the directory that 'tsqp pack' wrote, or its "
            f"{WORKER}/."
        )
    layers = len(list(folder.glob(LAYER_FILES)))
    files = [folder / layer_file(index) for index in range(layers)] + [folder / HEAD]
    return WorkerCodes(folder, [_existing(path) for path in files])
