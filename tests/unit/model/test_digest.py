"""The model digest depends on the model alone, and its cache on the files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_json, tiny_checkpoint

from tsqp.model import digest
from tsqp.model.architecture import read_config
from tsqp.model.digest import model_digest
from tsqp.model.weights import INDEX_NAME, SINGLE_NAME, Checkpoint


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def digest_of(directory: Path) -> str:
    return model_digest(read_config(directory), Checkpoint(directory))


def steps_of(directory: Path) -> list[float]:
    """Digest a directory; return the progress reported, which is empty when the cache answers."""
    steps: list[float] = []
    model_digest(read_config(directory), Checkpoint(directory), steps.append)
    return steps


def flip_one_bit(directory: Path, name: str) -> None:
    """Flip the lowest bit of a tensor's last element."""
    tensors = load_file(directory / SINGLE_NAME)
    bits = tensors[name].view(-1).view(torch.int32)
    bits[-1] ^= 1
    save_file(tensors, directory / SINGLE_NAME, metadata={"format": "pt"})


def test_is_hexadecimal(tmp_path: Path) -> None:
    value = digest_of(tiny_checkpoint(tmp_path / "a"))
    assert len(value) == 64
    assert int(value, 16) > 0


def test_known_value(tmp_path: Path) -> None:
    """Enclave and worker may run different releases: a model's digest must not change between them unnoticed."""
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 2, "vocab_size": 3}
    directory = tiny_checkpoint(tmp_path / "a", num_attention_heads=2, num_key_value_heads=1, **sizes)
    tensors = load_file(directory / SINGLE_NAME)
    constant = {name: torch.full_like(value, 0.5) for name, value in tensors.items()}
    save_file(constant, directory / SINGLE_NAME, metadata={"format": "pt"})
    assert digest_of(directory) == "490105a5fd6301d9b8ad09d60fd3e7d46c8bad85e0d5963b1b35dbbe6373c6a2"


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_same_weights_in_other_files_are_the_same_model(tmp_path: Path, options: dict[str, Any]) -> None:
    one = tiny_checkpoint(tmp_path / "one", **options)
    many = tiny_checkpoint(tmp_path / "many", max_shard_size="20KB", **options)
    assert (many / INDEX_NAME).exists()
    assert digest_of(one) == digest_of(many)


def test_unused_tensors_do_not_count(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "a")
    before = digest_of(directory)
    tensors = {**load_file(directory / SINGLE_NAME), "model.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors, directory / SINGLE_NAME)
    assert digest_of(directory) == before


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.2.self_attn.k_proj.bias", "lm_head.weight"]
)
def test_one_bit_makes_another_model(tmp_path: Path, name: str) -> None:
    directory = tiny_checkpoint(tmp_path / "a", attention_bias=True)
    before = digest_of(directory)
    flip_one_bit(directory, name)
    assert digest_of(directory) != before


def test_another_stored_dtype_is_another_model(tmp_path: Path) -> None:
    digests = {digest_of(tiny_checkpoint(tmp_path / str(d), stored=d)) for d in (torch.float32, torch.bfloat16)}
    assert len(digests) == 2


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 1e-6), ("max_position_embeddings", 99)])
def test_another_config_is_another_model(tmp_path: Path, key: str, value: float) -> None:
    directory = tiny_checkpoint(tmp_path / "a")
    before = digest_of(directory)
    edit_json(directory / "config.json", lambda config: config.update({key: value}))
    assert digest_of(directory) != before


def test_settings_the_model_does_not_use_do_not_count(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "a")
    before = digest_of(directory)
    edit_json(directory / "config.json", lambda config: config.update({"transformers_version": "4.0"}))
    assert digest_of(directory) == before


# The cache -----------------------------------------------------------------------------------------------------------


def test_second_time_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_checkpoint(tmp_path / "a")
    first = digest_of(directory)
    monkeypatch.setattr(digest, "_compute", None)
    assert digest_of(directory) == first


def test_progress_ends_at_one_and_is_silent_when_cached(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "a")
    steps = steps_of(directory)
    assert steps == sorted(steps)
    assert steps[-1] == 1.0
    assert steps_of(directory) == []


def test_replaced_file_of_the_same_size_is_read_again(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "a")
    first, file = digest_of(directory), directory / SINGLE_NAME
    before = file.stat()
    flip_one_bit(directory, "model.norm.weight")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert file.stat().st_size == before.st_size
    assert digest_of(directory) != first


def test_file_of_another_size_is_read_again(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "a")
    steps_of(directory)
    file = directory / SINGLE_NAME
    before = file.stat()
    tensors = {**load_file(file), "unused": torch.ones(1000)}
    save_file(tensors, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert steps_of(directory) != []


def test_nothing_partial_is_left_in_the_cache(tmp_path: Path, own_cache: Path) -> None:
    value = digest_of(tiny_checkpoint(tmp_path / "a"))
    assert [file.read_text(encoding="ascii") for file in (own_cache / "digests").iterdir()] == [value]
