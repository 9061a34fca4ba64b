"""A worker and commands of one user that are told no address meet over shared memory."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from real_serving import speaking_checkpoint
from tiny_models import tiny_checkpoint
from typer.testing import CliRunner
from workers import free_port

from tsqp.cli import app, workers
from tsqp.config import EnclaveConfig, EngineConfig, ServeConfig
from tsqp.enclave import connect
from tsqp.engine import opening
from tsqp.launch import worker_process
from tsqp.transport.base import ClientTransport
from tsqp.transport.client import open_client
from tsqp.transport.keys import KeyPair
from tsqp.transport.nearby import find_nearby
from tsqp.transport.urls import Endpoint

# The package has the command under the module's name.
serve = importlib.import_module("tsqp.cli.serve")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that enclaves of this process connected to."""
    found: list[str] = []

    def noted(endpoint: Endpoint, limit_bytes: int, key: bytes | None, own: KeyPair | None) -> ClientTransport:
        found.append(endpoint.url)
        return open_client(endpoint, limit_bytes, key, own)

    monkeypatch.setattr(connect, "open_client", noted)
    return found


@contextmanager
def default_worker(model: Path, port: int) -> Iterator[str]:
    """Run ``tsqp worker`` without an address; yield that of its shared memory."""
    words = [sys.executable, "-m", "tsqp", "worker", "--model", str(model), "--device", "cpu"]
    with worker_process([*words, "--json", "--exit-with-parent"], {**os.environ, "LLAMA_GPU_PORT": str(port)}):
        found = find_nearby(port)
        assert found is not None
        yield found.url


def said(command: str, *arguments: object) -> str:
    done = CliRunner().invoke(app, [command, *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return " ".join(done.stderr.split())


def test_prefill_meets_a_default_worker_over_shared_memory(
    tiny_llama: Path, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    prompt = ("--model", tiny_llama, "--tokens", 4, "--repeat", 1)
    with default_worker(tiny_llama, port) as shm:
        said("prefill", *prompt, "--worker", f"localhost:{port}")
        assert used == [shm]
        monkeypatch.setattr(workers, "DEFAULT_PORT", port)
        assert f"using the worker at {shm}" in said("prefill", *prompt)
        assert set(used) == {shm}
        used.clear()
        said("prefill", *prompt, "--worker", f"[::1]:{port}", "--level", "local")
        assert not used


def test_a_worker_of_another_model_or_level_is_left_and_said(
    tiny_llama: Path, tmp_path: Path, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setattr(workers, "DEFAULT_PORT", port)
    other = tiny_checkpoint(tmp_path / "other", seed=7)
    with default_worker(tiny_llama, port) as shm:
        for options, why in (
            (("--model", other), "holds model"),
            (("--model", tiny_llama, "--level", "masked"), "serves float"),
        ):
            used.clear()
            notices = said("prefill", *options, "--tokens", 4, "--repeat", 1)
            assert why in notices
            assert "Starting another worker for this run." in notices
            assert used[0] == shm
            assert shm not in used[1:]


def test_a_worker_that_is_told_where_is_used_there(tiny_llama: Path, used: list[str]) -> None:
    port = free_port()
    words = [sys.executable, "-m", "tsqp", "worker", "--model", str(tiny_llama), "--device", "cpu"]
    with worker_process([*words, "--listen", f"127.0.0.1:{port}", "--json", "--exit-with-parent"]):
        said("prefill", "--model", tiny_llama, "--worker", f"127.0.0.1:{port}", "--tokens", 4, "--repeat", 1)
    assert used == [f"tcp://127.0.0.1:{port}"]


def test_a_directory_that_is_not_private_is_said_and_tcp_used(
    tiny_llama: Path, tmp_path: Path, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    with default_worker(tiny_llama, port):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        tmp_path.chmod(0o700)
        (tmp_path / "tsqp").mkdir()
        (tmp_path / "tsqp").chmod(0o777)
        notices = said("prefill", "--model", tiny_llama, "--worker", f"127.0.0.1:{port}", "--tokens", 4)
    assert "is not private to you (directory" in notices
    assert used == [f"tcp://127.0.0.1:{port}"]


@pytest.mark.parametrize("key", [None, "k"])
def test_serve_and_generate_look_for_shared_memory_too(
    key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where a key is given: shared memory takes none. Without an address the server has a worker of its own."""
    model, port = speaking_checkpoint(tmp_path / "tiny"), free_port()
    opened: list[tuple[EnclaveConfig, EngineConfig]] = []

    @contextmanager
    def noted(_model: object, enclave: EnclaveConfig, engine: EngineConfig, **_: object) -> Iterator[None]:
        opened.append((enclave, engine))
        yield

    monkeypatch.setattr(opening, "open_engine", noted)
    monkeypatch.setattr(workers, "DEFAULT_PORT", port)
    enclave = EnclaveConfig(model=str(model), worker_key=key)
    tcp = f"localhost:{port}"
    with default_worker(model, port) as shm, ExitStack() as stack:
        for settings in (EngineConfig(workers=(tcp,)), EngineConfig()):
            serve._loaded(replace(enclave, worker=tcp if key else None), settings, ServeConfig(), None, stack)
        (_, first), (second, _) = opened
        assert first.workers == ((tcp,) if key else (shm,))
        assert second.worker == tcp if key else second.worker not in (tcp, shm)
        with pytest.raises(AttributeError):  # there is no engine
            CliRunner().invoke(app, ["generate", "abc", "--model", str(model)], catch_exceptions=False)
        assert opened[-1][0].worker == shm
