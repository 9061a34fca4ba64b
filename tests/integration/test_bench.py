"""``tsqp bench``: each command runs on a tiny model, prints one object, writes its files, and names mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
from traces import well_formed, worker_within_requests
from typer.testing import CliRunner

from tsqp.cli import app
from tsqp.measurements import BenchReport, LevelsReport, Measurement, OverlapReport, ScalingReport, TransportReport

Report = TypeVar("Report", bound=Measurement)


def run(*arguments: object) -> tuple[int, str, str]:
    """Run ``tsqp bench`` in this process; return exit code, standard output and standard error."""
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def measured(kind: type[Report], command: str, *arguments: object) -> Report:
    code, out, err = run(command, *arguments, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    got = msgspec.json.decode(out, type=kind)
    assert got.command.startswith(f"tsqp bench {command}")
    assert got.hardware.cores > 0
    return got


def test_prefill_compares_every_variant(tiny_llama: Path) -> None:
    options = ["--tokens", 12, "--rounds", 1, "--threads", 1, "--masks", "enclave"]
    got = measured(BenchReport, "prefill", "--model", tiny_llama, *options)
    by_name = {variant.name: variant for variant in got.variants}
    assert {"open", "open-ipc", "masked", "legacy", "legacy-matmul", "local"} <= set(by_name)
    for name in ("open", "masked"):
        found = by_name[name]
        assert found.enclave_s + found.waited_s in [pytest.approx(each) for each in found.all_s]
        assert found.p10_s <= found.median_s <= found.p90_s
        assert found.round_trips > 0
        assert found.worker_s > 0
        assert found.peak_bytes > 0
    assert by_name["masked"].mask_s > 0
    assert {ratio.limit for ratio in got.ratios} == {""}  # nothing is promised of 12 tokens


def test_levels_have_parts_floors_a_page_and_a_timeline(tiny_llama: Path, tmp_path: Path) -> None:
    trace, html = tmp_path / "trace.json", tmp_path / "page.html"
    options = ["--tokens", 12, "--rounds", 1, "--threads", 1, "--micro-batches", 2, "--trace", trace, "--html", html]
    got = measured(LevelsReport, "levels", "--model", tiny_llama, *options)
    by_name = {variant.name: variant for variant in got.variants}
    for name in ("open", "verified", "masked"):
        floor = by_name[name].floor
        assert floor is not None
        assert by_name[name].micro_batches == 2
        assert floor.worker_s > 0
        assert floor.rest_s > 0
        assert floor.wire_s > 0
        assert (floor.check_s > 0) == (name != "open")
        assert (floor.mask_s > 0) == (name == "masked")
    assert by_name["local"].floor is None
    tracks = well_formed(json.loads(trace.read_text(encoding="utf-8")))
    for number, name in enumerate(("open", "verified", "masked")):
        products = worker_within_requests(tracks, 2 * number + 1, 2 * number + 2)
        assert products == by_name[name].round_trips
    names = {event["name"] for events in tracks.values() for event in events}
    assert {"quantise", "mask", "check", "waiting", "linear head", "attention layers.0"} <= names
    assert "Floors" in html.read_text(encoding="utf-8")


def test_scaling_measures_every_size(tiny_llama: Path) -> None:
    options = ["--tokens", "4,9", "--batch", "1,3", "--batch-tokens", 5, "--rounds", 1, "--threads", 1]
    got = measured(ScalingReport, "scaling", "--model", tiny_llama, *options)
    assert [(point.level, point.tokens) for point in got.lengths if point.level == "open"] == [("open", 4), ("open", 9)]
    assert {point.level for point in got.batches} == {"open", "masked", "local", "monolithic"}
    assert [point.batch for point in got.batches if point.level == "masked"] == [1, 3]
    assert all(point.masks_ready for point in got.lengths)


def test_overlap_measures_serial_and_undelayed_too(tiny_llama: Path) -> None:
    options = ["--tokens", 16, "--delay", "20", "--micro-batches", "2", "--rounds", 1, "--threads", 1]
    got = measured(OverlapReport, "overlap", "--model", tiny_llama, *options)
    assert [(point.delay_ms, point.micro_batches) for point in got.points] == [(0.0, 1), (0.0, 2), (20.0, 1), (20.0, 2)]
    # Three layers' five round trips take 40 ms each at least. Undelayed they take a few milliseconds together.
    assert all(point.median_s >= 0.04 * 5 for point in got.points if point.delay_ms)


def test_transports_take_turns(tmp_path: Path) -> None:
    html = tmp_path / "page.html"
    got = measured(TransportReport, "transport", "--rounds", 1, "--html", html)
    used = {f"{name}, filled and summed" for name in ("tcp", "shm")}
    assert used | {"tcp", "ipc", "shm, copied", "shm, in place", "MessagePack", "gRPC", "HTTP JSON"} <= {
        row.name for row in got.rows if row.points
    }
    assert all(len(row.points) == 4 for row in got.rows if row.points)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("prefill", "--tokens", 0), "--tokens 0: at least 1 is needed"),
        (("levels", "--rounds", 0), "--rounds 0: at least 1 is needed"),
        (("scaling", "--tokens", "16,x"), "--tokens 16,x: expected whole numbers from 1 between commas"),
        (("scaling", "--batch", ""), "--batch : expected whole numbers"),
        (("scaling", "--tokens", "1000000"), "--tokens 1000000: this model takes 1 to"),
        (("overlap", "--delay", "-1"), "--delay -1: expected milliseconds from 0 to 1000"),
        (("overlap", "--delay", "nan"), "--delay nan: expected milliseconds from 0 to 1000"),
        (("overlap", "--level", "local"), "--level local: only open, verified and masked have a link"),
        (("transport", "--html", "/nowhere/page.html"), "--html /nowhere/page.html: there is no directory /nowhere"),
        (("transport", "--html", "."), "--html .: that is a directory"),
        (("levels", "--device", "cuda:9"), "device cuda:9 was asked for"),
        (("levels", "--trace", "/nowhere/t.json"), "--trace /nowhere/t.json: there is no directory"),
        (("prefill", "--masks", "enclave", "--dealer", "a:1"), "masks by the enclave and dealers exclude each other"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_is_measured(
    tiny_llama: Path, arguments: tuple[object, ...], sentence: str
) -> None:
    model = [] if arguments[0] == "transport" else ["--model", tiny_llama]
    code, _, err = run(*arguments, *model)
    assert code == 3
    assert sentence in err


def test_bench_alone_shows_its_commands() -> None:
    _, out, err = run()
    assert all(name in out + err for name in ("prefill", "levels", "transport", "scaling", "overlap", "decode"))
