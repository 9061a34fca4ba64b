"""How a report looks on terminals of several widths."""

from __future__ import annotations

import msgspec
import pytest
from rich.console import Console
from top_reports import SERVER, WORKER

from tsqp.reports import TopReport
from tsqp.top.view import duration, number, opening, size, view


def shown(of: TopReport, width: int = 100, trouble: str = "") -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(view(of, width, trouble))
    console.file.close()
    return console.export_text()


@pytest.mark.parametrize("width", [100, 72, 50])
def test_a_worker(width: int) -> None:
    text = shown(WORKER, width)
    for each in (
        "worker 127.0.0.1:50051",
        "tiny, float products in bfloat16 on cuda:0",
        "12,346",
        "2.5",
        "4.5 requests a product",
        "50.0 MB/s",
        "70.0 kB/s",
        "12, 3.4 MB",
        "17.0 GB of 150.0 GB",
        "computing 50.0%",
        "copying",
        "25.0%",
        "idle",
    ):
        assert each in text, each
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


@pytest.mark.parametrize("width", [100, 72, 60])
def test_a_server(width: int) -> None:
    text = shown(SERVER, width)
    for each in (
        "server https://enclave.example:8000",
        "tiny, level masked, up 10 s",
        "150 generated, 3 read",
        "8, last step 11 rows",
        "42%",
        "50% of 1,000 rows",
        "1.0 MB/s",
        "4, 1 generations failed",
        "2 failures",
        "waiting: worker",
        "40.0%",
        "enclave: attention",
        "idle",
    ):
        assert each in text, each
    assert "waiting: masks" not in text  # nothing of the interval
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


def test_bars_are_as_long_as_their_share() -> None:
    lengths = {
        line.split()[0]: sum(character == "█" for character in line)
        for line in shown(WORKER).splitlines()
        if "%" in line
    }
    assert lengths == {"computing": 25, "copying": 12, "idle": 12}


def test_a_peer_that_is_away_or_not_ready_says_so_first() -> None:
    assert shown(WORKER, trouble="the worker is gone.").splitlines()[2] == "no new numbers: the worker is gone."
    waiting = msgspec.structs.replace(SERVER, ready=False, reason="no worker is left.")
    assert shown(waiting).splitlines()[2].strip() == "not ready: no worker is left."
    assert "not ready: it does not say why" in shown(msgspec.structs.replace(SERVER, ready=False))


def test_a_server_of_several_workers_says_how_many_are_in_use() -> None:
    assert "workers" not in shown(msgspec.structs.replace(SERVER, workers=1, workers_usable=1))
    assert "1 of 3 in use" in shown(msgspec.structs.replace(SERVER, workers=3, workers_usable=1))


def test_what_a_peer_says_is_no_markup() -> None:
    text = shown(msgspec.structs.replace(WORKER, model="[bold]x[/bold][/nothing]"))
    assert "[bold]x[/bold][/nothing]" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (3725, "1 h 2 min"),
        (90000, "1 d 1 h"),
        (1e12, "11574074 d 1 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_have_as_many_digits_as_mean_something() -> None:
    assert [number(value) for value in (None, 0.0, 0.123, 1.234, 12.34, 123.4, 12345.6)] == [
        "-", "0.00", "0.12", "1.23", "12.3", "123", "12,346",
    ]  # fmt: skip
    assert [size(value) for value in (None, 0, 999, 1_234_567, 1 << 61)] == [
        "-", "0 bytes", "999 bytes", "1.2 MB", "2.3 EB",
    ]  # fmt: skip


def test_before_the_first_report_it_says_how_long() -> None:
    assert "the first numbers come in 2 s" in str(opening("here", 2.0))
