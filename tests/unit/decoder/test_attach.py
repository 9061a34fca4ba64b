"""Attaching and detaching: weights go, come back bit for bit, and nothing changes where either fails."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from attached import answer_with, peer_of
from hostile import HostileTransport

import tsqp
from benchmarks.any_decoder import build, logits
from tsqp.decoder.api import Attached
from tsqp.errors import ConfigError, InputError, ModelMismatchError, SetupError, WeightsError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The linear map of the tiny LLaMA, whose head is tied."""
    out = tmp_path_factory.mktemp("maps") / "map"
    tsqp.export(build("Llama"), out)
    return out


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: Any, before: dict[str, torch.Tensor]) -> None:
    """The same classes, tensors and ties; every bit."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].view(torch.uint8), value.view(torch.uint8)) for name, value in before.items())
    assert not any(type(module).__name__.startswith("Remote") for module in model.modules())


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mixtral", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detaching_gives_every_bit_back(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    model.get_parameter(next(path for path, value in model.named_parameters() if value.ndim > 1)).requires_grad_(False)
    before, wanted = state(model), {path: value.requires_grad for path, value in model.named_parameters()}
    plain, tied = logits(model), model.lm_head.weight is model.get_input_embeddings().weight
    attached = tsqp.attach(model, level="local")
    assert any(parameter.is_meta for parameter in model.parameters())
    tsqp.detach(model)
    assert_unchanged(model, before)
    assert {path: value.requires_grad for path, value in model.named_parameters()} == wanted
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(logits(model), plain)
    assert not attached.directory.exists(), "a temporary map is removed"


def test_weights_that_moved_are_freed() -> None:
    model = build("Mixtral")
    moved = {
        name: weakref.ref(value)
        for name, value in model.named_parameters()
        if value.ndim > 1 and "embed_tokens" not in name and ".gate." not in name
    }
    size = sum(ref().nbytes for ref in moved.values())  # type: ignore[union-attr]
    with tsqp.attach(model, level="local", accept_expert_leak=True) as attached:
        gc.collect()
        assert [name for name, ref in moved.items() if ref() is not None] == []
        assert attached.freed_bytes == size
        assert sum(value.nbytes for value in model.parameters() if not value.is_meta) < size


def test_a_tied_head_moves_and_its_table_stays(directory: Path) -> None:
    model = build("Llama")
    table = model.model.embed_tokens.weight
    with tsqp.attach(model, level="local", directory=directory) as attached:
        assert "lm_head" in attached.moved
        assert model.lm_head.weight.is_meta
        assert model.model.embed_tokens.weight is table
        assert attached.freed_bytes == sum(
            value.nbytes for name, value in build("Llama").named_parameters() if "proj" in name
        )


def test_what_moved_and_stayed_is_said(directory: Path) -> None:
    with tsqp.attach(build("Llama"), level="local", directory=directory) as attached:
        assert repr(attached).startswith("attached at local: 15 modules moved in 9 groups, 0.1 MB freed; stayed:\n")
        assert "model.embed_tokens: an embedding table" in repr(attached)
        assert len(attached.groups) == 9
    assert directory.exists(), "a map that was named is kept"


def test_a_model_is_attached_once(directory: Path) -> None:
    model = build("Llama")
    attached = tsqp.attach(model, level="local", directory=directory)
    with pytest.raises(InputError, match="attached already"):
        tsqp.attach(model, level="local")
    with pytest.raises(InputError, match="attached already"):
        tsqp.export(model, directory.parent / "other")
    tsqp.detach(model)
    attached.detach()  # again does nothing
    with pytest.raises(InputError, match="not attached"):
        tsqp.detach(model)
    tsqp.attach(model, level="local", directory=directory).close()


def test_a_map_of_other_weights_is_refused(directory: Path) -> None:
    model = build("Llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    before = state(model)
    with pytest.raises(WeightsError, match="the linear map of another model"):
        tsqp.attach(model, level="local", directory=directory)
    assert_unchanged(model, before)


@pytest.mark.parametrize("folder", ["enclave", "floats"])
def test_a_map_with_a_part_of_another_is_refused(folder: str, tmp_path: Path) -> None:
    model, other = build("Llama"), tmp_path / "other"
    tsqp.export(build("Llama").to(torch.bfloat16), other)
    tsqp.export(model, tmp_path / "mixed")
    for path in (other / folder).iterdir():
        (tmp_path / "mixed" / folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(WeightsError, match="the linear map of another model"):
        tsqp.attach(model, level="local", directory=tmp_path / "mixed")


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_where_weights_cannot_be_read_the_model_stays_attached(damage: str, tmp_path: Path) -> None:
    model = build("Llama")
    before = state(model)
    attached = tsqp.attach(model, level="local", directory=tmp_path / "map")
    ours, file = logits(model), tmp_path / "map/floats/weights.safetensors"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(WeightsError):
        attached.detach()
    assert torch.equal(logits(model), ours)
    file.write_bytes(content)
    attached.detach()
    assert_unchanged(model, before)


def test_a_worker_of_another_model_is_refused_and_nothing_is_changed(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("Llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    before = state(model)
    for level in ("open", "verified"):
        address = answer_with(peer_of(directory, level), monkeypatch)
        with pytest.raises(ModelMismatchError, match="holds model"):
            tsqp.attach(model, address, level, directory=tmp_path / "map")
    assert_unchanged(model, before)


def test_a_worker_in_another_dtype_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = answer_with(peer_of(directory, "open", torch.bfloat16), monkeypatch)
    with pytest.raises(ModelMismatchError, match="computes in bfloat16, this side asks for float32"):
        tsqp.attach(build("Llama"), address, "open", directory=directory)


def test_a_model_may_be_asked_for_by_its_digest(directory: Path) -> None:
    digest = json.loads((directory / "enclave/linears.json").read_text(encoding="utf-8"))["source_digest"]
    with pytest.raises(ModelMismatchError, match="TSQP_MODEL_DIGEST"):
        tsqp.attach(build("Llama"), level="local", directory=directory, model_digest=digest)


def test_experts_at_masked_must_be_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Mixtral")
    before = state(model)
    with pytest.raises(ConfigError, match="accept_expert_leak=True"):
        tsqp.attach(model, level="masked")
    assert_unchanged(model, before)
    tsqp.export(model, tmp_path / "map")
    address = answer_with(peer_of(tmp_path / "map", "verified"), monkeypatch)
    tsqp.attach(model, address, "verified", directory=tmp_path / "map").close()
    tsqp.attach(model, address, "masked", directory=tmp_path / "map", accept_expert_leak=True).close()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"level": "monolithic"}, "cannot be attached at monolithic"),
        ({"level": "nowhere"}, "unknown level"),
        ({"worker_keys": "a"}, "no setting 'worker_keys'"),
        ({"worker_key": "a"}, "without its address"),
        ({"level": "verified", "masks": "enclave"}, "is for the level masked"),
        ({"level": "masked", "wire_dtype": "int8"}, "is for the level open"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        tsqp.attach(build("Llama"), **options)


def test_a_directory_that_exists_is_not_written_to(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="exists already"):
        tsqp.export(build("Llama"), directory)
    with pytest.raises(WeightsError, match=r"no floats/weights\.safetensors"):
        tsqp.attach(build("Llama"), level="local", directory=tmp_path)


def test_a_model_that_is_forgotten_parts_from_its_worker(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peer_of(directory, "open")
    links: list[HostileTransport] = []
    link = peer.link

    def noted() -> HostileTransport:
        links.append(link())
        return links[-1]

    monkeypatch.setattr(peer, "link", noted)
    model = build("Llama")
    attached: Attached | None = tsqp.attach(model, answer_with(peer, monkeypatch), "open", directory=directory)
    assert attached is not None
    del model, attached
    gc.collect()
    assert links
    assert all(each.closed for each in links)


def test_importing_tsqp_alone_loads_no_torch() -> None:
    program = "import sys, tsqp; assert 'torch' not in sys.modules; tsqp.attach; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'attached'"):
        _ = tsqp.attached


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SetupError, match=r"pip install tsqp\[reference\]"):
        tsqp.attach(model, level="local")
