"""Linear maps: what is written is what is read, packing twice gives the same bytes, and damage is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_models import edit_tensors
from safetensors import safe_open
from tiny_models import edit_json
from torch import Tensor

from tsqp.arith.quantize import largest_norm, quantize_weights
from tsqp.errors import InputError, SetupError, WeightsError
from tsqp.model.architecture import LinearGroup
from tsqp.model.linear_map import GroupWeights, floats_digest, is_floats, open_floats, open_map, write_floats, write_map
from tsqp.model.linears import FloatGroups
from tsqp.model.locate import is_packed_model
from tsqp.model.packed import open_codes
from tsqp.model.tensor_file import file_digest
from tsqp.wire import messages
from tsqp.worker.services import OpenService

GROUPS = (LinearGroup("a.q+k", ("a.q", "a.k"), 8, (6, 4), bias=False), LinearGroup("b", ("b",), 6, (5,), bias=False))


def matrices(dtype: torch.dtype = torch.float32) -> list[GroupWeights]:
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int, inputs: int) -> Tensor:
        return torch.randn(inputs, rows, generator=generator).to(dtype).T  # not contiguous, as GPT-2's are

    return [
        GroupWeights(group, tuple(drawn(rows, group.in_features) for rows in group.out_features)) for group in GROUPS
    ]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write_map(matrices(), "tiny", tmp_path / "map")
    return tmp_path / "map"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_written_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    manifest = write_map(matrices(dtype), "tiny", tmp_path / "map")
    floats, codes, scales = (
        open_floats(tmp_path / "map"),
        open_codes(tmp_path / "map"),
        open_map(tmp_path / "map", GROUPS),
    )
    assert floats.groups == codes.groups == scales.groups == GROUPS
    for each in matrices(dtype):
        name, stacked_NK = each.group.name, torch.cat(each.weights)
        codes_NK, scale_N = quantize_weights(stacked_NK)
        assert torch.equal(floats.read(name), stacked_NK)
        assert floats.read(name).dtype == dtype
        assert torch.equal(codes.read(name), codes_NK)
        assert torch.equal(scales.scales[name], scale_N)
        assert scales.largest_norms[name] == largest_norm(codes_NK)
    assert manifest == scales.manifest
    assert codes.codes_digest == manifest.codes_digest
    assert floats.digest == floats_digest(matrices(dtype)) == manifest.source_digest


def test_floats_alone_have_the_same_digest(tmp_path: Path, out: Path) -> None:
    assert write_floats(matrices(), tmp_path / "floats") == open_floats(out).digest
    assert open_floats(tmp_path / "floats").digest == open_floats(out).digest


def test_the_digest_of_weights_tells_dtypes_groups_and_bits_apart() -> None:
    other = matrices()
    other[1].weights[0][0, 0] += 1e-6
    renamed = [GroupWeights(LinearGroup("c", ("b",), 6, (5,), bias=False), matrices()[1].weights)]
    found = {floats_digest(each) for each in (matrices(), matrices(torch.bfloat16), other, matrices()[1:], renamed)}
    assert len(found) == 5


def test_writing_twice_gives_the_same_bytes(out: Path, tmp_path: Path) -> None:
    write_map(matrices(), "tiny", tmp_path / "again")
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert all((tmp_path / "again" / path).read_bytes() == (out / path).read_bytes() for path in files)


def test_each_part_is_told_apart(out: Path) -> None:
    assert is_packed_model(str(out))
    assert is_packed_model(str(out / "worker"))
    assert not is_packed_model(str(out / "floats"))
    assert is_floats(out / "floats")
    assert not is_floats(out)
    with safe_open(out / "worker/codes.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["a.q+k"])["members"] == ["a.q", "a.k"]


def test_what_exists_is_not_overwritten(out: Path) -> None:
    with pytest.raises(SetupError, match="exists already"):
        write_map(matrices(), "tiny", out)


def test_weights_that_are_no_numbers_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    bad = matrices()
    bad[0].weights[1][2, 3] = torch.nan
    with pytest.raises(WeightsError, match=r"linear group a\.q\+k: a weight is infinite or not a number"):
        write_map(bad, "tiny", tmp_path / "map")
    assert list(tmp_path.iterdir()) == []


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "scales": (
        lambda out: edit_tensors(out / "enclave/scales.safetensors", lambda tensors: tensors["b"].mul_(2)),
        "scales.safetensors was changed",
    ),
    "no manifest": (lambda out: (out / "enclave/linears.json").unlink(), "has no enclave/linears.json"),
    "format": (
        lambda out: edit_json(out / "enclave/linears.json", lambda raw: raw.update(format="tsqp-linear-map-2")),
        "is not a manifest of a linear map",
    ),
    "more": (
        lambda out: edit_json(out / "enclave/linears.json", lambda raw: raw.update(more=1)),
        "is not a manifest of a linear map",
    ),
    "groups": (
        lambda out: edit_json(out / "enclave/linears.json", lambda raw: raw["groups"].pop()),
        "lists 1 linear groups that are not the model's 2",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_map_is_refused(name: str, out: Path) -> None:
    damage, sentence = DAMAGES[name]
    damage(out)
    with pytest.raises(WeightsError, match=sentence):
        open_map(out, GROUPS)


def test_scales_must_be_positive(out: Path) -> None:
    path = out / "enclave/scales.safetensors"
    edit_tensors(path, lambda tensors: tensors["b"].mul_(-1))
    edit_json(out / "enclave/linears.json", lambda raw: raw.update(scales_sha256=file_digest(path)))
    with pytest.raises(WeightsError, match="a scale is not a positive number"):
        open_map(out, GROUPS)


def test_changed_weights_and_codes_are_not_read(out: Path) -> None:
    for file in ("floats/weights.safetensors", "worker/codes.safetensors"):
        path = out / file
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for opened in (open_floats(out), open_codes(out)):
        opened.read("a.q+k")
        with pytest.raises(WeightsError, match="tensor 'b' was changed"):
            opened.read("b")


def test_weights_must_be_floats(out: Path) -> None:
    path = out / "floats/weights.safetensors"
    edit_tensors(path, lambda tensors: tensors.update(b=tensors["b"].to(torch.int8)))
    with pytest.raises(WeightsError, match=r"tensor 'b' is I8 \[5, 6\]; expected a float matrix"):
        open_floats(out)


def test_a_worker_of_a_map_multiplies_and_has_no_table(out: Path) -> None:
    weights = open_floats(out / "floats")
    linears = FloatGroups(weights.groups, torch.float32, torch.device("cpu"))
    linears.fill(weights.read)
    x_MK = torch.randn(3, 8)
    torch.testing.assert_close(linears.linear("a.q+k", x_MK), x_MK @ torch.cat(matrices()[0].weights).T)
    service = OpenService(linears, {})
    assert service.chains == {}
    ids = messages.TensorSpec("int64", (1,))
    with pytest.raises(InputError, match="no embedding table"):
        service.product(messages.Embedding(id=1, ids=ids, dtype="float32"), [torch.zeros(1, dtype=torch.int64)])
