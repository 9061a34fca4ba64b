"""``tsqp cluster`` where Ray is missing, another one, or not there: one sentence and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError

import pytest
from msgspec import structs
from typer.testing import CliRunner, Result
from workers import free_port

from tsqp.cli import app
from tsqp.cluster import link
from tsqp.cluster.controller import PoolState
from tsqp.errors import SetupError, TransportError
from tsqp.reports import PoolMember

cluster = import_module("tsqp.cli.cluster")  # in its package the name is the command's


def tsqp(*words: str) -> Result:
    return CliRunner().invoke(app, ["cluster", *words])


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(link, "version", absent)
    done = tsqp("up")
    assert (done.exit_code, "run 'pip install tsqp[ray]'" in done.stderr) == (3, True)


def test_ray_asks_for_tokens_whatever_of_ours_is_imported_first() -> None:
    asks = "from ray._raylet import AuthenticationMode as M, get_authentication_mode as m; assert m() == M.TOKEN"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    subprocess.run([sys.executable, "-c", f"import tsqp.cluster.controller; {asks}"], check=True, env=clean)


@pytest.mark.parametrize("found", ["1.13.0", "2.9.3", "2.59.1", "3.0.0", "3.0.0rc1"])
def test_another_ray_is_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "version", lambda _name: found)
    done = tsqp("status", "--address", "10.0.0.1:6379")
    assert (done.exit_code, f"ray {found} is installed; expected 2.60 or later" in done.stderr) == (3, True)


@pytest.mark.parametrize("command", ["up", "status", "scale", "down"])
def test_an_address_where_nobody_listens_is_told_at_once(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "version", lambda _name: "2.60.0")
    address = f"127.0.0.1:{free_port()}"
    done = tsqp(command, "--address", address)
    assert (done.exit_code, f"no Ray cluster answers at {address}" in done.stderr) == (4, True)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("status",), "no Ray cluster was named"),
        (("status", "--address", "shm:///dev/shm/ray"), "expected the address of a Ray cluster's head"),
        (("status", "--address", "ray"), "expected host:port"),
        (("up", "--workers", "-1"), "expected 0 or more"),
        (("up", "--min", "3", "--max", "2"), "the least (--min) at most the most (--max)"),
        (("up", "--dealers", "1"), "dealers need keys"),
        (("up", "--allow", "no.key"), "cannot read the key file"),
        (("up", "--pool", "A b"), "no name for a pool"),
    ],
)
def test_bad_input_is_one_sentence(words: tuple[str, ...], problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "version", lambda _name: "2.60.0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = tsqp(*words)
    assert (done.exit_code, problem in done.stderr, "Traceback" in done.output) == (3, True, False)


def test_errors_are_json_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "version", lambda _name: "2.9.0")
    assert '"exit_code":3' in tsqp("status", "--address", "10.0.0.1:6379", "--json").stdout


class FakeClient:
    """A pool of which each look shows the next state, and the last one for ever."""

    def __init__(self, *states: PoolState) -> None:
        self._states = list(states)

    def state(self) -> PoolState:
        return self._states.pop(0) if len(self._states) > 1 else self._states[0]


COMING = PoolState(
    name="default",
    directory="http://10.0.0.1:50053/directory",
    workers=1,
    least=1,
    most=1,
    dealers=0,
    restarts=0,
    failures=0,
    closing=False,
    members=(),
    reasons=(),
)
WORKER = PoolMember(
    name="tsqp-default-worker-1",
    kind="worker",
    phase="ready",
    node="10.0.0.1",
    party="",
    url="tcp://10.0.0.1:5000",
    key=None,
    pid=1,
    actor_pid=2,
    waiting=0,
    reason="",
)


def test_a_pool_is_waited_for_until_it_is_at_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_LOOK_S", 0.0)
    up = replace(COMING, members=(WORKER,))
    starting = replace(COMING, members=(structs.replace(WORKER, phase="starting"),))
    leaving = replace(COMING, members=(WORKER, structs.replace(WORKER, phase="draining")))
    assert cluster._at_size(FakeClient(COMING, starting, leaving, up), 60.0) is up


@pytest.mark.parametrize("wait_s", [0.0, 600.0])
def test_a_pool_that_does_not_come_up_is_given_up_with_the_reason(wait_s: float) -> None:
    failed = replace(COMING, failures=3, reasons=("the model is missing.",))
    with pytest.raises(SetupError, match=r"0 of 1 workers and 0 of 0 dealers .* ended. the model is missing"):
        cluster._at_size(FakeClient(failed), wait_s)


def raised(text: str, cause: str = "") -> Exception:
    error = RuntimeError(text)
    if cause:
        error.__cause__ = RuntimeError(cause)
    return error


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (
            raised("Version mismatch: The cluster was started with:\n Ray: 2.61"),
            SetupError,
            "has another version of Ray",
        ),
        (raised("Failed", "Token authentication is enabled but no token"), SetupError, "asks for a token"),
        (raised("Failed to connect\nto GCS"), TransportError, "cannot be used: Failed to connect"),
        (raised(""), TransportError, "cannot be used: RuntimeError"),
    ],
)
def test_what_ray_raises_becomes_a_sentence(error: Exception, kind: type[Exception], sentence: str) -> None:
    explained = link._explained("10.0.0.1:6379", error)
    assert isinstance(explained, kind)
    assert sentence in str(explained)
    assert "\n" not in str(explained)
