"""Reads files of stacked matrices: one for each linear group, with a label that says what it consists of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor

from tsqp.errors import WeightsError
from tsqp.model.architecture import LinearGroup
from tsqp.model.manifest import JSON_ERRORS, Name, Sha256, Size
from tsqp.model.tensor_file import DTYPES, Header, read_tensor

# Of linear layers that are multiplied in one call.
MAX_MEMBERS = 8


class GroupLabel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file says of one group, in its metadata: enough for a worker without a config."""

    members: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]
    out_features: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]
    sha256: Sha256


def label(group: LinearGroup, sha256: str) -> str:
    """Write the label of a group whose matrix has this SHA-256."""
    return msgspec.json.encode(
        GroupLabel(members=group.members, out_features=group.out_features, sha256=sha256)
    ).decode()


class StackedGroups:
    """Matrices of linear groups in safetensors files.

    Args:
        directory: for messages.
        files: each with its header and the names of its groups, in order.
        dtypes: what matrices may consist of.

    Attributes:
        content: what the matrices are, for messages.
        groups: the linear groups in order. ``bias`` is False throughout: the enclave adds biases.

    Raises:
        WeightsError: a file is malformed.
    """

    content = "codes"

    def __init__(
        self, directory: Path, files: Iterable[tuple[Path, Header, tuple[str, ...]]], dtypes: Iterable[torch.dtype]
    ) -> None:
        self.directory = directory
        self._labels: dict[str, GroupLabel] = {}
        self._files: dict[str, tuple[Path, Header]] = {}
        allowed, groups = tuple(dtypes), []
        for path, header, names in files:
            if other := header.tensors.keys() ^ set(names):
                raise WeightsError(
                    f"{path}: tensor {min(other)!r} is missing or does not belong there; pack the model again."
                )
            for name in names:
                self._labels[name] = found = _read_label(path, header, name, allowed)
                self._files[name] = (path, header)
                in_features = header.tensors[name].shape[1]
                groups.append(LinearGroup(name, found.members, in_features, found.out_features, bias=False))
        self.groups: tuple[LinearGroup, ...] = tuple(groups)

    def sha256(self, name: str) -> str:
        """Return what a group's label says of its matrix's bytes; ``read`` checks it."""
        return self._labels[name].sha256

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a group's matrix."""
        return DTYPES[self._files[name][1].tensors[name].dtype]

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Copy one group's matrix out of its file.

        Args:
            name: the group's.
            rows: consecutive ones that are wanted; by default all. The digest is of all, so the others are read too, a
                piece at a time.

        Returns:
            Shape (N, K), in the dtype of the file.

        Raises:
            WeightsError: no such group, or the matrix was changed.
        """
        if name not in self._files:
            raise WeightsError(f"{self.directory} has no {self.content} of {name!r}.")
        path, header = self._files[name]
        matrix_NK, found = read_tensor(path, header.tensors[name], rows)
        expected = self._labels[name].sha256
        if found != expected:
            raise WeightsError(
                f"{path}: tensor {name!r} was changed: expected sha256 {expected}, got {found}; pack the model again."
            )
        return matrix_NK

    def path(self, name: str) -> Path:
        """Return the file of a group."""
        return self._files[name][0]


def _read_label(path: Path, header: Header, name: str, allowed: tuple[torch.dtype, ...]) -> GroupLabel:
    place = header.tensors[name]
    if DTYPES[place.dtype] not in allowed or len(place.shape) != 2:  # noqa: PLR2004  a matrix
        kind = "an int8" if allowed == (torch.int8,) else "a float"
        raise WeightsError(f"{path}: tensor {name!r} is {place.dtype} {list(place.shape)}; expected {kind} matrix.")
    try:
        found = msgspec.json.decode(header.metadata.get(name, ""), type=GroupLabel)
    except JSON_ERRORS as error:
        raise WeightsError(f"{path}: metadata of {name!r} are malformed ({error}); pack the model again.") from error
    if len(found.members) != len(found.out_features) or sum(found.out_features) != place.shape[0]:
        raise WeightsError(
            f"{path}: metadata of {name!r} name {len(found.members)} modules and {sum(found.out_features)} rows, "
            f"the tensor has {place.shape[0]} rows; pack the model again."
        )
    return found
