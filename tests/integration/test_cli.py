"""The command line: its JSON contract, and one clear sentence for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_models import edit_json, tiny_checkpoint
from typer.testing import CliRunner
from workers import StartWorker, free_port, running_worker

from tsqp.cli import app
from tsqp.reports import DoctorReport, ErrorReport, PrefillReport, schema

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> tuple[int, str, str]:
    """Run a command in this process; return exit code, standard output and standard error."""
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def report(*arguments: object) -> PrefillReport:
    code, out, err = run("prefill", *arguments, "--json")
    assert code == 0, err
    return msgspec.json.decode(out, type=PrefillReport)


@pytest.mark.parametrize("level", ["open", "local", "monolithic"])
def test_prefill_prints_one_object_with_the_promised_fields(
    worker: StartWorker, bundled_directory: Path, level: str
) -> None:
    where = ["--worker", worker(bundled_directory)] if level == "open" else []
    options = ["--model", bundled_directory, "--level", level, "--prompt", "The capital of France is", "--repeat", 3]
    code, out, err = run("prefill", *options, *where, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    fields = json.loads(out)
    assert set(fields) == set(schema()["$defs"]["PrefillReport"]["required"])
    got = msgspec.json.decode(out, type=PrefillReport)
    assert (got.level, got.tokens, got.batch, got.repeats, len(got.prefill_s_all)) == (level, 5, 1, 3, 3)
    assert got.next_text == " Paris"
    assert got.tokens_per_s == pytest.approx(5 / got.prefill_s)
    assert got.enclave_s + got.waited_s in [pytest.approx(each) for each in got.prefill_s_all]
    assert got.wire_s == pytest.approx(max(0.0, got.waited_s - got.worker_s))
    assert got.micro_batches == 1
    assert got.round_trips == (32 if level == "open" else 0)


@pytest.mark.parametrize("level", ["verified", "masked"])
def test_the_integer_levels_report_what_protection_did(level: str, tiny_llama: Path) -> None:
    got = report("--model", tiny_llama, "--level", level, "--tokens", 9, "--repeat", 2)
    rows = 9 * 4 * 3 - 3 * 8 + 1  # the last layer drops all positions but the last after qkv; one head row
    masked = level == "masked"
    assert (got.level, got.masks, got.dtype) == (level, "enclave" if masked else None, "int8")
    assert got.verified_rows == rows
    assert got.mask_rows_used == (rows if masked else 0)
    assert (got.mask_fill_s > 0) == masked
    assert (got.mask_s > 0) == masked
    assert got.ahead_s > 0
    assert min(got.quantise_s, got.check_s) > 0
    assert got.round_trips == 13
    assert got.quantise_s + got.mask_s + got.ahead_s + got.check_s < got.enclave_s


def test_masked_runs_with_dealers_and_keys(tiny_llama: Path, tmp_path: Path) -> None:
    code, _, _ = run("keys", "new", "dealer", "--out", tmp_path)
    assert code == 0
    options = ["--model", tiny_llama, "--level", "masked", "--tokens", 6, "--repeat", 1]
    enclave = report(*options)
    with running_worker(tiny_llama, "ipc", command="dealer", key=str(tmp_path / "dealer.key_secret")) as dealer:
        got = report(*options, "--dealer", dealer, "--dealer-key", tmp_path / "dealer.key", "--mask-pool", 0)
        assert (got.masks, got.next_tokens) == ("dealers", enclave.next_tokens)
        assert got.mask_wait_s > 0
        assert got.mask_fill_s == 0
        code, out, err = run("prefill", *options, "--dealer", dealer, "--json")
        assert code == 3
        assert "wants an encrypted link" in err
    code, out, err = run("prefill", *options, "--dealer", f"127.0.0.1:{free_port()}", "--json")
    assert code == 4
    assert "its seeds travel in clear" in err
    assert json.loads(out)["error"]["type"] == "TransportTimeoutError"


def test_human_output_of_masked_says_what_protection_cost(tiny_llama: Path) -> None:
    code, out, _ = run("prefill", "--model", tiny_llama, "--level", "masked", "--tokens", 5)
    assert code == 0
    for words in ("rows by the enclave", "of the prefill", "miss rate of 2^-61"):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mask-pool", "pool.bin"), "lives in memory only"),
        (("--mask-pool", "-1"), "expected a number of rows, 0 or more"),
        (("--level", "open", "--masks", "enclave"), "add --level masked or leave it out"),
        (("--level", "open", "--dealer", "127.0.0.1:1"), "add --level masked or leave it out"),
        (("--offload-attention",), "--offload-attention is for the level open"),
        (("--mask-pool", "100000", "--mask-memory", "1000000"), "Lower --mask-pool or raise --mask-memory"),
        (("--masks", "dealers"), "needs at least one --dealer"),
        (("--masks", "moon"), "unknown masks 'moon'"),
        (("--dealer", "a.example:1", "--dealer-key", "x", "--dealer-key", "y"), "1 dealers and 2 dealer keys"),
        (("--worker", "127.0.0.1:9", "--dealer", "localhost:9"), "same address as the worker"),
        (("--codes", "/no/such/packed"), "worker/"),
    ],
)
def test_mistakes_about_masks_are_one_sentence(tiny_llama: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run("prefill", "--model", tiny_llama, "--level", "masked", "--tokens", 3, *arguments, "--json")
    assert code == 3
    assert message in err
    assert "Traceback" not in err
    assert msgspec.json.decode(out, type=ErrorReport).error.exit_code == 3


def test_prefill_starts_and_stops_its_own_worker(tiny_llama: Path) -> None:
    got = report("--model", tiny_llama, "--tokens", 7, "--batch", 3)
    assert (got.tokens, got.batch, len(got.next_tokens), got.next_text) == (7, 3, 3, None)
    assert got.worker_s > 0


def test_a_prompt_is_cut_to_tokens(bundled_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("One two three four five six seven eight nine ten", encoding="utf-8")
    got = report("--model", bundled_directory, "--level", "local", "--prompt-file", file, "--tokens", 4, "--repeat", 1)
    assert got.tokens == 4


def test_human_output_says_where_the_time_went(worker: StartWorker, tiny_llama: Path) -> None:
    code, out, _ = run("prefill", "--model", tiny_llama, "--worker", worker(tiny_llama), "--tokens", 4)
    assert code == 0
    assert "enclave" in out
    assert "5 round trips" in out


def test_committed_schema_is_the_one_in_force() -> None:
    committed = json.loads((ROOT / "docs" / "json-schema.json").read_text(encoding="utf-8"))
    assert committed == schema(), "run 'make schema'"


def test_doctor_reports_and_fails_on_a_missing_model(tiny_llama: Path, tmp_path: Path) -> None:
    code, out, _ = run("doctor", "--model", tiny_llama, "--json")
    good = msgspec.json.decode(out, type=DoctorReport)
    assert (code, good.ok) == (0, True)
    names = {check.name for check in good.checks}
    system = {"python", "torch", "native kernels", "cuda", "memory", "port", "shared memory"}
    assert names == system | {"model", "sgx", "gramine"}
    code, out, _ = run("doctor", "--model", tmp_path / "none", "--json")
    bad = msgspec.json.decode(out, type=DoctorReport)
    assert (code, bad.ok) == (3, False)
    assert "does not exist" in next(check.advice for check in bad.checks if check.name == "model")


def _without_shard(directory: Path) -> None:
    sorted(directory.glob("model-*.safetensors"))[1].unlink()


def _of_another_kind(directory: Path) -> None:
    edit_json(directory / "config.json", lambda config: config.update(model_type="mamba"))


def _deeper(directory: Path) -> None:
    edit_json(directory / "config.json", lambda config: config.update(num_hidden_layers=4))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing-shard": (_without_shard, "has no file 'model-00002-of-"),
    "another-kind": (_of_another_kind, "'mamba'"),
    "missing-tensor": (_deeper, "has no tensor 'model.layers.3."),
}


@pytest.mark.parametrize(("break_it", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("command", [("prefill", "--level", "local"), ("worker",)], ids=["prefill", "worker"])
def test_broken_models_are_named(
    tmp_path: Path, command: tuple[str, ...], break_it: Callable[[Path], None], message: str
) -> None:
    directory = tiny_checkpoint(tmp_path / "model", max_shard_size="20KB")
    break_it(directory)
    listen = ("--listen", f"127.0.0.1:{free_port()}") if command[0] == "worker" else ()
    code, out, err = run(*command, *listen, "--model", directory, "--json")
    assert code == 3
    assert message in err
    assert message in msgspec.json.decode(out, type=ErrorReport).error.message


MISTAKES: dict[str, tuple[list[object], int, str]] = {
    "no-model": (["--model", "/no/such/model"], 3, "'/no/such/model' does not exist"),
    "dtype": (["--dtype", "float8"], 3, "unknown dtype 'float8': expected one of float32, float16, bfloat16"),
    "level": (
        ["--level", "secret"],
        3,
        "unknown level 'secret': expected one of open, local, verified, masked, monolithic",
    ),
    "url": (["--worker", "carrier-pigeon://x"], 3, "unknown scheme 'carrier-pigeon'"),
    "port": (["--worker", "localhost:99999"], 3, "port from 1 to 65535"),
    "too-long": (["--level", "local", "--tokens", 5000], 3, "this model takes 1 to 1024"),
    "no-tokens": (["--level", "local", "--tokens", 0], 3, "0 tokens"),
    "batch": (["--batch", 0], 3, "--batch 0"),
    "repeat": (["--level", "local", "--repeat", 0], 3, "--repeat 0"),
    "threads": (["--level", "local", "--threads", 0], 3, "threads 0"),
    "no-tokenizer": (["--level", "local", "--prompt", "hello"], 3, "no tokenizer.json"),
    "both-prompts": (["--prompt", "a", "--prompt-file", "b"], 3, "not both"),
    "no-prompt-file": (["--prompt-file", "/no/such/file"], 3, "cannot read /no/such/file"),
    "unknown-option": (["--speed", "11"], 2, "No such option"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_get_one_sentence(tiny_llama: Path, arguments: list[object], code: int, message: str) -> None:
    model = [] if "--model" in arguments else ["--model", tiny_llama]
    got, out, err = run("prefill", *model, *arguments)
    assert got == code
    assert message in err
    assert not out
    assert "Traceback" not in err


def test_prompt_file_that_is_not_text(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "binary"
    file.write_bytes(b"abc\xff\xfe")
    code, _, err = run("prefill", "--model", tiny_llama, "--prompt-file", file)
    assert code == 3
    assert "not UTF-8" in err


@pytest.mark.parametrize("words", [["generate"], ["prefill", "--prompt"]], ids=lambda words: words[0])
def test_a_prompt_that_is_not_utf8_is_one_sentence(words: list[str], bundled_directory: Path) -> None:
    """As a shell hands it over whose terminal writes in another encoding."""
    command: list[str | bytes] = [
        sys.executable,
        "-m",
        "tsqp",
        *words,
        b"caf\xe9",
        "--level",
        "local",
        "--model",
        str(bundled_directory),
    ]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 3
    assert b"Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(b"error: the text is not UTF-8 from character 4 on")
    assert b"caf" not in done.stdout + done.stderr


def test_settings_come_from_flag_then_environment_then_file(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tsqp.toml"
    file.write_text(f'[enclave]\nmodel = "{tiny_llama}"\nlevel = "local"\ndtype = "float16"\n', encoding="utf-8")
    monkeypatch.setenv("TSQP_CONFIG", str(file))
    assert report("--tokens", 3, "--repeat", 1).dtype == "float16"
    monkeypatch.setenv("LLAMA_DTYPE", "bfloat16")
    assert report("--tokens", 3, "--repeat", 1).dtype == "bfloat16"
    assert report("--tokens", 3, "--repeat", 1, "--dtype", "float32").dtype == "float32"


def test_an_unknown_variable_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_LEVLE", "local")
    code, _, err = run("prefill", "--model", tiny_llama)
    assert code == 3
    assert "TSQP_LEVLE is not a TSQP setting" in err


def test_a_port_in_use_is_named(worker: StartWorker, tiny_llama: Path) -> None:
    address = worker(tiny_llama, "tcp")
    code, _, err = run("worker", "--model", tiny_llama, "--listen", address)
    assert code == 3
    assert f"port {address.rpartition(':')[2]} is already in use" in err


def test_a_worker_that_cannot_start_is_reported_by_prefill(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_GPU_DEVICE", "cuda:99")
    code, _, err = run("prefill", "--model", tiny_llama, "--tokens", 4)
    assert code == 3
    assert "the local worker did not start: device cuda:99 was asked for" in err


@pytest.mark.parametrize("command", ["worker", "prefill", "bench", "doctor"])
def test_help_is_useful_and_quick_to_ask_for(command: str) -> None:
    """Help must not load torch: it is what people type first."""
    code = (
        "import sys; from tsqp.cli import main\n"
        f"sys.argv = ['tsqp', '{command}', '--help']\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


def test_json_of_every_command_is_described() -> None:
    described: dict[str, Any] = schema()["$defs"]
    benchmarks = {"BenchReport", "LevelsReport", "ScalingReport", "OverlapReport", "TransportReport"}
    assert {"WorkerReady", "PrefillReport", "DoctorReport", "ErrorReport"} | benchmarks <= set(described)
    assert all("description" in described[name] for name in described)


def test_messages_are_not_read_as_markup(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "odd.toml"
    file.write_text('["[/b]bold"]\n', encoding="utf-8")
    monkeypatch.setenv("TSQP_CONFIG", str(file))
    code, _, err = run("prefill", "--model", tiny_llama)
    assert code == 3
    assert "unknown table [[/b]bold]" in err
