"""The page: one file that asks for nothing, with everything escaped, for every kind of report."""

from __future__ import annotations

import inspect
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench_reports import LEVELS, REPORTS, scaling
from msgspec import structs

from tsqp.bench.page import page, write
from tsqp.bench.plans import SCALING_BATCHES, SCALING_LENGTHS
from tsqp.bench.svg import Axis, Bar, Line, lines, log_bars, stacked_bars
from tsqp.cli.bench import commands, tables
from tsqp.errors import InputError
from tsqp.measurements import BenchReport, LevelsReport, Measurement, ScalingReport

VOID = ("meta",)


class Balanced(HTMLParser):
    """Follows which elements are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
def test_a_page_is_whole_and_self_contained(report: Measurement) -> None:
    text = page(report)
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert "svg" in parser.seen
    assert not parser.seen & {"script", "img", "link", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import", text)
    assert "nan" not in re.sub(r"<style>.*</style>", "", text, flags=re.DOTALL)
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert ("✗ missed" in text) == any(ratio.ok is False for ratio in report.ratios)


def plots(text: str) -> dict[str, tuple[list[str], list[str]]]:
    """Return of each plot by title the ticks of the axis across and of the one up."""
    found = {}
    for title, body in re.findall(r'<svg class="plot"[^>]* aria-label="([^"]*)">(.*?)</svg>', text):
        across, up = (
            re.findall(rf'<text class="tick"[^>]* text-anchor="{anchor}">([^<]*)</text>', body)
            for anchor in ("middle", "end")
        )
        found[title] = (across, up)
    return found


def test_the_plots_of_prefill() -> None:
    report = next(report for report in REPORTS if isinstance(report, BenchReport))
    text = page(report)
    assert list(plots(text)) == ["time by part", "kilobytes per token", "round trips"]
    for part in ("enclave", "worker", "wire", "not split"):
        assert f"</span>{part}</span>" in text
    assert re.findall(r'class="val"[^>]*>([^<]*)<', text)[3:] == ["900 KB", "900 KB", "122", "122"]


def test_the_plots_of_scaling_have_a_tick_for_each_default_size() -> None:
    """Tokens per second, bytes per token and round trips, over 16 to 4096 tokens and over 1 to 32 prompts."""
    plain = next(report for report in REPORTS if isinstance(report, ScalingReport))
    lengths = [scaling(level, tokens, 1) for tokens in SCALING_LENGTHS for level in LEVELS]
    batches = [scaling(level, 16, batch) for batch in SCALING_BATCHES for level in LEVELS]
    found = plots(page(structs.replace(plain, lengths=lengths, batches=batches)))
    over = {
        "prompt length, tokens": ["16", "64", "128", "256", "512", "1024", "2048", "4096"],
        "number of prompts of 16 tokens": ["1", "2", "4", "8", "16", "32"],
    }
    ups = {
        "Tokens per second": ["0", "200", "400", "600", "800", "1,000"],
        "Kilobytes per token": ["0", "200", "400", "600", "800"],
        "Round trips of a prefill": ["0", "50", "100"],
    }
    assert found == {f"{title} over {what}": (ticks, up) for what, ticks in over.items() for title, up in ups.items()}
    parameters = inspect.signature(commands.scaling).parameters
    assert parameters["tokens"].default is None
    assert parameters["batch"].default == "1,2,4,8,16,32"


def test_copies_to_a_gpu_are_a_part_of_the_waiting_of_their_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 120 ms that the enclave waited the worker's own account is 90, 30 of it copies; the rest is wire."""
    levels = next(report for report in REPORTS if isinstance(report, LevelsReport))
    assert "PCIe" not in page(levels)
    copied = [structs.replace(each, pcie_s=0.03 if each.worker_s else 0.0) for each in levels.variants]
    hardware = structs.replace(levels.hardware, gpu="a GPU <b>")
    on_a_gpu = structs.replace(levels, variants=copied, hardware=hardware)
    text = page(on_a_gpu)
    parts = dict(re.findall(r"<title>open: ([^<]*) ([\d.]+)</title>", text))
    assert {name: parts[name] for name in ("worker", "PCIe", "wire")} == {"worker": "60", "PCIe": "30", "wire": "30"}
    assert '<span class="dot c4"></span>PCIe' in text
    assert "<dt>GPU</dt><dd>a GPU &lt;b&gt;</dd>" in text
    monkeypatch.setenv("COLUMNS", "200")
    tables.show(levels)
    assert "PCIe" not in capsys.readouterr().out
    tables.show(on_a_gpu)
    shown = capsys.readouterr().out
    assert re.search(r"^ open .* 30\.0 *$", shown, re.MULTILINE)
    assert "8 GB; a GPU <b>; torch" in shown


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        write(tmp_path, REPORTS[0])


def test_plots_of_nothing_are_empty() -> None:
    assert lines([Line("a")], Axis("x"), Axis("y")) == ""
    assert log_bars([], "nothing") == ""


def test_bars_are_as_long_as_their_parts() -> None:
    drawn = stacked_bars([Bar("a", [("x", 1.0), ("y", 3.0)], "4"), Bar("b", [("x", 2.0)], "2", 4.0)], ("x", "y"), "t")
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="22"', drawn)]
    assert widths == pytest.approx([162.25, 486.75, 324.5], abs=0.06)
    assert drawn.count("<path") == 1


@pytest.mark.parametrize("values", [[5.0], [1.0, 10.0], [0.002, 0.0035], [16.0, 4096.0], [3.0, 3.0]])
@pytest.mark.parametrize("log", [False, True])
def test_points_lie_within_the_plot(values: list[float], log: bool) -> None:  # noqa: FBT001
    points = [(value, value) for value in values]
    drawn = lines([Line("a", points)], Axis("x", log=log), Axis("y", log=log))
    places = re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', drawn)
    assert len(places) == len(values)
    assert all(0 <= float(x) <= 760 and 0 <= float(y) <= 300 for x, y in places)
