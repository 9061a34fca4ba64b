"""What log lines have, as text and as JSON, and what they never have."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from tsqp import logs
from tsqp.cli.reporting import notice
from tsqp.errors import InputError, ProtocolError

log = logging.getLogger("tsqp.somewhere")
CANARY = "xyzzy-plugh-secret"


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capfd.readouterr()
    assert out == ""
    return err.splitlines()


def entry(capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    (line,) = said(capfd)
    loaded: dict[str, Any] = json.loads(line)
    return loaded


@pytest.mark.usefixtures("debug_logs")
@pytest.mark.parametrize("debug_logs", ["json"], indirect=True)
def test_a_line_of_json_has_time_level_logger_message_and_details(capfd: pytest.CaptureFixture[str]) -> None:
    log.warning("%d rows\nin %s", 3, "“layers”", extra={"request_id": 7, "client": "3", "duration_s": 0.25})
    found = entry(capfd)
    assert datetime.now(timezone.utc) - datetime.fromisoformat(found.pop("time")) < timedelta(minutes=5)
    assert found == {
        "level": "warning",
        "logger": "tsqp.somewhere",
        "message": "3 rows\nin “layers”",
        "request_id": 7,
        "client": "3",
        "duration_s": 0.25,
    }


@pytest.mark.usefixtures("debug_logs")
@pytest.mark.parametrize("debug_logs", ["json"], indirect=True)
def test_time_is_utc(capfd: pytest.CaptureFixture[str]) -> None:
    log.info("now")
    assert entry(capfd)["time"].endswith("+00:00")


@pytest.mark.usefixtures("debug_logs")
@pytest.mark.parametrize("debug_logs", ["text"], indirect=True)
def test_a_line_of_text_is_for_people(capfd: pytest.CaptureFixture[str]) -> None:
    log.info("3 rows", extra={"request_id": 7, "client": "3", "duration_s": 0.25})
    log.info("3 rows", extra={"duration_s": 12.3})
    log.warning("two\nlines \x1b[31m")
    notice("a sentence.")
    lines = said(capfd)
    assert [line[8:] for line in lines[:2]] == [
        " info    3 rows (request 7, client 3, took 250.0 ms)",
        " info    3 rows (took 12.30 s)",
    ]
    assert lines[2][8:] == " warning two?lines ?[31m"
    assert lines[3] == "a sentence."


@pytest.mark.usefixtures("debug_logs")
@pytest.mark.parametrize("debug_logs", ["json"], indirect=True)
def test_a_notice_is_a_record_where_records_are_json(capfd: pytest.CaptureFixture[str]) -> None:
    notice("a sentence, 100 %.")
    assert entry(capfd) | {"time": ""} == {
        "time": "",
        "level": "info",
        "logger": "tsqp.notices",
        "message": "a sentence, 100 %.",
    }


def test_of_an_error_that_is_not_ours_only_type_and_place_are_told(
    debug_logs: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        raise ValueError(CANARY)  # noqa: TRY301
    except ValueError as error:
        log.error("it failed", exc_info=error)  # noqa: TRY400
        log.exception("it failed")
    for line in said(capfd):
        assert CANARY not in line
        assert "it failed" in line
        assert "ValueError" in line
        assert "test_logs.py:" in line
        if debug_logs == "json":
            assert json.loads(line)["error"] == "ValueError"


def test_our_own_errors_say_what_they_have_to(debug_logs: str, capfd: pytest.CaptureFixture[str]) -> None:
    log.error("it failed", exc_info=InputError("7 rows; at most 5 are allowed."))
    (line,) = said(capfd)
    assert "7 rows; at most 5 are allowed." in line
    if debug_logs == "json":
        assert json.loads(line)["error_at"] == "an unknown place"


def test_a_task_that_nobody_waits_for_does_not_quote_its_error(
    debug_logs: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The repr of the task is in asyncio's message, and in it the error's text."""

    async def lost() -> None:
        async def fails() -> None:
            raise ValueError(CANARY)

        task = asyncio.ensure_future(fails())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del task

    asyncio.run(lost())
    gc.collect()
    (line,) = said(capfd)
    assert "Task exception was never retrieved" in line
    assert "ValueError" in line
    assert CANARY not in line
    assert (debug_logs == "json") == line.startswith("{")


def test_others_are_heard_from_warnings_on(debug_logs: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert debug_logs
    logging.getLogger("elsewhere").info(CANARY)
    logging.getLogger("tsqpx").debug(CANARY)
    log.debug("heard")
    (line,) = said(capfd)
    assert "heard" in line


@pytest.mark.usefixtures("debug_logs")
def test_a_record_that_cannot_be_written_is_dropped_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    (handler,) = [each for each in logging.getLogger().handlers if isinstance(each, logs._Handler)]
    handler.handle(logging.LogRecord("tsqp", logging.ERROR, "", 0, "%d", (CANARY,), None))
    assert said(capfd) == []


@pytest.mark.parametrize("level", logs.LEVELS)
def test_levels_leave_out_what_is_below(level: str, debug_logs: str, capfd: pytest.CaptureFixture[str]) -> None:
    logs.set_up(level, debug_logs)
    for each in logs.LEVELS:
        log.log(logging.getLevelName(each.upper()), "at %s", each)
    assert len(said(capfd)) == len(logs.LEVELS) - logs.LEVELS.index(level)


@pytest.mark.usefixtures("debug_logs")
def test_to_set_up_twice_does_not_say_all_twice(capfd: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", "text")
    log.info("once")
    assert len(said(capfd)) == 1
    assert logs.form() == "text"


def test_a_program_that_does_not_log_prints_its_notices(capfd: pytest.CaptureFixture[str]) -> None:
    assert logs.form() is None
    notice("[a sentence] that is longer than eighty columns, which a terminal has where nobody says how many it has.")
    assert said(capfd) == [
        "[a sentence] that is longer than eighty columns, which a terminal has where nobody says how many it has."
    ]


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_command_that_fails_says_so_in_its_log(form: str) -> None:
    words = ["worker", "--device", "abacus", "--log-format", form]
    done = subprocess.run([sys.executable, "-m", "tsqp", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    sentence = "unknown device 'abacus': expected cpu or cuda:N."
    if form == "json":
        found = json.loads(done.stderr)
        assert (found["level"], found["message"]) == ("error", sentence)
    else:
        assert done.stderr == f"error: {sentence}\n"


def test_messages_of_hostile_peers_stay_in_one_line(debug_logs: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert debug_logs
    log.error("failed", exc_info=ProtocolError("a\n\x1b]0;title\x07b"))
    (line,) = said(capfd)
    assert "\x1b" not in line
