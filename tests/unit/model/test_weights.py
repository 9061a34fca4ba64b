"""Reading safetensors directories: what is missing, damaged or of another kind is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import edit_json, reference_from, tiny_checkpoint
from torch import Tensor

from tsqp.errors import TsqpError, UnsupportedModelError, WeightsError
from tsqp.model.architecture import read_config, weight_shapes
from tsqp.model.weights import INDEX_NAME, SINGLE_NAME, Checkpoint

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "whole")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "sharded", max_shard_size="20KB")


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Load the single weights file, let ``edit`` change it in place, and write it back."""
    tensors = load_file(directory / SINGLE_NAME)
    edit(tensors)
    save_file(tensors, directory / SINGLE_NAME)


def require(directory: Path) -> None:
    """Check a directory as loading does."""
    Checkpoint(directory).require(weight_shapes(read_config(directory)))


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_every_tensor_is_read_as_transformers_reads_it(kind: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(kind)
    require(directory)
    checkpoint = Checkpoint(directory)
    expected = dict(reference_from(directory).named_parameters())
    assert checkpoint.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(checkpoint.read(name), value)
        assert checkpoint.tensors[name].shape == tuple(value.shape)


def test_read_into_casts(whole: Path) -> None:
    checkpoint = Checkpoint(whole)
    out = torch.empty(checkpoint.tensors[DOWN].shape, dtype=torch.bfloat16)
    checkpoint.read_into(DOWN, out)
    assert torch.equal(out, checkpoint.read(DOWN).to(torch.bfloat16))


def test_tensors_the_model_does_not_use_are_ignored(whole: Path) -> None:
    edit_tensors(whole, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(4)}))
    require(whole)


def test_missing_weights(whole: Path) -> None:
    (whole / SINGLE_NAME).unlink()
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor"):
        Checkpoint(whole)


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(WeightsError, match=shard.name):
        Checkpoint(sharded)


def test_missing_tensor_is_named(whole: Path) -> None:
    edit_tensors(whole, lambda tensors: tensors.__delitem__(DOWN))
    with pytest.raises(WeightsError, match=f"no tensor '{DOWN}'"):
        require(whole)


@pytest.mark.parametrize("shape", [(48, 79), (80, 48), (48 * 80,), (1, 48, 80)], ids=str)
def test_wrong_shape_is_named(whole: Path, shape: tuple[int, ...]) -> None:
    edit_tensors(whole, lambda tensors: tensors.update({DOWN: torch.zeros(shape)}))
    with pytest.raises(WeightsError, match=rf"{DOWN}.*config\.json implies \[48, 80\]"):
        require(whole)


@pytest.mark.parametrize(
    ("dtype", "named"),
    [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.int32, "I32"), (torch.float8_e4m3fn, "F8_E4M3")],
    ids=str,
)
def test_quantised_tensors_are_refused(whole: Path, dtype: torch.dtype, named: str) -> None:
    edit_tensors(whole, lambda tensors: tensors.update({DOWN: torch.zeros(48, 80).to(dtype)}))
    with pytest.raises(UnsupportedModelError, match=f"{DOWN}.*stored as {named}"):
        require(whole)


@pytest.mark.parametrize("kept", [0, 4, 8, 200, 0.5, 0.999])
def test_truncated_file_is_named(whole: Path, kept: float) -> None:
    file = whole / SINGLE_NAME
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(WeightsError, match=r"model\.safetensors is not a complete safetensors file"):
        Checkpoint(whole)


def test_file_cut_after_it_was_opened(whole: Path) -> None:
    checkpoint = Checkpoint(whole)
    file = whole / SINGLE_NAME
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"model\.embed_tokens\.weight"):
        checkpoint.read("model.embed_tokens.weight")


# The index -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../whole/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", 7, None, ["x"]],
    ids=repr,
)
def test_index_must_name_files_inside_the_directory(sharded: Path, whole: Path, name: Any) -> None:
    """``whole`` lies beside ``sharded``: the first name leads to a real file."""
    assert (whole / SINGLE_NAME).exists()
    edit_json(sharded / INDEX_NAME, lambda index: index["weight_map"].update({DOWN: name}))
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json"):
        Checkpoint(sharded)


def test_index_with_a_name_too_long_for_the_disk(sharded: Path) -> None:
    edit_json(sharded / INDEX_NAME, lambda index: index["weight_map"].update({DOWN: "x" * 5000}))
    with pytest.raises(WeightsError):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": null}', b"\xff", b"[" * 100_000],
    ids=["empty", "list", "no-map", "map-is-list", "map-is-null", "not-utf8", "deep"],
)
def test_malformed_index(sharded: Path, content: bytes) -> None:
    (sharded / INDEX_NAME).write_bytes(content)
    with pytest.raises(WeightsError, match="is not a safetensors index"):
        Checkpoint(sharded)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=JSON | st.dictionaries(st.just("weight_map"), JSON, min_size=1))
def test_any_index_is_read_or_refused(tmp_path: Path, index: Any) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    try:
        assert Checkpoint(tmp_path).tensors == {}
    except TsqpError:
        return


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(content)
    try:
        assert Checkpoint(tmp_path).tensors == {}
    except TsqpError:
        return
