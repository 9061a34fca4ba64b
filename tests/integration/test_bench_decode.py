"""``tsqp bench decode`` on a tiny model: every ratio is there and follows from the runs; mistakes are named at once."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec
import pytest
from tiny_models import tiny_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from tsqp.cli import app
from tsqp.measurements import DecodeReport
from tsqp.prefill import SAMPLE_TEXT

VARIANTS = {
    "transformers-active": "",
    "transformers-passive": "",
    "local": "",
    "open": "",
    "masked": "ready",
    "masked-sustained": "made within",
    "masked-dealer-sustained": "made within",
}


def run(*arguments: object) -> tuple[int, str, str]:
    """Run ``tsqp bench decode`` in this process; return exit code, standard output and standard error."""
    result = CliRunner().invoke(app, ["bench", "decode", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaMA whose tokenizer knows the words of the built-in prompt."""
    directory = tiny_checkpoint(tmp_path_factory.mktemp("speaking"))
    split = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for word, _ in split.pre_tokenize_str(SAMPLE_TEXT))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["<unk>", *words])}, "<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page") / "page.html"


@pytest.fixture(scope="module")
def report(model: Path, page: Path) -> DecodeReport:
    options = ("--tokens", 20, "--batch", "3", "--rounds", 2, "--threads", 1, "--json", "--html", page)
    code, out, err = run("--model", model, *options)
    assert code == 0, err
    assert out.count("\n") == 1
    return msgspec.json.decode(out, type=DecodeReport)


def test_every_variant_is_measured_alone_and_together(report: DecodeReport) -> None:
    assert [(point.name, point.batch) for point in report.points] == [(name, n) for name in VARIANTS for n in (1, 3)]
    assert {point.name: point.masks for point in report.points} == VARIANTS
    for point in report.points:
        assert len(point.all_s) == 2
        assert point.median_s == pytest.approx(statistics.median(point.all_s))
        assert point.tokens_per_s == pytest.approx(point.batch / point.median_s)
        assert point.p10_s <= point.median_s <= point.p90_s <= point.p95_s
        linked = point.level in ("open", "masked")
        assert (point.bytes_per_token > 0) == linked


def test_a_filled_pool_is_full_and_left_alone_and_a_small_one_is_filled_within(report: DecodeReport) -> None:
    assert report.mask_pool == 3 * (32 + 20)
    making_s = {"": 0.0, "ready": 0.0, "made within": 0.0}
    for point in report.points:
        making_s[point.masks] += point.mask_wait_s + point.mask_fill_s
    assert making_s[""] == making_s["ready"] == 0
    assert making_s["made within"] > 0  # of all together: one run may lie within a single long step of filling


def test_every_ratio_follows_from_the_runs(report: DecodeReport) -> None:
    rates = {(point.name, point.batch): point.batch / statistics.median(point.all_s) for point in report.points}

    def best(batch: int) -> float:
        return max(rates["transformers-active", batch], rates["transformers-passive", batch])

    expected = {
        "1 request: open / transformers generate": rates["open", 1] / best(1),
        "1 request: open / local": rates["open", 1] / rates["local", 1],
        "1 request: local / transformers generate": rates["local", 1] / best(1),
        "1 request: masked, pool filled / local": rates["masked", 1] / rates["local", 1],
        "3 requests / 1: open": rates["open", 3] / rates["open", 1],
        "3 requests / 1: masked, pool filled": rates["masked", 3] / rates["masked", 1],
        "3 requests / 1: masked, sustained, enclave masks": rates["masked-sustained", 3] / rates["masked-sustained", 1],
        "3 requests / 1: masked, sustained, one dealer": (
            rates["masked-dealer-sustained", 3] / rates["masked-dealer-sustained", 1]
        ),
        "3 requests / 1: local": rates["local", 3] / rates["local", 1],
        "3 requests: open / transformers generate": rates["open", 3] / best(3),
        "3 requests: open / local": rates["open", 3] / rates["local", 3],
        "3 requests: masked, pool filled / local": rates["masked", 3] / rates["local", 3],
        **{
            f"3 requests: overhead, {step.name}, {step.sampling}, ms": (statistics.median(step.all_overhead_s) * 1e3)
            for step in report.steps
        },
    }
    assert {each.name: each.value for each in report.ratios} == pytest.approx(expected)
    assert {each.limit for each in report.ratios} == {""}  # nothing is promised of three requests


def test_steps_are_the_sum_of_their_parts(report: DecodeReport) -> None:
    assert [(step.name, step.sampling) for step in report.steps] == [
        ("local", "greedy"),
        ("open", "greedy"),
        ("open", "top-p 0.9"),
        ("masked", "greedy"),
    ]
    for step in report.steps:
        inner = (step.products_s, step.attention_s, step.between_s, step.sampling_s, step.scheduling_s)
        assert step.batch == 3
        assert min(inner) > 0
        assert sum(inner) == pytest.approx(step.step_s)
        assert step.worker_s + step.wire_s <= step.products_s * (1 + 1e-9)
        assert (step.worker_s > 0) == (step.name != "local")
        assert len(step.all_overhead_s) == 2
        assert min(step.all_overhead_s) <= step.overhead_s <= max(step.all_overhead_s)


def test_the_command_and_the_page_say_what_was_done(report: DecodeReport, page: Path) -> None:
    assert report.command.endswith("--tokens 20 --batch 1,3 --dtype float32 --threads 1 --rounds 2")
    text = page.read_text(encoding="utf-8")
    assert "Tokens per second over requests at once" in text
    assert "A step of 3 requests, by part" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--tokens", 0), "--tokens 0: at least 1 is needed"),
        (("--tokens", 15), "--tokens 15: at least 16 are needed"),
        (("--tokens", 993), "--tokens 993: this model's context has room for 992 after a prompt of 32"),
        (("--batch", "1,x"), "--batch 1,x: expected whole numbers from 1 between commas"),
        (("--batch", "0"), "--batch 0: expected whole numbers from 1"),
        (("--batch", "65"), "--batch 65: an engine runs at most 64 requests at once"),
        (("--rounds", 0), "--rounds 0: at least 1 is needed"),
        (("--threads", 0), "threads 0: expected at least 1"),
        (("--html", "/nowhere/page.html"), "--html /nowhere/page.html: there is no directory /nowhere"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_is_measured(
    model: Path, arguments: tuple[object, ...], sentence: str
) -> None:
    code, _, err = run("--model", model, *arguments)
    assert code == 3
    assert sentence in err


def test_a_model_without_a_tokenizer_is_refused(tiny_llama: Path) -> None:
    code, _, err = run("--model", tiny_llama)
    assert code == 3
    assert "a model without tokenizer.json cannot generate text" in err
