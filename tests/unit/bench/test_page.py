"""The page: one file that asks for nothing, with everything escaped, for every kind of report."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench_reports import REPORTS

from tsqp.bench.page import page, write
from tsqp.bench.svg import Axis, Bar, Line, lines, log_bars, stacked_bars
from tsqp.errors import InputError
from tsqp.measurements import Measurement

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
