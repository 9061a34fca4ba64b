"""The worker's part of packed models: codes that were changed, are missing or malformed are never used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_models import edit_tensors, packed_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_checkpoint

from tsqp.errors import WeightsError
from tsqp.model.architecture import linear_groups
from tsqp.model.packed import open_codes, open_enclave, read_manifest


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_model(tmp_path_factory.mktemp("original"))


@pytest.fixture
def packed(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "packed")


def test_codes_that_were_read_do_not_change_with_the_file(packed: Path) -> None:
    codes = open_codes(packed)
    read = codes.read("head")
    before = read.clone()
    path = packed / "worker" / "head.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(read, before)


@pytest.mark.parametrize("name", ["layer-00000", "layer-00001", "head"])
def test_a_changed_code_is_found(packed: Path, name: str) -> None:
    path = packed / "worker" / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    codes = open_codes(packed)
    changed = "head" if name == "head" else f"layers.{int(name[-5:])}.down"
    for group in codes.groups:
        if group.name == changed:
            with pytest.raises(WeightsError, match=rf"tensor '{changed}' was changed: expected sha256 .*, got "):
                codes.read(group.name)
        else:
            codes.read(group.name)


@pytest.mark.parametrize("name", ["layer-00000.safetensors", "head.safetensors"])
def test_a_missing_codes_file_is_named(packed: Path, name: str) -> None:
    (packed / "worker" / name).unlink()
    with pytest.raises(WeightsError, match=r"safetensors is missing: the packed model is incomplete"):
        open_codes(packed)


def test_without_its_last_layer_the_codes_digest_differs(packed: Path) -> None:
    """The worker knows no number of layers; the enclave compares digests."""
    (packed / "worker" / "layer-00001.safetensors").unlink()
    assert open_codes(packed).codes_digest != read_manifest(packed).codes_digest


@pytest.mark.parametrize("where", ["nothing", "a model", "enclave"])
def test_no_codes(packed: Path, tmp_path: Path, where: str) -> None:
    directory = packed / "enclave" if where == "enclave" else tmp_path / "other"
    if where == "a model":
        tiny_checkpoint(directory, num_hidden_layers=1)
    with pytest.raises(WeightsError, match=r"has no worker/ with int8 codes: expected the directory that 'tsqp pack'"):
        open_codes(directory)


def label(directory: Path, text: str | None) -> None:
    """Replace the metadata of head.safetensors."""
    path = directory / "worker" / "head.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, metadata=None if text is None else {"head": text})


LABELS = [
    None,
    "",
    "{",
    "[]",
    "null",
    '{"members": ["lm_head"], "out_features": [1]}',
    '{"members": [], "out_features": [], "sha256": "' + "a" * 64 + '"}',
    '{"members": ["lm_head"], "out_features": ["1"], "sha256": "' + "a" * 64 + '"}',
    '{"members": ["lm_head"], "out_features": [1], "sha256": "a"}',
    '{"members": ["lm_head"], "out_features": [-1], "sha256": "' + "a" * 64 + '"}',
    '{"members": ["lm_head"], "out_features": [1], "more": 1, "sha256": "' + "a" * 64 + '"}',
    "[" * 50_000,
]


@pytest.mark.parametrize("text", LABELS)
def test_malformed_labels_of_codes_are_refused(packed: Path, text: str | None) -> None:
    label(packed, text)
    with pytest.raises(WeightsError, match=r"metadata of 'head' are malformed"):
        open_codes(packed)


def test_labels_that_do_not_fit_the_tensor_are_refused(packed: Path) -> None:
    for members, out_features in ((["lm_head"], [1]), (["a", "b"], [128])):
        label(packed, json.dumps({"members": members, "out_features": out_features, "sha256": "a" * 64}))
        with pytest.raises(
            WeightsError, match=rf"name {len(members)} modules and {sum(out_features)} rows, the tensor"
        ):
            open_codes(packed)


def rewrite_head(directory: Path, codes: torch.Tensor) -> None:
    sha256 = hashlib.sha256(codes.numpy().tobytes()).hexdigest()
    text = json.dumps({"members": ["lm_head"], "out_features": [codes.shape[0]], "sha256": sha256})
    save_file({"head": codes}, directory / "worker" / "head.safetensors", metadata={"head": text})


def test_a_code_of_minus_128_is_refused(packed: Path) -> None:
    codes = open_codes(packed).read("head")
    codes[1, 1] = -128
    rewrite_head(packed, codes)
    with pytest.raises(WeightsError, match=r"'head' holds -128"):
        open_codes(packed).read("head")


@pytest.mark.parametrize(
    "codes", [torch.ones(4, 4), torch.ones(4, dtype=torch.int8), torch.ones(4, 4, 4, dtype=torch.int8)]
)
def test_codes_that_are_no_int8_matrix_are_refused(packed: Path, codes: torch.Tensor) -> None:
    rewrite_head(packed, codes)
    with pytest.raises(WeightsError, match=r"expected an int8 matrix"):
        open_codes(packed)


def test_tensors_that_do_not_belong_are_refused(packed: Path) -> None:
    edit_tensors(
        packed / "worker" / "layer-00001.safetensors",
        lambda tensors: tensors.update(more=torch.ones(1, dtype=torch.int8)),
    )
    with pytest.raises(WeightsError, match=r"layer-00001\.safetensors: tensor 'more' is missing or does not"):
        open_codes(packed)


def test_codes_of_no_group_are_refused(original: Path) -> None:
    with pytest.raises(WeightsError, match=r"no codes of 'layers\.7\.o'"):
        open_codes(original).read("layers.7.o")


def test_layers_in_each_others_place_are_refused(packed: Path) -> None:
    worker = packed / "worker"
    shutil.copy(worker / "layer-00000.safetensors", worker / "layer-00001.safetensors")
    with pytest.raises(
        WeightsError, match=r"layer-00001\.safetensors: tensor 'layers\.0\.down' is missing or does not"
    ):
        open_codes(packed)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(packed: Path) -> None:
    codes = open_codes(packed)
    path = packed / "worker" / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"became shorter while it was read"):
        codes.read("head")
    path.unlink()
    with pytest.raises(WeightsError, match=r"cannot read .*head\.safetensors: No such file"):
        codes.read("head")


@pytest.mark.parametrize("name", ["head.safetensors", "layer-00000.safetensors"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_damaged_codes_are_an_error_or_the_same_codes(original: Path, tmp_path: Path, name: str, seed: int) -> None:
    """Three bytes anywhere, most often in the header: never a traceback, never other codes under the same digest."""
    shutil.copytree(original, tmp_path / "copy", dirs_exist_ok=True)
    path, draw = tmp_path / "copy" / "worker" / name, random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(3):
        content[draw.randrange(min(len(content), 1500))] = draw.randrange(256)
    path.write_bytes(content)
    try:
        codes = open_codes(tmp_path / "copy")
        read = {group.name: codes.read(group.name) for group in codes.groups}
    except WeightsError:
        return
    if codes.codes_digest == read_manifest(original).codes_digest:
        ours = open_codes(original)
        assert all(torch.equal(matrix, ours.read(group)) for group, matrix in read.items())


def test_groups_are_those_of_the_architecture_but_for_biases(packed: Path) -> None:
    implied = linear_groups(open_enclave(packed).config)
    assert open_codes(packed).groups == tuple(dataclasses.replace(group, bias=False) for group in implied)
