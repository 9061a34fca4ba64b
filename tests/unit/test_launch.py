"""Starting a worker as a process: what Ctrl-C, a second one, and a parent that ends do to it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from workers import linked

from tsqp import launch
from tsqp.errors import ConfigError, SetupError, TransportError
from tsqp.launch import own_worker, worker_process

PATIENCE_S = 60
READY = "print('{}', flush=True); "
UNTIL_HANGUP = "import sys; sys.stdin.read()"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """Every process that is started through ``launch``."""
    processes: list[subprocess.Popen[str]] = []

    class Noted(subprocess.Popen[str]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr("tsqp.launch.subprocess.Popen", Noted)
    return processes


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_it_has_a_session_of_its_own_and_ends_with_the_block(started: list[subprocess.Popen[str]]) -> None:
    with worker_process(program(READY + UNTIL_HANGUP)):
        (process,) = started
        assert os.getsid(process.pid) == process.pid
        assert process.poll() is None
    assert process.returncode == -signal.SIGTERM


def test_where_no_process_may_be_started_it_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> subprocess.Popen[str]:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("tsqp.launch.subprocess.Popen", refused)
    with (
        pytest.raises(SetupError, match=r"no worker can be started here .*give the address of one that runs, --worker"),
        worker_process(program(UNTIL_HANGUP)),
    ):
        pass


def test_ctrl_c_while_the_process_is_made_does_not_lose_it(
    started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = subprocess.Popen

    def interrupted(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        process = make(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr("tsqp.launch.subprocess.Popen", interrupted)
    with pytest.raises(KeyboardInterrupt), worker_process(program(UNTIL_HANGUP)):
        pass
    assert started[0].returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_does_not_end_is_killed(
    started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_STOP_TIMEOUT_S", 0.2)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    with worker_process(program(deaf + READY + UNTIL_HANGUP + "; import time; time.sleep(600)")):
        pass
    assert started[0].returncode == -signal.SIGKILL


def test_a_process_that_is_stopped_ends_as_others_do(started: list[subprocess.Popen[str]]) -> None:
    with worker_process(program(READY + UNTIL_HANGUP)):
        started[0].send_signal(signal.SIGSTOP)
    assert started[0].returncode == -signal.SIGTERM


def test_a_process_that_loads_can_be_given_up(started: list[subprocess.Popen[str]]) -> None:
    answers = iter([False, True])
    loading = worker_process(program(UNTIL_HANGUP), is_over=lambda: next(answers))
    with pytest.raises(TransportError, match="nobody needs it"), loading:
        pass
    assert started[0].returncode == -signal.SIGTERM


def test_a_worker_is_started_again_where_it_was_only_when_it_has_ended(
    started: list[subprocess.Popen[str]], tiny_llama: Path
) -> None:
    with own_worker(["--model", str(tiny_llama), "--device", "cpu"]) as worker:
        worker.revive(lambda: False)
        (first,) = started
        first.kill()
        first.wait()
        with pytest.raises(TransportError):
            worker.revive(lambda: True)
        worker.revive(lambda: False)
        _, given_up, second = started
        assert first.args == second.args
        assert worker.url in cast("list[str]", second.args)
        assert (given_up.poll() is None, second.poll() is None) == (False, True)
        with linked(worker.url, tiny_llama):
            pass
    assert second.returncode is not None


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("import sys; sys.stderr.write('no luck'); sys.exit(7)", SetupError, "exit code 7 before .* ready: no luck"),
        ("""print('{"error": {"type": "ConfigError", "message": "not so"}}')""", ConfigError, "not so"),
        ("""print('{"error": {"type": "SystemExit", "message": "not so"}}')""", SetupError, "not so"),
    ],
)
def test_what_does_not_come_up_says_why(text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says), worker_process(program(text)):
        pass


@pytest.mark.parametrize(("inside", "code"), [(True, 1), (False, 0)])
def test_a_parent_that_goes_ends_a_process_that_loads(inside: bool, code: int) -> None:  # noqa: FBT001
    """It is watched during the block only: after it, whoever serves watches the same pipe."""
    wait = "print('up', flush=True); " + ("import time; time.sleep(600)" if inside else "pass")
    after = "pass" if inside else "print('out', flush=True); import sys; sys.stdin.read()"
    text = f"from tsqp.launch import ending_with_parent\nwith ending_with_parent(0): {wait}\n{after}"
    process = subprocess.Popen(program(text), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        for word in ("up",) if inside else ("up", "out"):
            assert process.stdout.readline().strip() == word
        process.stdin.close()
        assert process.wait(PATIENCE_S) == code
