"""Reads packed models (docs/packed-model.md): ``enclave/`` on the trusted side, ``worker/`` on the other.

Every byte is hashed as it is read and the hashed copy is what is used. Whether the *manifest* is the right one is for
its reader to decide: ``Manifest.digest`` is what a measurement or a report binds.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
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
    CODES,
    CONFIG,
    EMBEDDING,
    ENCLAVE,
    HEAD,
    MANIFEST,
    MAX_CODE,
    MAX_JSON_BYTES,
    STATE,
    TOKENIZER,
    WORKER,
    Manifest,
    PackedGroup,
    codes_digest,
    enclave_directory,
    is_packed,
    layer_file,
    read_manifest,
)
from tsqp.model.stacked import StackedGroups
from tsqp.model.tensor_file import (
    MAX_HEADER_BYTES,
    Header,
    file_digest,
    read_all,
    read_header,
    read_small,
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
    def groups(self) -> tuple[LinearGroup, ...]:
        """The model's linear groups, in the manifest's order."""
        return linear_groups(self.config)

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


class WorkerCodes(StackedGroups):
    """The codes of a packed model or of a linear map: all that a worker has of it. Opened with ``open_codes``."""

    def __init__(self, directory: Path, files: list[Path]) -> None:
        headers = [(path, read_header(path)) for path in files]
        named = [(path, header, _names(path, header, index)) for index, (path, header) in enumerate(headers)]
        super().__init__(directory, named, (torch.int8,))

    @property
    def codes_digest(self) -> str:
        """What the worker announces; equal to ``Manifest.codes_digest``.

        It follows from the labels, which ``read`` checks the codes against: it is true of a worker that read them all.
        """
        return codes_digest(
            (group.name, group.rows, group.in_features, self.sha256(group.name)) for group in self.groups
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
        codes_NK = super().read(name, rows)
        if int(codes_NK.amin()) < -MAX_CODE:
            raise WeightsError(
                f"{self.path(name)}: tensor {name!r} holds -128, which no packed model does; pack the model again."
            )
        return codes_NK


def _names(path: Path, header: Header, index: int) -> tuple[str, ...]:
    """Return the names of a file's groups: a linear map's own, or what those of a LLaMA's layer are called."""
    if path.name == CODES:
        return tuple(header.tensors)
    return ("head",) if path.name == HEAD else tuple(f"layers.{index}.{part}" for part in LAYER_PARTS)


def open_codes(directory: Path) -> WorkerCodes:
    """Open the worker's part of a packed model or of a linear map: headers only, ``WorkerCodes.read`` reads the codes.

    Args:
        directory: that, or its ``worker/``.

    Raises:
        WeightsError: there is none, or a file is missing or malformed.
    """
    candidates = (directory / WORKER, directory)
    if found := next((path for path in candidates if (path / CODES).is_file()), None):
        return WorkerCodes(found, [found / CODES])
    folder = next((path for path in candidates if (path / HEAD).is_file() or any(path.glob(LAYER_FILES))), None)
    if folder is None:
        raise WeightsError(
            f"{directory} has no {WORKER}/ with int8 codes: expected the directory that 'tsqp pack' wrote, or its "
            f"{WORKER}/."
        )
    layers = len(list(folder.glob(LAYER_FILES)))
    files = [folder / layer_file(index) for index in range(layers)] + [folder / HEAD]
    return WorkerCodes(folder, [_existing(path) for path in files])
