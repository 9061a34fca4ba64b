"""The page's files as text: nothing inline, nothing from elsewhere, everything labelled, enough contrast."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import tsqp.serve

PAGE = Path(str(tsqp.serve.__path__[0])) / "page"
HTML = (PAGE / "index.html").read_text(encoding="utf-8")
CSS = (PAGE / "style.css").read_text(encoding="utf-8")
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in PAGE.glob("*.js")}

Element = tuple[str, dict[str, str | None]]


class Elements(HTMLParser):
    """Lists every element, and the text directly inside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Element] = []
        self.inline = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style"):
            self.inline += data.strip()


@pytest.fixture(scope="module")
def parsed() -> Elements:
    parser = Elements()
    parser.feed(HTML)
    return parser


def test_nothing_is_inline(parsed: Elements) -> None:
    assert parsed.inline == ""
    for tag, attributes in parsed.found:
        assert tag != "style"
        assert tag != "script" or attributes.get("src")
        assert not [name for name in attributes if name == "style" or name.startswith("on")], (tag, attributes)


def test_nothing_comes_from_elsewhere() -> None:
    for text in (HTML, CSS, *SCRIPTS.values()):
        found = re.findall(r"https?://[^\s\"')]+|//[a-z0-9.-]+\.[a-z]{2,}/", text)
        assert set(found) <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in CSS
    assert "url(" not in CSS


def test_scripts_never_turn_text_into_markup_or_keep_the_key() -> None:
    for text in SCRIPTS.values():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
        stored = re.findall(r"(?:localStorage|sessionStorage)\.(?:set|get)Item\(\"(\w+)\"", text)
        assert set(stored) <= {"theme"}
        assert "document.cookie" not in text


def test_every_element_that_scripts_use_exists(parsed: Elements) -> None:
    ids = [attributes["id"] for _, attributes in parsed.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {name for text in SCRIPTS.values() for name in re.findall(r"(?:\$|setText)\(\"([\w-]+)\"", text)}
    assert used
    assert used <= set(ids)


def test_every_field_has_a_label_and_every_reference_a_target(parsed: Elements) -> None:
    ids = {attributes.get("id") for _, attributes in parsed.found}
    labelled = {attributes.get("for") for tag, attributes in parsed.found if tag == "label"}
    for tag, attributes in parsed.found:
        if tag in ("input", "textarea", "select"):
            assert attributes.get("id") in labelled
        for name in ("for", "aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= ids, attributes


def test_there_are_landmarks_headings_and_live_regions(parsed: Elements) -> None:
    tags = [tag for tag, _ in parsed.found]
    assert (tags.count("main"), tags.count("header"), tags.count("h1")) == (1, 1, 1)
    sections = [attributes for tag, attributes in parsed.found if tag == "section"]
    assert len(sections) == 3
    assert all(attributes.get("aria-labelledby") for attributes in sections)
    assert {"log", "alert", "status"} <= {attributes.get("role") for _, attributes in parsed.found}


def colours(index: int) -> dict[str, str]:
    """Return the style sheet's colours, light (0) or dark (1)."""
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", CSS)
    return {pair[0]: pair[1 + index] for pair in pairs}


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2.2."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_computed_as_wcag_says() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


TEXTS = [
    *[(ink, ground) for ink in ("ink", "soft") for ground in ("paper", "card", "sunk")],
    ("ink", "mine"),
    ("soft", "mine"),
    ("good", "good-bg"),
    ("bad", "bad-bg"),
    ("bad", "sunk"),
    ("on-accent", "accent"),
    ("accent", "card"),
]
SHAPES = [("edge", "card"), ("edge", "paper"), ("accent", "card"), ("bar", "card")]


@pytest.mark.parametrize("index", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(("ink", "ground"), TEXTS)
def test_text_meets_wcag_aa(ink: str, ground: str, index: int) -> None:
    names = colours(index)
    assert contrast(names[ink], names[ground]) >= 4.5


@pytest.mark.parametrize("index", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(("shape", "ground"), SHAPES)
def test_shapes_meet_wcag_aa(shape: str, ground: str, index: int) -> None:
    names = colours(index)
    assert contrast(names[shape], names[ground]) >= 3
