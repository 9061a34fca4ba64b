"""docs/planning.md shows what the command says with the constants that come with it."""

from __future__ import annotations

from benchmarks import planning_page


def test_the_page_is_what_the_command_says() -> None:
    text = planning_page.PAGE.read_text(encoding="utf-8")
    assert len(planning_page.PLAN.findall(text)) == 3
    assert planning_page.CHECK.search(text)
    assert planning_page.page(text) == text, "python benchmarks/planning_page.py"


def test_the_page_tells_every_error_of_the_newest_check() -> None:
    report, text = planning_page.newest(), planning_page.PAGE.read_text(encoding="utf-8")
    within = sum(abs(point.error) <= report.limit for point in report.points)
    assert f"{within} of {len(report.points)} within" in text
