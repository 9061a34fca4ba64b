"""What is on the screen, one state after the other; and what is printed where there is none."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator

import pytest
from rich.console import Console
from top_reports import WORKER

from tsqp.errors import TransportClosedError, TsqpError
from tsqp.reports import TopReport

command = importlib.import_module("tsqp.cli.top")
HOME, ALTERNATE, BACK = "\x1b[H", "\x1b[?1049h", "\x1b[?1049l"
GONE = TransportClosedError("the worker is gone.")


class Source:
    url = "there"


def frames(
    monkeypatch: pytest.MonkeyPatch, *events: TopReport | TsqpError, terminal: bool = True, height: int = 24
) -> list[str]:
    """Return what was written before the first event, and after each."""
    out, states = io.StringIO(), []
    console = Console(file=out, force_terminal=terminal, width=80, height=height, color_system=None, highlight=False)
    monkeypatch.setattr(command, "Console", lambda **_: console)

    def told() -> Iterator[TopReport | TsqpError]:
        for event in events:
            states.append(out.getvalue())
            yield event
        states.append(out.getvalue())

    command._show(Source(), 2.0, told())
    states.append(out.getvalue())
    return [after.removeprefix(before) for before, after in zip(["", *states], states, strict=False)]


def test_a_terminal_shows_the_newest_in_the_place_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third, end = frames(monkeypatch, WORKER, WORKER)
    assert ALTERNATE in first
    assert "there: the first numbers come in 2 s; Ctrl-C ends." in first
    for frame in (second, third):
        assert frame.startswith(HOME)
        assert "worker 127.0.0.1:50051" in frame
        assert frame.count("\n") == 23  # the whole screen, and no line more
    assert BACK in end


def test_a_peer_that_goes_leaves_its_last_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    _, before, _, gone, _, _ = frames(monkeypatch, GONE, WORKER, GONE, GONE)
    assert "the first numbers come" in before
    assert "no new numbers: the worker is gone." in gone
    assert "50.0 MB/s" in gone


def test_a_small_terminal_is_not_overrun(monkeypatch: pytest.MonkeyPatch) -> None:
    _, frame, _ = frames(monkeypatch, WORKER, height=5)
    assert frame.count("\n") == 4
    assert "requests/s" in frame


def test_without_a_terminal_reports_follow_each_other(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    written = "".join(frames(monkeypatch, WORKER, GONE, WORKER, terminal=False))
    assert written.count("worker 127.0.0.1:50051") == 2
    assert "\x1b" not in written
    assert capfd.readouterr().err == "no new numbers: the worker is gone.\n"
