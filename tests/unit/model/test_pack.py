"""Packing a model: what is written, that it stands for the weights, and that nothing is half done."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_gguf import quantised, write_gguf
from tiny_models import tiny_checkpoint, tiny_reference

from tsqp.arith.quantize import largest_norm
from tsqp.errors import SetupError, UnsupportedModelError, WeightsError
from tsqp.model import locate, weights
from tsqp.model import pack as packing
from tsqp.model.architecture import linear_groups, norm_shapes, read_config
from tsqp.model.digest import model_digest
from tsqp.model.pack import pack
from tsqp.model.packed import is_packed, open_codes, open_enclave, read_manifest
from tsqp.model.tensor_file import TensorFileWriter
from tsqp.model.weights import SINGLE_NAME, Checkpoint

MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "bfloat16": {"stored": torch.bfloat16, "max_shard_size": "20KB"},
    "tied-float16": {"stored": torch.float16, "tie_word_embeddings": True},
    # Not a multiple of anything, and K beyond one float64 block of the ring.
    "odd-sizes": {"vocab_size": 131, "intermediate_size": 33001, "hidden_size": 8, "num_attention_heads": 2},
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    options = {"num_hidden_layers": 2, "num_key_value_heads": 1, **MODELS[request.param]}
    return tiny_checkpoint(tmp_path / "model", **options)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", num_hidden_layers=1)


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def change_tensor(directory: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    tensors = load_file(directory / SINGLE_NAME)
    change(tensors[name])
    save_file(tensors, directory / SINGLE_NAME)


def test_the_worker_gets_int8_codes_and_nothing_else(model: Path, tmp_path: Path) -> None:
    """Read with the safetensors package, which has no part in writing them."""
    manifest = pack(model, "tiny", tmp_path / "out")
    groups = linear_groups(read_config(model))
    labels: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"worker", "enclave"}
    names = sorted(path.name for path in (tmp_path / "out" / "worker").iterdir())
    assert names == ["head.safetensors", "layer-00000.safetensors", "layer-00001.safetensors"]
    for name in names:
        tensors |= load_file(tmp_path / "out" / "worker" / name)
        with safe_open(tmp_path / "out" / "worker" / name, framework="pt") as file:
            labels |= {key: json.loads(value) for key, value in file.metadata().items()}
    assert tensors.keys() == labels.keys() == {group.name for group in groups}
    assert [group.name for group in manifest.groups] == [group.name for group in groups]
    for group, listed in zip(groups, manifest.groups, strict=True):
        codes = tensors[group.name]
        sha256 = hashlib.sha256(codes.numpy().tobytes()).hexdigest()
        members, out_features = list(group.members), list(group.out_features)
        assert codes.dtype == torch.int8
        assert labels[group.name] == {"members": members, "out_features": out_features, "sha256": sha256}
        assert tuple(codes.shape) == (listed.rows, listed.in_features) == (group.rows, group.in_features)
        assert listed.sha256 == sha256
        assert listed.largest_norm == largest_norm(codes)


def test_the_enclave_gets_everything_else(model: Path, tmp_path: Path) -> None:
    manifest = pack(model, "tiny", tmp_path / "out")
    enclave, config, checkpoint = tmp_path / "out" / "enclave", read_config(model), Checkpoint(model)
    state = load_file(enclave / "state.safetensors")
    expected = {*norm_shapes(config), *(f"{group.name}.scale" for group in linear_groups(config))}
    expected |= {f"{group.name}.bias" for group in linear_groups(config) if group.bias}
    assert state.keys() == expected
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    for name in norm_shapes(config):
        assert torch.equal(state[name], checkpoint.read(name).float())
    for group in linear_groups(config):
        if group.bias:
            parts = [checkpoint.read(f"{member}.bias").float() for member in group.members]
            assert torch.equal(state[f"{group.name}.bias"], torch.cat(parts))
    embedding = load_file(enclave / "embedding.safetensors")["model.embed_tokens.weight"]
    stored = checkpoint.read("model.embed_tokens.weight")
    assert embedding.dtype == stored.dtype
    assert torch.equal(embedding, stored)
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest.source_digest == model_digest(config, checkpoint)
    assert (enclave / "config.json").read_bytes() == (model / "config.json").read_bytes()
    files = {path.name for path in enclave.iterdir()}
    assert manifest.files.keys() == files - {"manifest.json"}
    assert manifest.files["config.json"] == hashlib.sha256((model / "config.json").read_bytes()).hexdigest()


def test_codes_are_within_half_a_scale_of_the_weights(model: Path, tmp_path: Path) -> None:
    pack(model, "tiny", tmp_path / "out")
    enclave, codes, checkpoint = open_enclave(tmp_path / "out"), open_codes(tmp_path / "out"), Checkpoint(model)
    for group in linear_groups(read_config(model)):
        tied = group.name == "head" and enclave.config.tied_head
        names = ["model.embed_tokens.weight"] if tied else [f"{member}.weight" for member in group.members]
        w_NK = torch.cat([checkpoint.read(name).double() for name in names])
        steps_NK = w_NK / enclave.scales[group.name].double()[:, None]
        assert float((steps_NK - codes.read(group.name)).abs().max()) <= 0.5 + 1e-5


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(elements=st.integers(1, 20_000))
def test_blocks_of_any_size_give_the_same_bytes(
    small: Path, elements: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("blocks")
    pack(small, "tiny", out / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_BLOCK_ELEMENTS", elements)
        pack(small, "tiny", out / "blocks")
    assert tree(out / "whole") == tree(out / "blocks")


def test_the_digest_of_codes_follows_the_documented_formula(small: Path, tmp_path: Path) -> None:
    pack(small, "tiny", tmp_path / "out")
    lines = ["tsqp-codes-1"]
    raw = json.loads((tmp_path / "out" / "enclave" / "manifest.json").read_text(encoding="utf-8"))
    lines += [f"{group['name']} {group['rows']} {group['in_features']} {group['sha256']}" for group in raw["groups"]]
    expected = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert read_manifest(tmp_path / "out").codes_digest == open_codes(tmp_path / "out").codes_digest == expected


def test_progress_ends_at_one_and_never_goes_back(small: Path, tmp_path: Path) -> None:
    steps: list[float] = []
    pack(small, "tiny", tmp_path / "out", steps.append)
    assert steps == sorted(steps)
    assert (steps[0] < 0.1, steps[-1]) == (True, 1.0)


def test_the_bundled_model_packs(bundled_packed: Path, bundled_directory: Path) -> None:
    enclave, codes = open_enclave(bundled_packed), open_codes(bundled_packed)
    assert enclave.config == read_config(bundled_directory)
    assert codes.codes_digest == enclave.manifest.codes_digest
    assert [group.name for group in codes.groups] == [group.name for group in linear_groups(enclave.config)]
    assert all(codes.read(group.name).dtype == torch.int8 for group in codes.groups)
    assert {tensor.dtype for file in (bundled_packed / "worker").iterdir() for tensor in load_file(file).values()} == {
        torch.int8
    }
    assert enclave.tokenizer_json == (bundled_directory / "tokenizer.json").read_bytes()
    assert enclave.manifest.model == "smollm2"


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_what_exists_is_kept(small: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
    elif kind == "file":
        out.write_bytes(b"mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SetupError, match=r"out exists already; remove it or choose another --out"):
        pack(small, "tiny", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_written(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SetupError, match=r"cannot write the packed model to "):
        pack(small, "tiny", tmp_path / "file" / "out")


def test_a_full_disk_leaves_nothing(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_self: TensorFileWriter, _block: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TensorFileWriter, "append", full)
    with pytest.raises(SetupError, match=r"cannot write the packed model to .*No space left"):
        pack(small, "tiny", tmp_path / "outs" / "out")
    assert list((tmp_path / "outs").iterdir()) == []


def test_an_interrupt_leaves_nothing(small: Path, tmp_path: Path) -> None:
    def interrupt(fraction: float) -> None:
        if fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(small, "tiny", tmp_path / "outs" / "out", interrupt)
    assert list((tmp_path / "outs").iterdir()) == []


def test_a_killed_packer_leaves_no_model_and_can_be_run_again(small: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from tsqp.model.pack import pack\n"
        "pack(Path(sys.argv[1]), 'tiny', Path(sys.argv[2]), lambda done: done > 0.9 and os._exit(9))"
    )
    out = tmp_path / "outs" / "out"
    run = subprocess.run([sys.executable, "-c", script, small, out], check=False, capture_output=True)
    assert run.returncode == 9, run.stderr
    assert not out.exists()
    assert [path.name.startswith(".out.partial-") for path in out.parent.iterdir()] == [True]
    pack(small, "tiny", out)
    assert open_enclave(out).manifest.model == "tiny"


def test_another_packer_that_was_faster_is_not_overwritten(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def occupy(fraction: float) -> None:
        if fraction == 1.0:
            out.mkdir()
            (out / "theirs").write_bytes(b"theirs")

    with pytest.raises(SetupError, match="exists already"):
        pack(small, "tiny", out, occupy)
    assert tree(out) == {"theirs": b"theirs"}


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"],
)
def test_a_damaged_weight_is_named(small: Path, tmp_path: Path, name: str) -> None:
    change_tensor(small, name, lambda value: value.view(-1)[3:4].fill_(torch.nan))
    with pytest.raises(WeightsError, match=rf"{SINGLE_NAME}: tensor '{name}': a \w+ is infinite or not a number"):
        pack(small, "tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_integer_weights_are_refused(small: Path, tmp_path: Path) -> None:
    tensors = load_file(small / SINGLE_NAME)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int32)
    save_file(tensors, small / SINGLE_NAME)
    with pytest.raises(UnsupportedModelError, match="stored as I32"):
        pack(small, "tiny", tmp_path / "out")


@pytest.mark.parametrize(("name", "shown"), [("a\nb\x00c", "a?b?c"), ("", "model"), ("x" * 300, "x" * 256)])
def test_any_name_becomes_a_valid_one(small: Path, tmp_path: Path, name: str, shown: str) -> None:
    pack(small, name, tmp_path / "out")
    assert read_manifest(tmp_path / "out").model == shown


def test_licences_and_tokenizer_travel_with_the_model(small: Path, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    (beside / "LICENSE-directory").mkdir(parents=True)
    for directory, name in [(small, "LICENSE.txt"), (small, "USE_POLICY.md"), (beside, "NOTICE"), (beside, "LICENCE")]:
        (directory / name).write_text(name, encoding="utf-8")
    for name in ("README.md", "secrets.txt", "tokenizer.json", "generation_config.json"):
        (small / name).write_text("{}", encoding="utf-8")
    (beside / "tokenizer.json").write_text("another model's", encoding="utf-8")
    manifest = pack(small, "tiny", tmp_path / "out", licences=beside)
    licences = {"LICENSE.txt", "USE_POLICY.md", "NOTICE", "LICENCE"}
    tokenizer = {"tokenizer.json", "generation_config.json"}
    assert manifest.files.keys() == licences | tokenizer | {
        "config.json",
        "state.safetensors",
        "embedding.safetensors",
    }
    assert (tmp_path / "out" / "enclave" / "NOTICE").read_text(encoding="utf-8") == "NOTICE"
    assert open_enclave(tmp_path / "out").tokenizer_json == b"{}"


def test_a_directory_that_cannot_be_listed(small: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot list .*gone: No such file"):
        pack(small, "tiny", tmp_path / "out", licences=tmp_path / "gone")
    assert not (tmp_path / "out").exists()


class TestLocatePacked:
    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    def test_a_model_is_packed_into_the_cache_once(
        self, small: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[float] = []
        directory = locate.locate_packed(str(small), steps.append)
        assert directory.parent == own_cache / "packed"
        assert directory.name.startswith("model-")
        assert steps[-1] == 1.0
        assert open_enclave(directory).manifest.codes_digest == open_codes(directory).codes_digest
        monkeypatch.setattr(packing, "pack", None)
        assert locate.locate_packed(str(small)) == directory
        monkeypatch.chdir(small.parent)
        assert locate.locate_packed("model") == directory
        monkeypatch.chdir(small)
        assert locate.locate_packed(".") == directory

    @pytest.mark.parametrize("change", ["weights", "config.json", "LICENSE", "packer"])
    def test_any_change_of_the_source_packs_anew(
        self, small: Path, change: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = locate.locate_packed(str(small))
        if change == "weights":
            status = (small / SINGLE_NAME).stat()
            os.utime(small / SINGLE_NAME, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        elif change == "packer":
            monkeypatch.setattr(packing, "PACKER_VERSION", packing.PACKER_VERSION + 1)
        else:
            with (small / change).open("a") as file:
                file.write("\n")
        assert locate.locate_packed(str(small)) != before

    def test_a_packed_model_is_taken_as_it_is_whole_or_one_side(self, small: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        pack(small, "tiny", out)
        for directory in (out, out / "worker", out / "enclave"):
            assert is_packed(directory)
            assert locate.locate_packed(str(directory)) == directory
            with pytest.raises(WeightsError, match=r"packed model: it holds int8 codes only, for the levels verified"):
                locate.locate(str(directory))
        assert not is_packed(small)

    def test_a_gguf_file_takes_its_licence_along(self, tmp_path: Path) -> None:
        model = tiny_reference(0, num_hidden_layers=1, hidden_size=64, num_attention_heads=4, intermediate_size=64)
        (tmp_path / "files").mkdir()
        file = write_gguf(tmp_path / "files" / "tiny.gguf", model, quantised(model, Kind.Q8_0))
        (file.parent / "LICENSE").write_text("terms", encoding="utf-8")
        enclave = open_enclave(locate.locate_packed(str(file)))
        assert enclave.manifest.model == "tiny.gguf"
        assert (enclave.directory / "LICENSE").read_text(encoding="utf-8") == "terms"

    def test_another_process_may_pack_the_same_model_meanwhile(
        self, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def twice(source: Path, name: str, out: Path, on_progress: Callable[[float], None], **options: Any) -> None:
            pack(source, name, out, on_progress, **options)
            pack(source, name, out, on_progress, **options)

        monkeypatch.setattr(packing, "pack", twice)
        assert open_enclave(locate.locate_packed(str(small))).manifest.model == "model"

    def test_a_cache_that_cannot_be_written(self, small: Path, own_cache: Path) -> None:
        own_cache.mkdir()
        (own_cache / "packed").write_bytes(b"")
        with pytest.raises(SetupError, match="cannot write the packed model"):
            locate.locate_packed(str(small))

    def test_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="does not exist"):
            locate.locate_packed(str(tmp_path / "nowhere"))
