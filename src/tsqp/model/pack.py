"""Writes packed models (docs/packed-model.md): int8 codes for the worker, everything else for the enclave.

Matrices pass through in blocks of rows, so that memory is bounded whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from tsqp.arith.quantize import largest_norm, quantize_weights
from tsqp.errors import SetupError, WeightsError
from tsqp.model.architecture import LinearGroup, LlamaConfig, linear_groups, norm_shapes, read_config, weight_shapes
from tsqp.model.digest import model_digest
from tsqp.model.manifest import (
    CONFIG,
    EMBEDDING,
    ENCLAVE,
    HEAD,
    MANIFEST,
    STATE,
    WORKER,
    Manifest,
    PackedGroup,
    Quantisation,
    layer_file,
)
from tsqp.model.packed import EMBEDDING_TENSOR, LAYER_PARTS, state_shapes
from tsqp.model.stacked import label
from tsqp.model.tensor_file import TensorFileWriter, bytes_of, file_digest
from tsqp.model.weights import INDEX_NAME, Checkpoint

# Raise it when the packer writes something else for the same model; the cache then packs anew.
PACKER_VERSION = 1

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
_LICENCE_STEMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")

# Keeps room for the digest of what is still to be written.
NO_DIGEST = "0" * 64
_DIGEST_SHARE = 0.3
_MAX_NAME = 256


def pack(
    source: Path,
    name: str,
    out: Path,
    on_progress: Callable[[float], None] = lambda _: None,
    *,
    licences: Path | None = None,
) -> Manifest:
    """Write the packed form of a model; ``out`` is complete or absent.

    Args:
        source: a Hugging Face directory (``locate``).
        name: what the manifest calls the model.
        out: the directory to create; its parents are made.
        on_progress: called with the fraction done.
        licences: a further directory to look for licence files in: that of a GGUF file.

    Raises:
        SetupError: ``out`` exists or cannot be written; what was written is removed.
        WeightsError: the model is incomplete or damaged.
        UnsupportedModelError: TSQP does not run the model.
    """
    with new_directory(out, "packed model") as target:
        (target / WORKER).mkdir()
        (target / ENCLAVE).mkdir()
        return _Packer(source, target, on_progress).run(name, licences)


@contextmanager
def new_directory(out: Path, what: str) -> Iterator[Path]:
    """Yield a directory to write to, which becomes ``out`` at the end of a ``with`` block, complete or absent.

    Raises:
        SetupError: ``out`` exists or cannot be written; what was written is removed.
    """
    refuse_existing(out)
    partial = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        # Made inside, so that it has the permissions any directory gets; mkdtemp's own are for this user alone.
        target = partial / "packed"
        target.mkdir()
        yield target
        refuse_existing(out)
        target.rename(out)
    except OSError as error:
        raise SetupError(f"cannot write the {what} to {out}: {error.strerror or error}.") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Raise SetupError where there is anything of that name, a dangling link included."""
    if os.path.lexists(out):
        raise SetupError(f"{out} exists already; remove it or choose another --out.")


def licence_files(*directories: Path | None) -> list[Path]:
    """List the licence files of a model, the first of each name.

    Raises:
        WeightsError: a directory cannot be listed.
    """
    found: dict[str, Path] = {}
    for directory in filter(None, directories):
        try:
            names = sorted(path.name for path in directory.iterdir())
        except OSError as error:
            raise WeightsError(f"cannot list {directory}: {error.strerror}.") from error
        for name in names:
            if name.upper().startswith(_LICENCE_STEMS) and name.isprintable() and (directory / name).is_file():
                found.setdefault(name, directory / name)
    return list(found.values())


def source_files(source: Path, licences: Path | None = None) -> list[Path]:
    """List every file that packing reads: when one changes, the packed model is another.

    Raises:
        WeightsError: the weights are missing or malformed.
    """
    small = [source / name for name in (CONFIG, INDEX_NAME, *TOKENIZER_FILES)]
    return [*Checkpoint(source).files, *filter(Path.is_file, small), *licence_files(source, licences)]


class _Packer:
    """One run of ``pack``, into the existing directories ``target``/worker and ``target``/enclave."""

    def __init__(self, source: Path, target: Path, on_progress: Callable[[float], None]) -> None:
        self.source, self.worker, self.enclave = source, target / WORKER, target / ENCLAVE
        self.config: LlamaConfig = read_config(source)
        self.checkpoint = Checkpoint(source)
        self.shapes = weight_shapes(self.config)
        self.checkpoint.require(self.shapes)
        self.state: dict[str, Tensor] = {}
        self._on_progress = on_progress
        self._done = 0
        self._total = sum(group.rows * group.in_features for group in linear_groups(self.config))
        self._total += self.config.vocab_size * self.config.hidden_size

    def run(self, name: str, licences: Path | None) -> Manifest:
        digest = model_digest(
            self.config, self.checkpoint, lambda fraction: self._on_progress(_DIGEST_SHARE * fraction)
        )
        groups = self._write_worker()
        self._write_enclave(licences)
        manifest = Manifest(
            model=printable_name(name),
            source_digest=digest,
            quantisation=Quantisation(),
            groups=tuple(groups),
            files={path.name: file_digest(path) for path in sorted(self.enclave.iterdir())},
        )
        text = json.dumps(msgspec.to_builtins(manifest), indent=1)
        (self.enclave / MANIFEST).write_text(text + "\n", encoding="utf-8")
        self._on_progress(1.0)
        return manifest

    def _write_worker(self) -> list[PackedGroup]:
        *layers, head = linear_groups(self.config)
        groups: list[PackedGroup] = []
        for index in range(self.config.layers):
            start = index * len(LAYER_PARTS)
            groups += self._write_codes(self.worker / layer_file(index), layers[start : start + len(LAYER_PARTS)])
        return [*groups, *self._write_codes(self.worker / HEAD, [head])]

    def _write_codes(self, path: Path, groups: list[LinearGroup]) -> list[PackedGroup]:
        shapes = {group.name: (torch.int8, (group.rows, group.in_features)) for group in groups}
        with TensorFileWriter(path, shapes, {group.name: label(group, NO_DIGEST) for group in groups}) as file:
            packed = [self._write_group(group, file) for group in groups]
            file.finish({group.name: label(group, done.sha256) for group, done in zip(groups, packed, strict=True)})
        return packed

    def _write_group(self, group: LinearGroup, file: TensorFileWriter) -> PackedGroup:
        digest, largest, scales = hashlib.sha256(), 0.0, []
        for member in group.members:
            tied = group.name == "head" and self.config.tied_head
            name = EMBEDDING_TENSOR if tied else f"{member}.weight"
            for block_NK in self._blocks(name):
                codes_NK, scale_N = self._quantize(name, block_NK)
                digest.update(bytes_of(codes_NK))
                file.append(codes_NK)
                largest = max(largest, largest_norm(codes_NK))
                scales.append(scale_N)
        self.state[f"{group.name}.scale"] = torch.cat(scales)
        if group.bias:
            self.state[f"{group.name}.bias"] = torch.cat([self._float(f"{member}.bias") for member in group.members])
        return PackedGroup(
            name=group.name,
            rows=group.rows,
            in_features=group.in_features,
            sha256=digest.hexdigest(),
            largest_norm=largest,
        )

    def _quantize(self, name: str, block_NK: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return quantize_weights(block_NK)
        except WeightsError as error:
            raise WeightsError(f"{self.checkpoint.tensors[name].file}: tensor {name!r}: {error}") from error

    def _write_enclave(self, licences: Path | None) -> None:
        for name in norm_shapes(self.config):
            self.state[name] = self._float(name)
        order = state_shapes(self.config)
        with TensorFileWriter(
            self.enclave / STATE, {name: (torch.float32, shape) for name, shape in order.items()}, {}
        ) as file:
            for name in order:
                file.append(self.state[name])
            file.finish({})
        self._write_embedding()
        for path in filter(Path.is_file, (self.source / name for name in (CONFIG, *TOKENIZER_FILES))):
            shutil.copyfile(path, self.enclave / path.name)
        for path in licence_files(self.source, licences):
            shutil.copyfile(path, self.enclave / path.name)

    def _write_embedding(self) -> None:
        dtype = next(self.checkpoint.blocks(EMBEDDING_TENSOR)).dtype
        tensors = {EMBEDDING_TENSOR: (dtype, self.shapes[EMBEDDING_TENSOR])}
        with TensorFileWriter(self.enclave / EMBEDDING, tensors, {}) as file:
            for block_VD in self._blocks(EMBEDDING_TENSOR):
                self._require_finite(EMBEDDING_TENSOR, block_VD)
                file.append(block_VD)
            file.finish({})

    def _float(self, name: str) -> Tensor:
        """Copy a vector as float32."""
        value = self.checkpoint.read(name).to(torch.float32, copy=True)
        self._require_finite(name, value)
        return value

    def _require_finite(self, name: str, value: Tensor) -> None:
        if not torch.isfinite(value).all():
            raise WeightsError(
                f"{self.checkpoint.tensors[name].file}: tensor {name!r}: a value is infinite or not a number; "
                "the model's file is damaged."
            )

    def _blocks(self, name: str) -> Iterator[Tensor]:
        """Read a matrix in blocks of rows, and report progress as they are done."""
        for block in self.checkpoint.blocks(name):
            yield block
            self._done += block.numel()
            self._on_progress(_DIGEST_SHARE + (1 - _DIGEST_SHARE) * 0.999 * self._done / self._total)


def printable_name(name: str) -> str:
    """Make a file's name fit for a manifest."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)[:_MAX_NAME] or "model"
