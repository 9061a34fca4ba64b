"""How large an enclave is said to have to be: what follows from the architecture, and what the command tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from workers import packed_tiny

from tsqp.cli import app
from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine.memory import memory
from tsqp.errors import ConfigError
from tsqp.model.architecture import LlamaConfig, linear_groups, parse_config
from tsqp.model.shape import shape_of
from tsqp.reports import schema
from tsqp.sizing import LEVELS, EnclaveSize, enclave_size

ENGINE = EngineConfig()
SHAPES = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
KV_HEADS = {"135M": 3, "1B": 8, "8B": 8}


def shape(name: str) -> LlamaConfig:
    vocabulary = 49152 if name == "135M" else 128256
    own = {"model_type": "llama", "vocab_size": vocabulary, "num_key_value_heads": KV_HEADS[name]}
    return parse_config({**SHAPES[name], **own}, name)


def sized(name: str, level: str, *, threads: int = 4, engine: EngineConfig = ENGINE, **settings: Any) -> EnclaveSize:
    config = EnclaveConfig(level=level, **settings)
    item = 4 if name == "135M" else 2
    return enclave_size(shape(name), config, engine, threads=threads, embedding_item_bytes=item)


@pytest.mark.parametrize(
    ("name", "level", "size"),
    [
        ("135M", "masked", 4),
        ("135M", "verified", 4),
        ("135M", "local", 4),
        ("135M", "open", 4),
        ("1B", "masked", 8),
        ("1B", "verified", 4),
        ("1B", "local", 16),
        ("1B", "open", 4),
        ("8B", "masked", 16),
        ("8B", "verified", 8),
        ("8B", "local", 64),
        ("8B", "open", 4),
    ],
)
def test_the_table_in_the_documentation(name: str, level: str, size: int) -> None:
    found = sized(name, level)
    assert found.enclave_bytes == size << 30
    text = (Path(__file__).parents[2] / "docs" / "gramine.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| {name}, `{level}` |"))
    assert row.split("|")[2:4] == [f" {found.needed_bytes / 1e9:.1f} GB ", f" {size}G "]
    assert found.max_threads == 56


@pytest.mark.parametrize("level", LEVELS)
def test_an_enclave_is_a_power_of_two_with_a_fifth_to_spare(level: str) -> None:
    found = sized("1B", level)
    assert found.enclave_bytes.bit_count() == 1
    assert found.needed_bytes * 1.2 <= found.enclave_bytes < found.needed_bytes * 2.4 + 1
    assert found.needed_bytes == sum(found.parts.values())
    assert all(found.parts.values())


def test_a_masked_enclave_holds_codes_only_if_it_makes_its_masks() -> None:
    codes = sum(group.rows * group.in_features for group in linear_groups(shape("1B")))
    own, dealt = sized("1B", "masked"), sized("1B", "masked", dealers=("a:1", "b:1"))
    assert own.parts["codes"] == codes
    assert "codes" not in dealt.parts
    assert dealt.parts["a step"] > own.parts["a step"]
    assert "codes" not in sized("1B", "verified").parts
    assert own.parts["embedding table"] == 2 * 128256 * 2048


def test_the_engines_memory_is_what_the_engine_says() -> None:
    told = memory(shape("8B"), EnclaveConfig(level="masked"), ENGINE)
    found = sized("8B", "masked")
    assert found.parts["keys and values"] == told.cache_bytes
    assert found.parts["masks"] == told.mask_bytes > 0


def test_each_thread_that_computes_needs_room_in_every_team() -> None:
    assert sized("1B", "masked", threads=12).max_threads - sized("1B", "masked", threads=4).max_threads == 32
    assert sized("1B", "masked", threads=1).max_threads >= 3 + 4 + 2 + 32


def test_each_further_worker_has_checks_masks_links_and_threads_of_its_own_and_no_codes() -> None:
    one, three = sized("135M", "masked"), sized("135M", "masked", engine=EngineConfig(workers=("a:1", "b:1", "c:1")))
    assert three.parts["checks"] == 3 * one.parts["checks"]
    assert three.parts["masks"] == 3 * one.parts["masks"]
    assert three.parts["codes"] == one.parts["codes"]
    assert three.parts["a step"] == one.parts["a step"]
    # Two links, two threads that refill with a team each, and one with a team and a link that asks how they are: 18.
    assert three.max_threads - one.max_threads == 16
    assert one.max_threads == 56  # of which it needs 49


def test_floats_of_two_bytes_take_half() -> None:
    assert sized("1B", "local").parts["weights"] == 2 * sized("1B", "local", dtype="bfloat16").parts["weights"]


def test_no_enclave_runs_the_reference() -> None:
    with pytest.raises(ConfigError, match="no enclave runs at the level monolithic"):
        sized("1B", "monolithic")


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["size", *words])


def test_the_command_prints_what_its_schema_says(tiny_llama: Path) -> None:
    report = json.loads(run("--model", str(tiny_llama), "--threads", "2", "--json").stdout)
    assert set(report) == set(schema()["$defs"]["SizeReport"]["required"])
    assert (report["level"], report["threads"], report["max_running"]) == ("masked", 2, 64)
    assert report["needed_bytes"] == sum(part["bytes"] for part in report["parts"])


def test_the_command_says_what_to_write_into_a_manifest(tiny_llama: Path) -> None:
    out = run("--model", str(tiny_llama), "--level", "open").stdout
    assert 'sgx.enclave_size = "4G"' in out
    assert "sgx.max_threads = 56" in out
    assert "With EDMM" in out


def test_a_config_is_enough_and_a_packed_model_is_known(tiny_llama: Path, tmp_path: Path) -> None:
    raw = json.loads((tiny_llama / "config.json").read_text(encoding="utf-8"))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text(json.dumps({**raw, "dtype": "bfloat16"}), encoding="utf-8")
    assert (shape_of(str(alone)).embedding_item_bytes, shape_of(str(alone)).packed) == (2, False)
    packed = packed_tiny(tiny_llama, tmp_path / "packed")
    assert shape_of(str(packed)).packed
    assert shape_of(str(packed / "enclave")).embedding_item_bytes == 4
    report = json.loads(run("--model", str(packed), "--level", "local", "--json").stdout)
    assert "codes" in {part["name"] for part in report["parts"]}
