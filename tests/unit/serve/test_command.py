"""``tsqp serve`` up to where the model is loaded: keys, and what it refuses."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import zmq
from fake_engine import FakeEngine, tiny_served
from typer.testing import CliRunner, Result

from tsqp.config import EnclaveConfig, EngineConfig, ServeConfig
from tsqp.engine.api import Engine
from tsqp.serve.keys import read_keys
from tsqp.serve.served_model import ServedModel
from tsqp.transport.keys import ephemeral

# The package has the command under the module's name.
command = importlib.import_module("tsqp.cli.serve")


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """The command; it must not reach the model in these tests, nor change this process."""

    def unreached(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(command, "_loaded", unreached)
    monkeypatch.setattr("tsqp.serve.process.forbid_core_dumps", lambda: None)
    app = typer.Typer()
    app.command()(command.serve)
    return app


def test_a_new_key_is_printed_once_and_only_its_hash_kept(app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    done = CliRunner().invoke(app, ["--api-keys", str(file), "--new-api-key", "ada"])
    assert done.exit_code == 0, done.output
    key = done.stdout.strip()
    assert read_keys(file).owner(key) == "ada"
    assert key not in file.read_text(encoding="ascii")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--new-api-key", "ada"], "give --api-keys FILE too"),
        (["--level", "monolithic"], "no level monolithic"),
        (["--level", "secret"], "unknown level"),
        (["--host", "0.0.0.0"], "no API keys"),  # noqa: S104
        (["--tls-cert", "x.pem"], "both a certificate and its key"),
        (["--worker", "a:1", "--worker", "a:1"], "a:1 is given twice"),
        (["--worker", "a:1", "--worker", "b:1", "--worker-key", "k"], "2 workers and 1 worker keys"),
        (["--worker-key", "k"], "a worker's key was given but no worker"),
        (["--worker", "nowhere"], "endpoint 'nowhere'"),
        (["--max-running", "0"], "max_running 0: expected at least 1"),
        (["--step-tokens", "10"], "step_tokens 10: expected at least 64"),
        (["--kv-memory", "0"], "kv_memory 0: expected at least 1"),
        (["--default-tokens", "0"], "default_tokens 0: expected at least 1"),
        (["--max-queued", "0"], "max_queued 0: expected at least 1"),
        (["--reuse-prefixes", "maybe"], "unknown reuse_prefixes"),
        (["--padding", "some"], "unknown padding"),
        (["--port", "70000"], "port 70000"),
    ],
)
def test_what_cannot_be_served_is_refused_before_the_model_is_loaded(
    words: list[str], message: str, app: typer.Typer
) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 3
    assert message in done.stderr


@dataclass
class Served:
    """A command that ends as soon as its server has started, before an engine that continues nothing."""

    app: typer.Typer
    engine: FakeEngine
    settings: list[tuple[EnclaveConfig, EngineConfig]]

    def run(self, *words: str) -> Result:
        done = CliRunner().invoke(self.app, ["--port", "0", *words])
        assert done.exit_code == 0, done.output
        return done


@pytest.fixture
def command_line(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> Served:
    served = Served(app, FakeEngine(), [])

    def loaded(
        enclave: EnclaveConfig, engine: EngineConfig, _served: ServeConfig, _identity: None, _stack: ExitStack
    ) -> tuple[Engine, ServedModel]:
        served.settings.append((enclave, engine))
        return served.engine, tiny_served(enclave.level)

    @contextmanager
    def no_signals(server: object) -> Iterator[None]:
        server.should_exit = True  # type: ignore[attr-defined]  # it ends as soon as it has started
        yield

    monkeypatch.setattr(command, "_loaded", loaded)
    monkeypatch.setattr("tsqp.serve.server.Server.capture_signals", no_signals)
    return served


@pytest.mark.parametrize(
    ("level", "told"),
    [
        (None, None),
        ("local", None),
        ("open", "level open: the worker reads every prompt."),
        ("verified", "level verified: the worker reads every prompt; its results are checked."),
    ],
)
def test_it_tells_its_address_and_where_the_worker_reads_prompts(
    level: str | None, told: str | None, command_line: Served
) -> None:
    done = command_line.run(*(["--level", level] if level else []))
    ((enclave, _),) = command_line.settings
    assert enclave.level == (level or "masked")
    assert f"level {enclave.level}: listening on http://127.0.0.1:" in done.stdout
    assert [line for line in done.stderr.splitlines() if "reads every prompt" in line] == ([told] if told else [])
    assert command_line.engine.closed_with == 30.0


@pytest.mark.parametrize("level", ["masked", "verified", "open"])
def test_a_link_in_clear_beyond_this_machine_must_be_asked_for(level: str, command_line: Served) -> None:
    done = CliRunner().invoke(command_line.app, ["--port", "0", "--level", level, "--worker", "192.0.2.7:50051"])
    assert done.exit_code == 3
    assert "192.0.2.7:50051 is beyond this machine" in done.stderr
    assert not command_line.settings


@pytest.mark.parametrize(("level", "told"), [("masked", False), ("verified", True), ("open", True)])
def test_it_says_which_links_others_can_read(level: str, told: bool, command_line: Served) -> None:  # noqa: FBT001
    workers = ["--worker", "192.0.2.7:50051", "--worker", "127.0.0.1:1"]
    done = command_line.run("--level", level, "--insecure", *workers)
    sentence = "192.0.2.7:50051 is not on this machine: activations travel to it unencrypted."
    assert (sentence in done.stderr) == told
    assert "127.0.0.1:1 is" not in done.stderr
    key = zmq.curve_keypair()[0].decode()
    done = command_line.run("--level", level, "--worker", "192.0.2.7:50051", "--worker-key", key)
    assert "unencrypted" not in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--reuse-prefixes", "on"], True),
        (["--reuse-prefixes", "off"], False),
        ([], False),
        (["--reuse-prefixes", "on", "--level", "verified"], False),
    ],
)
def test_reuse_at_masked_says_what_it_shows(words: list[str], told: bool, command_line: Served) -> None:  # noqa: FBT001
    done = command_line.run(*words)
    assert ("the worker gets fewer rows" in done.stderr) == told


def test_options_reach_the_engine(command_line: Served) -> None:
    words = (
        "--kv-memory 5000000 --max-running 7 --max-queued 9 --step-tokens 128 --default-tokens 50 --reuse-prefixes off"
        " --worker-rows 5"
    )
    command_line.run("--insecure", "--worker", "a:1", "--worker", "b:1", *words.split())
    ((enclave, engine),) = command_line.settings
    assert enclave.worker is None
    assert engine == EngineConfig(
        workers=("a:1", "b:1"),
        worker_rows=5,
        kv_memory=5_000_000,
        max_running=7,
        max_queued=9,
        step_tokens=128,
        default_tokens=50,
        reuse_prefixes="off",
    )


def test_a_directory_stands_in_for_workers(command_line: Served) -> None:
    key = ephemeral().public.decode()
    done = command_line.run("--directory", "pool.json", "--level", "open", "--worker-key", key)
    assert "the worker reads every prompt" in done.stderr
    ((enclave, engine),) = command_line.settings
    assert (enclave.worker, engine.workers) == (None, ())
    assert (engine.directory, engine.worker_keys) == ("pool.json", (key,))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--level", "open"], "pin the workers' keys"),
        (["--worker", "127.0.0.1:5000"], "exclude each other"),
        (["--masks", "dealers"], "pin their keys"),
    ],
)
def test_a_directory_that_would_choose_who_is_trusted_is_refused(
    words: list[str], problem: str, command_line: Served
) -> None:
    done = CliRunner().invoke(command_line.app, ["--port", "0", "--directory", "pool.json", *words])
    assert (done.exit_code, problem in done.stderr) == (3, True)
    assert command_line.settings == []
