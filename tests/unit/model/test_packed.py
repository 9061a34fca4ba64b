"""The enclave's part of packed models: every file that was changed, missing or wrong is named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_models import Edit, edit_manifest, edit_tensors, packed_model, sign
from tiny_models import tiny_checkpoint

from tsqp.errors import WeightsError
from tsqp.model.pack import pack
from tsqp.model.packed import PackedGroup, is_packed, open_codes, open_enclave, read_manifest

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_model(tmp_path_factory.mktemp("original"))


@pytest.fixture
def packed(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "packed")


def open_both(directory: Path) -> None:
    enclave, codes = open_enclave(directory), open_codes(directory)
    for group in codes.groups:
        codes.read(group.name)
    assert enclave.manifest.codes_digest == codes.codes_digest


def test_what_is_packed_opens_from_either_path(packed: Path, tmp_path: Path) -> None:
    open_both(packed)
    shutil.move(packed / "worker", tmp_path / "codes-only")
    shutil.move(packed / "enclave", tmp_path / "inside")
    assert open_codes(tmp_path / "codes-only").codes_digest == read_manifest(tmp_path / "inside").codes_digest
    assert open_enclave(tmp_path / "inside").manifest == read_manifest(tmp_path / "inside")
    assert is_packed(tmp_path / "codes-only")
    assert is_packed(tmp_path / "inside")
    assert not is_packed(packed)


@pytest.mark.parametrize("gramine", [True, False])
def test_a_file_that_is_refused_is_named_and_in_gramine_the_key_is_suspected(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, gramine: bool
) -> None:
    """A file of an encrypted mount whose key is wrong is refused when it is looked for (Gramine's pf_open: EACCES)."""
    if gramine:
        monkeypatch.setattr("tsqp.model.reading._GRAMINE_KEYS", tmp_path)

    stat = Path.stat

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if path.is_relative_to(packed) and path.suffix == ".json":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    for reading in (is_packed, read_manifest, open_enclave):
        with pytest.raises(WeightsError, match=r"cannot read .*manifest\.json: Permission denied\.") as refusal:
            reading(packed)
        assert ("no key for it" in str(refusal.value)) == gramine


def test_everything_is_there_in_its_type(packed: Path) -> None:
    enclave, codes = open_enclave(packed), open_codes(packed)
    names = [group.name for group in codes.groups]
    layers = [f"layers.{index}.{part}" for index in range(2) for part in ("qkv", "o", "gate_up", "down")]
    assert names == [*layers, "head"]
    assert set(enclave.scales) == set(enclave.largest_norms) == set(names)
    assert set(enclave.biases) == {name for name in names if name.endswith((".qkv", ".o"))}
    assert {tensor.dtype for tensor in enclave.state.values()} == {torch.float32}
    assert enclave.state.keys() == {
        "model.norm.weight",
        *(f"model.layers.{i}.{kind}_layernorm.weight" for i in range(2) for kind in ("input", "post_attention")),
    }
    assert enclave.tokenizer_json == b"{}"
    for group in codes.groups:
        matrix = codes.read(group.name)
        assert tuple(matrix.shape) == (group.rows, group.in_features)
        assert enclave.scales[group.name].shape == (group.rows,)
        assert sum(group.out_features) == group.rows


def test_files_that_the_manifest_does_not_list_are_ignored(packed: Path) -> None:
    (packed / "enclave" / "notes.txt").write_bytes(b"mine")
    (packed / "worker" / "notes.txt").write_bytes(b"mine")
    open_both(packed)


ENCLAVE_FILES = ["config.json", "state.safetensors", "embedding.safetensors", "tokenizer.json", "LICENSE"]


@pytest.mark.parametrize("name", ENCLAVE_FILES)
def test_a_changed_byte_in_the_enclave_is_found(packed: Path, name: str) -> None:
    path = packed / "enclave" / name
    content = bytearray(path.read_bytes())
    expected = hashlib.sha256(content).hexdigest()
    content[-1] ^= 1
    path.write_bytes(content)
    got = hashlib.sha256(content).hexdigest()
    message = (
        rf"file {name} of the packed model was changed: expected sha256 {expected}, got {got}; remove \S*packed and"
    )
    with pytest.raises(WeightsError, match=message):
        open_enclave(packed)


@pytest.mark.parametrize("name", ENCLAVE_FILES)
def test_a_missing_file_of_the_enclave_is_named(packed: Path, name: str) -> None:
    (packed / "enclave" / name).unlink()
    with pytest.raises(WeightsError, match=rf"{name} is missing: the packed model is incomplete"):
        open_enclave(packed)


def test_no_enclave(packed: Path) -> None:
    for read in (read_manifest, open_enclave):
        with pytest.raises(WeightsError, match=r"worker has no enclave/manifest.json"):
            read(packed / "worker")


def test_another_models_enclave_has_another_codes_digest(packed: Path, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "other", seed=1, attention_bias=True, num_hidden_layers=2)
    pack(model, "tiny", tmp_path / "theirs")
    shutil.rmtree(packed / "enclave")
    shutil.copytree(tmp_path / "theirs" / "enclave", packed / "enclave")
    assert open_enclave(packed).manifest.codes_digest != open_codes(packed).codes_digest


@pytest.mark.parametrize("options", [{"num_hidden_layers": 3}, {"intermediate_size": 96}, {"vocab_size": 64}])
def test_files_of_two_models_do_not_mix(packed: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"num_hidden_layers": 2, "attention_bias": True, **options}
    model = tiny_checkpoint(tmp_path / "other", **options)
    shutil.copy(model / "config.json", packed / "enclave" / "config.json")
    sign(packed, "config.json")
    with pytest.raises(WeightsError, match=r"enclave/ mixes two models; pack the model again"):
        open_enclave(packed)


MALFORMED: dict[str, Edit] = {
    "other version": lambda raw: raw.update(format="tsqp-packed-2"),
    "no version": lambda raw: raw.pop("format"),
    "version of another type": lambda raw: raw.update(format=[["x" * 10_000]]),
    "unknown field": lambda raw: raw.update(more=1),
    "missing field": lambda raw: raw.pop("source_digest"),
    "digest too short": lambda raw: raw.update(source_digest="ab"),
    "digest in capitals": lambda raw: raw.update(source_digest="A" * 64),
    "digest with a line end": lambda raw: raw.update(source_digest="a" * 64 + "\n"),
    "other quantisation": lambda raw: raw["quantisation"].update(weights="int4"),
    "no groups": lambda raw: raw.update(groups=[]),
    "groups of another type": lambda raw: raw.update(groups={}),
    "negative rows": lambda raw: raw["groups"][0].update(rows=-1),
    "rows as text": lambda raw: raw["groups"][0].update(rows="960"),
    "huge rows": lambda raw: raw["groups"][0].update(rows=1 << 70),
    "negative norm": lambda raw: raw["groups"][0].update(largest_norm=-1.0),
    "norm above any": lambda raw: raw["groups"][0].update(largest_norm=1e6),
    "norm as text": lambda raw: raw["groups"][0].update(largest_norm="NaN"),
    "group name with a line end": lambda raw: raw["groups"][0].update(name="a\nb"),
    "file outside": lambda raw: raw["files"].update({"../config.json": "a" * 64}),
    "absolute file": lambda raw: raw["files"].update({"/etc/passwd": "a" * 64}),
    "itself": lambda raw: raw["files"].update({"manifest.json": "a" * 64}),
    "parent": lambda raw: raw["files"].update({"..": "a" * 64}),
    "no config": lambda raw: raw["files"].pop("config.json"),
    "no state": lambda raw: raw["files"].pop("state.safetensors"),
}


@pytest.mark.parametrize("edit", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_manifest_is_refused(packed: Path, edit: Edit) -> None:
    edit_manifest(packed, edit)
    with pytest.raises(WeightsError, match=r"manifest\.json is .*Pack the model again\.$") as caught:
        read_manifest(packed)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b"{", b'{"format": NaN}', b'{"format": "\xff"}', b'{"a":' * 9999],
)
def test_a_manifest_that_is_no_json_object_is_refused(packed: Path, content: bytes) -> None:
    (packed / "enclave" / "manifest.json").write_bytes(content)
    with pytest.raises(WeightsError, match=r"manifest\.json is not a manifest|is of format None"):
        read_manifest(packed)


def test_a_manifest_of_no_or_any_size_is_refused(packed: Path) -> None:
    path = packed / "enclave" / "manifest.json"
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match=r"has 0 bytes"):
        read_manifest(packed)
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(WeightsError, match=r"has 1099511627776 bytes; expected 1 to"):
        read_manifest(packed)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_the_manifest_goes_unnoticed(original: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever byte changes, reading fails or the digest does not match; white space is all that may differ."""
    shutil.copytree(original, tmp_path / "copy", dirs_exist_ok=True)
    path = tmp_path / "copy" / "enclave" / "manifest.json"
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        digest = read_manifest(tmp_path / "copy").digest
    except WeightsError:
        return
    same = json.loads(content) == json.loads((original / "enclave" / "manifest.json").read_bytes())
    assert (digest == read_manifest(original).digest) == same


def test_the_manifest_digest_is_of_canonical_json(packed: Path) -> None:
    raw = json.loads((packed / "enclave" / "manifest.json").read_bytes())
    canonical = json.dumps(raw, sort_keys=True, separators=(",", ":"))
    assert read_manifest(packed).digest == hashlib.sha256(canonical.encode()).hexdigest()
    (packed / "enclave" / "manifest.json").write_text(json.dumps(dict(reversed(raw.items()))), encoding="utf-8")
    assert read_manifest(packed).digest == hashlib.sha256(canonical.encode()).hexdigest()


@given(st.floats(min_value=0, max_value=1e4, allow_nan=False))
def test_norms_come_back_to_the_last_bit(norm: float) -> None:
    group = PackedGroup(name="g", rows=1, in_features=1, sha256="0" * 64, largest_norm=norm)
    text = json.dumps(msgspec.to_builtins(group))
    assert msgspec.json.decode(text, type=PackedGroup).largest_norm == norm


STATES: dict[str, tuple[Edit, str]] = {
    "a scale of zero": (lambda state: state["layers.0.o.scale"].data[2:3].zero_(), "scale of layers.0.o is not pos"),
    "a negative scale": (lambda state: state["head.scale"].neg_(), "a scale of head is not positive"),
    "nan": (lambda state: state["head.scale"][:1].fill_(torch.nan), "'head.scale' has values that are infinite or not"),
    "infinite norm": (lambda state: state["model.norm.weight"][:1].fill_(torch.inf), "'model.norm.weight' has values"),
    "missing": (lambda state: state.pop("layers.1.qkv.bias"), "'layers.1.qkv.bias' is missing or does not belong"),
    "too many": (lambda state: state.update(more=torch.ones(1)), "'more' is missing or does not belong"),
    "shape": (lambda state: state.update({"head.scale": torch.ones(3)}), r"'head.scale' has shape \[3\], config.json"),
    "dtype": (lambda state: state.update({"head.scale": state["head.scale"].double()}), "is of type torch.float64"),
    "int8": (lambda state: state.update({"head.scale": state["head.scale"].to(torch.int8)}), "of type torch.int8"),
    "int64": (lambda state: state.update({"head.scale": state["head.scale"].to(torch.int64)}), "is of type 'I64'"),
}


@pytest.mark.parametrize(("edit", "message"), STATES.values(), ids=STATES)
def test_a_state_that_does_not_fit_is_refused(packed: Path, edit: Edit, message: str) -> None:
    """The digest is right: whoever packed it wrote it so."""
    edit_tensors(packed / "enclave" / "state.safetensors", edit)
    sign(packed, "state.safetensors")
    with pytest.raises(WeightsError, match=message):
        open_enclave(packed)


def test_an_embedding_that_does_not_fit_is_refused(packed: Path) -> None:
    path = packed / "enclave" / "embedding.safetensors"
    edit_tensors(path, lambda tensors: tensors[EMBEDDING].view(-1)[-1:].fill_(torch.nan))
    sign(packed, "embedding.safetensors")
    with pytest.raises(WeightsError, match=f"'{EMBEDDING}' has values that are infinite"):
        open_enclave(packed)
    edit_tensors(path, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING].to(torch.int8)}))
    sign(packed, "embedding.safetensors")
    with pytest.raises(WeightsError, match=r"of type torch\.int8"):
        open_enclave(packed)


def test_a_config_that_is_no_json_is_refused(packed: Path) -> None:
    for content, message in ((b"{", "cannot be read as JSON"), (b"[]", "expected a JSON object"), (b"\xff", "JSON")):
        (packed / "enclave" / "config.json").write_bytes(content)
        sign(packed, "config.json")
        with pytest.raises(WeightsError, match=message):
            open_enclave(packed)


HEADERS = {
    "empty": b"",
    "no header": b"abc",
    "longer than the file": (1 << 20).to_bytes(8, "little") + b"{}",
    "huge": (1 << 63).to_bytes(8, "little") + b"{}",
    "no json": (2).to_bytes(8, "little") + b"{x",
    "a list": (2).to_bytes(8, "little") + b"[]",
}
ENTRIES = {
    "beyond the end": '{"head":{"dtype":"I8","shape":[9,9],"data_offsets":[0,81]}}',
    "wrong length": '{"head":{"dtype":"I8","shape":[2,2],"data_offsets":[0,3]}}',
    "backwards": '{"head":{"dtype":"I8","shape":[2,2],"data_offsets":[4,0]}}',
    "negative": '{"head":{"dtype":"I8","shape":[2,2],"data_offsets":[-4,0]}}',
    "empty matrix": '{"head":{"dtype":"I8","shape":[0,2],"data_offsets":[0,0]}}',
    "overflow": '{"head":{"dtype":"I8","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}',
    "unaligned": '{"head":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}} ',
    "unknown type": '{"head":{"dtype":"F8","shape":[1,1],"data_offsets":[0,1]}}',
    "no offsets": '{"head":{"dtype":"I8","shape":[1,1]}}',
    "metadata no texts": '{"__metadata__":{"a":1},"head":{"dtype":"I8","shape":[1,1],"data_offsets":[0,1]}}',
}
HEADERS |= {name: len(text).to_bytes(8, "little") + text.encode() + bytes(8) for name, text in ENTRIES.items()}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_malformed_safetensors_are_refused_on_both_sides(packed: Path, content: bytes) -> None:
    (packed / "worker" / "head.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"head\.safetensors"):
        open_codes(packed)
    (packed / "enclave" / "state.safetensors").write_bytes(content)
    sign(packed, "state.safetensors")
    with pytest.raises(WeightsError, match=r"state\.safetensors"):
        open_enclave(packed)
