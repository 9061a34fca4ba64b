"""What ``tsqp plan`` refuses, and what it says then."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tsqp.cli import app
from tsqp.plan.constants import load_constants, write_constants
from tsqp.plan.machines import load_machines
from tsqp.plan.models import known_models, model_shape
from tsqp.reports import schema

MACHINES = resources.files("tsqp.plan").joinpath("data", "machines.toml").read_text(encoding="utf-8")


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", "--tokens-per-s", "1", "--json", *words])


def refused(*words: str) -> str:
    done = run(*words)
    assert done.exit_code == 3, done.output
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == 3
    message: str = error["message"]
    return message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--gpu", "voodoo2"], "--gpu voodoo2 is not known: t4, l4, a10, l40s, a100-80gb, h100, h200 are. To add it,"),
        (["--users", "0"], "--users 0: expected a number from 1 to 1e+09."),
        (["--tokens-per-s", "-1"], "--tokens-per-s -1: expected a number from 0.001 to 10000."),
        (["--tokens-per-s", "nan"], "--tokens-per-s nan: expected a number"),
        (["--enclave-cores", "0"], "--enclave-cores 0: expected a number from 1 to 4096."),
        (["--enclave-memory", "inf"], "--enclave-memory inf: expected a number"),
        (["--link", "0"], "--link 0: expected a number from 0.001"),
        (["--latency", "-1"], "--latency -1: expected a number from 0"),
        (["--context", "1"], "--context 1: expected a number from 2"),
        (["--context", "9000"], "--context 9000: the model takes 8192 tokens at most, prompt and answer together."),
        (["--context", "100", "--prompt", "100"], "--prompt 100: expected at least 1, and less than the 100 tokens"),
        (["--level", "local"], "--level local: a plan is for a level with a worker, one of open, verified, masked."),
        (["--masks", "none"], "the level masked needs a source of masks, got 'none'"),
        (["--dealers", "0"], "--dealers 0: masks by dealers need a number of parties from 1 to 16"),
        (["--level", "open", "--masks", "enclave"], "--masks is for the level masked, this plan is for open"),
        (["--dtype", "int4"], "--dtype int4: expected one of float32, float16, bfloat16."),
        (["--rounds", "0"], "--rounds 0: expected a number from 1 to 1000."),
        (["--model", "gpt-9"], "there is no model 'gpt-9': expected smollm2, llama-3.2-1b, llama-3.1-8b"),
        (["--model", "missing/config.json"], "missing/config.json does not exist"),
        (["--machines", "missing.toml"], "--machines missing.toml: cannot read it (No such file or directory)."),
        (["--constants", "missing.json"], "--constants missing.json: cannot read it (No such file or directory)."),
        (["--measure", "--constants", "no/such/directory.json"], "expected the name of a file in a directory that"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(words: list[str], expected: str) -> None:
    assert expected in refused(*words)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected a JSON object"),
        ('{"model_type": "gpt2"}', "the model is of type 'gpt2'"),
        ('{"model_type": "llama", "hidden_size": 0}', "hidden_size is 0"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")
    for model in (path, tmp_path):
        message = refused("--model", str(model))
        assert expected in message
        assert str(path) in message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[prices]", "[prices", "not valid TOML"),
        ("memory_gb = 16", "memory_gb = 0", "Expected `float` > 0.0"),
        ("memory_gb = 16", "memory = 16", "unknown field `memory`"),
        ("busy = 0.7", "busy = 2.0", "Expected `float` <= 1.0"),
        ("link_hour = 0.10", "link_hour = -1", "Expected `float` >= 0.0"),
        ('currency = "USD"', "", "missing required field `currency`"),
    ],
)
def test_a_wrong_file_of_machines_is_told_what_is_wrong(old: str, new: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "machines.toml"
    assert old in MACHINES
    path.write_text(MACHINES.replace(old, new, 1), encoding="utf-8")
    message = refused("--machines", str(path))
    assert expected in message
    assert str(path) in message


def test_a_gpu_is_added_to_a_copy_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "machines.toml"
    table = MACHINES[MACHINES.index("[gpus.t4]") : MACHINES.index("[gpus.l4]")]
    path.write_text(MACHINES + "\n" + table.replace("gpus.t4", "gpus.voodoo2"), encoding="utf-8")
    assert json.loads(run("--machines", str(path), "--gpu", "Voodoo2").stdout)["gpu"] == "voodoo2"
    assert load_machines(path).gpu("voodoo2") == load_machines(None).gpu("t4")


def test_constants_are_written_and_read_and_others_refused(tmp_path: Path) -> None:
    path = tmp_path / "constants.json"
    own = load_constants(None)
    write_constants(own, path)
    assert load_constants(path) == own
    content = json.loads(path.read_text(encoding="utf-8"))
    for damaged, expected in (
        ({**content, "mask_word_s": -1.0}, "Expected `float` >= 0.0"),
        ({**content, "levels": {"open": content["levels"]["open"]}}, "have none for the level masked, only for open"),
        (strange_units(content), "it is of another version of TSQP"),
    ):
        path.write_text(json.dumps(damaged), encoding="utf-8")
        assert expected in refused("--constants", str(path))
    path.write_bytes(b"\xff{")
    assert "expected what tsqp plan --measure writes" in refused("--constants", str(path))


def strange_units(content: dict[str, Any]) -> dict[str, Any]:
    masked = content["levels"]["masked"]
    return {**content, "levels": {"masked": {**masked, "enclave": {"step": 1.0}}}}


def test_a_model_is_a_name_a_directory_or_a_file(tiny_llama: Path) -> None:
    assert set(known_models()) == {"smollm2", "llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b"}
    by_directory, by_file = model_shape(str(tiny_llama)), model_shape(str(tiny_llama / "config.json"))
    assert by_directory == by_file
    assert by_directory[0] == tiny_llama.name
    done = run("--model", str(tiny_llama / "config.json"), "--context", "64")
    assert json.loads(done.stdout)["model"] == tiny_llama.name


def test_the_bundled_model_is_as_its_name_says(bundled_directory: Path) -> None:
    named, bundled = (model_shape(model)[1].architecture for model in ("smollm2", str(bundled_directory)))
    assert named.rms_norm_eps == pytest.approx(bundled.rms_norm_eps)
    assert replace(named, rms_norm_eps=bundled.rms_norm_eps) == bundled


def test_the_report_is_what_its_schema_says() -> None:
    report = json.loads(run("--users", "10").stdout)
    assert set(report) == set(schema()["$defs"]["PlanReport"]["required"])
    assert report["loads"][0]["share"] == max(load["share"] for load in report["loads"])


def test_people_are_told_what_saturates_first_and_what_was_not_measured() -> None:
    out = CliRunner().invoke(app, ["plan", "--tokens-per-s", "1", "--users", "10"]).stdout
    report = json.loads(run("--users", "10").stdout)
    assert f"Saturates first: {report['loads'][0]['name']}" in out
    assert "h100: datasheet, not measured" in out
    assert "a million tokens" in out
