"""``tsqp serve`` up to where the model is loaded: keys, and what it refuses."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import typer
from fake_engine import FakeEngine, tiny_served
from typer.testing import CliRunner

from tsqp.config import EnclaveConfig, ServeConfig
from tsqp.engine.api import Engine
from tsqp.serve.keys import read_keys
from tsqp.serve.served_model import ServedModel

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
        (["--worker", "a:1", "--worker", "b:1"], "give --worker once"),
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


@pytest.mark.parametrize(("level", "told"), [(None, False), ("open", True)])
def test_it_tells_its_address_and_that_open_is_read(
    level: str | None,
    told: bool,  # noqa: FBT001
    app: typer.Typer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = FakeEngine()
    levels: list[str] = []

    def loaded(enclave: EnclaveConfig, _served: ServeConfig, _stack: ExitStack) -> tuple[Engine, ServedModel]:
        levels.append(enclave.level)
        return engine, tiny_served(enclave.level)

    @contextmanager
    def no_signals(server: object) -> Iterator[None]:
        server.should_exit = True  # type: ignore[attr-defined]  # it ends as soon as it has started
        yield

    monkeypatch.setattr(command, "_loaded", loaded)
    monkeypatch.setattr("tsqp.serve.server.Server.capture_signals", no_signals)
    done = CliRunner().invoke(app, ["--port", "0", *(["--level", level] if level else [])])
    assert done.exit_code == 0, done.output
    assert levels == [level or "masked"]
    assert f"level {levels[0]}: listening on http://127.0.0.1:" in done.stdout
    assert ("the worker reads every prompt" in done.stderr) == told
    assert engine.closed_with == 30.0
