"""The scripts of benchmarks/ run, at sizes that mean nothing; README's table is the newest result's."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_models import tiny_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tsqp.config import WIRE_DTYPES
from tsqp.measurements import Hardware
from tsqp.reports import dumps

ROOT = Path(__file__).parents[2]


def script(name: str) -> dict[str, Any]:
    """Load a script without running it."""
    return runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))


def run(name: str, *arguments: object) -> dict[str, Any]:
    """Run a script; its report says when, what, how and on which machine, as it was asked."""
    words = [f"benchmarks/{name}.py", *map(str, arguments)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert len(report["date"]) == len("2026-01-01")
    assert report["commit"]
    assert report["command"].startswith(f"python {words[0]} ")
    assert set(words[1:]) <= set(report["command"].split())
    assert msgspec.convert(report["hardware"], Hardware).cores > 0
    return report


@pytest.fixture(scope="module")
def tiny_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reads any text."""
    directory = tiny_checkpoint(tmp_path_factory.mktemp("words") / "model")
    tokenizer = Tokenizer(WordLevel({"the": 0, "Alice": 1, "other": 2}, unk_token="other"))  # noqa: S106
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_replicas() -> None:
    sizes = "--workers 1 2 --rounds 1 --requests 3 --tokens 2 --fixed-ms 0.5 --row-ms 0 --level masked"
    report = run("replicas", *sizes.split())
    assert set(report["levels"]) == {"masked"}
    assert set(report["levels"]["masked"]["gain"]) == {"1", "2"}
    assert all(rate > 0 for rate in report["levels"]["masked"]["tokens_per_s"].values())


def test_worker_throughput(tiny_llama: Path) -> None:
    report = run("worker_throughput", "--model", tiny_llama, "--clients", 3, "--rounds", 1, "--prefills", 2)
    assert set(report["levels"]) == {"open", "exact"}
    for level in report["levels"].values():
        assert set(level["prefills_per_s"]) == {"1", "3"}
        assert all(rate > 0 for rate in level["prefills_per_s"].values())
        assert level["requests_per_product"] >= 1


def test_exact_gemm() -> None:
    report = run("exact_gemm", "--rounds", 1, "--shape", "3x40x33", "1x17x9")
    labels = {f"{shape}, {threads}" for shape in ("3 x 40 x 33", "1 x 17 x 9") for threads in ("2 threads", "1 thread")}
    assert set(report["median_us"]) == set(report["times_torch_float32"]) == labels
    for row in report["times_torch_float32"].values():
        assert {"int8 limbs", "float64"} <= set(row)
        assert row["torch float32"] == 1.0


def test_wire_dtypes(tiny_words: Path) -> None:
    report = run("wire_dtypes", "--model", tiny_words, "--window", 8, "--windows", 2)
    assert report["tokens"] == 16
    assert set(report["wire_dtypes"]) == set(WIRE_DTYPES)
    errors = {name: each["logit_error"] for name, each in report["wire_dtypes"].items()}
    assert errors["float32"] < errors["float16"] < errors["bfloat16"]


def test_perplexity(tiny_words: Path) -> None:
    report = run("perplexity", "--model", tiny_words, "--window", 8)
    assert report["tokens"] % 8 == 0
    assert report["perplexity_int8_exact"] > 1


def test_large_shape() -> None:
    report = run("large_shape", "tiny", "--levels", "open", "masked", "--tokens", 5, "--rounds", 1)
    assert set(report["median_s"]) == set(report["times_open"]) == {"open", "masked"}
    for parts in report["median_s"].values():
        assert 0 <= parts["pcie_s"] < parts["worker_s"] < parts["prefill_s"]
    assert report["times_open"]["open"] == 1.0


def test_the_newest_result_is_of_128_tokens(tmp_path: Path) -> None:
    """The command's name for others, as of 4096 tokens, sorts behind every date."""
    table = script("readme_table")
    for name in ("2026-01-02", "2026-01-01", "1024-2026-01-03", "4096-2026-01-03"):
        report = msgspec.structs.replace(table["newest"](), date=name)
        (tmp_path / f"prefill-{name}.json").write_text(dumps(report), encoding="utf-8")
    assert table["newest"](tmp_path).date == "2026-01-02"


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_readme_holds_the_table_of_the_newest_result(name: str) -> None:
    table = script("readme_table")
    block = table["BLOCK"].search((ROOT / name).read_text(encoding="utf-8"))
    assert block is not None
    assert block[0] == f"{block[1]}{table['table'](table['newest'](), table['MEANING'][name])}{block[2]}", "make readme"


def test_tensor_parallel(tiny_llama: Path) -> None:
    sizes = ("--ranks", 1, 2, "--rounds", 1, "--level", "exact", "--faults", "off")
    report = run("tensor_parallel", "--model", tiny_llama, *sizes)
    exact = report["levels"]["exact"]
    assert exact["same_bits"] is True
    assert {ranks: len(each["resident_mb"]) for ranks, each in exact["ranks"].items()} == {"1": 1, "2": 2}
    assert all(each["prefill_ms"] > 0 for each in exact["ranks"].values())


def test_many_clients(tiny_llama: Path) -> None:
    sizes = ("--rounds", 1, "--seconds", 0.2, "--processes", 1, "--level", "exact")
    report = run("many_clients", "--model", tiny_llama, "--clients", 1, 3, *sizes)
    (level,) = report["levels"].values()
    assert set(level["clients"]) == {"1", "3"}
    assert all(each["throughput"] > 0 and 0 < each["least_share"] <= 1 for each in level["clients"].values())
    assert level["refused"] == 0
