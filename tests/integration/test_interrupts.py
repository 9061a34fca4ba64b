"""Ctrl-C, as a terminal sends it: to the whole foreground process group. Commands end cleanly and leave nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path

import psutil
import pytest
from fake_engine import FakeEngine
from http_server import http_server
from tiny_models import tiny_checkpoint_with_words

PATIENCE_S = 120
INTERRUPTED = 130
COMMANDS = {
    "prefill": ["prefill", "--level", "masked", "--prompt", "w1 w2"],
    "generate": ["generate", "--level", "masked", "w1 w2"],
    "serve": ["serve", "--port", "0"],
    "demo": ["demo", "--no-browser"],
}
TOKENS = 64
MANY_TOKENS = 2000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint_with_words(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@contextmanager
def foreground(words: list[str], scratch: Path) -> Iterator[subprocess.Popen[str]]:
    """Run ``tsqp`` as a shell would: in a process group of its own. Its temporary files lie in ``scratch``."""
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    with subprocess.Popen(
        [sys.executable, "-m", "tsqp", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**environment, "TMPDIR": str(scratch)},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def worker_of(process: subprocess.Popen[str]) -> psutil.Process:
    """Wait until a command has started its worker; it needs seconds from then until it is ready."""
    for _ in range(PATIENCE_S * 100):
        children = psutil.Process(process.pid).children()
        if children:
            assert len(children) == 1
            return children[0]
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("no worker was started")


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_the_worker_loads_ends_everything(command: str, model: Path, tmp_path: Path) -> None:
    with foreground([*COMMANDS[command], "--model", str(model)], tmp_path) as process:
        worker = worker_of(process)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == INTERRUPTED, errors
        assert "Traceback" not in errors
        assert errors.splitlines()[-1] == "stopped."
        assert not worker.is_running()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_loads_ends_with_the_process_that_started_it(model: Path, tmp_path: Path) -> None:
    with foreground([*COMMANDS["serve"], "--model", str(model)], tmp_path) as process:
        worker = worker_of(process)
        process.kill()
        worker.wait(PATIENCE_S)


def test_ctrl_c_lets_a_stream_finish_before_the_worker_goes(bundled_directory: Path, tmp_path: Path) -> None:
    with serving(bundled_directory, tmp_path) as (process, worker, url):
        with stream_of(url, TOKENS) as stream:
            events = [next_data(stream)]
            os.killpg(process.pid, signal.SIGINT)
            while events[-1] != "[DONE]":
                events.append(next_data(stream))
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        ends_cleanly(process, worker)
    assert list(tmp_path.iterdir()) == []


def test_a_second_ctrl_c_does_not_wait_for_answers(
    bundled_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSQP_DRAIN_S", "600")
    with serving(bundled_directory, tmp_path) as (process, worker, url):
        with stream_of(url, MANY_TOKENS) as stream:
            last = next_data(stream)
            os.killpg(process.pid, signal.SIGINT)
            while _answers(url):  # two signals at once are one
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGINT)
            while "error" not in json.loads(last):
                last = next_data(stream)
        assert json.loads(last)["error"]["code"] == "stopping"
        ends_cleanly(process, worker)
    assert list(tmp_path.iterdir()) == []


def test_a_second_ctrl_c_does_not_wait_for_a_worker_that_hangs(
    bundled_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TSQP_DRAIN_S", "TSQP_REQUEST_TIMEOUT_S"):
        monkeypatch.setenv(name, "600000")
    with serving(bundled_directory, tmp_path) as (process, worker, url):
        with stream_of(url, MANY_TOKENS) as stream:
            last = next_data(stream)
            worker.suspend()
            os.killpg(process.pid, signal.SIGINT)
            while _answers(url):
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGINT)
            while "error" not in json.loads(last):
                last = next_data(stream)
        assert json.loads(last)["error"]["code"] == "stopping"
        ends_cleanly(process, worker)


def test_a_second_ctrl_c_does_not_wait_for_clients() -> None:
    """One has sent half of its request; it gets no answer, not even that it is too slow."""
    lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 9")
    with http_server(FakeEngine(), drain_s=600) as server:
        address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        with socket.create_connection(address) as client:
            client.settimeout(PATIENCE_S)
            client.sendall("\r\n".join((*lines, "", "{")).encode())
            while not server.server.server_state.tasks:
                time.sleep(0.01)
            for _ in range(2):
                server.server.handle_exit(signal.SIGINT, None)
            server.thread.join()
            with suppress(ConnectionResetError):
                assert client.recv(1) == b""


@contextmanager
def serving(
    model: Path, scratch: Path, level: str = "open"
) -> Iterator[tuple[subprocess.Popen[str], psutil.Process, str]]:
    """Run ``tsqp serve`` with a worker of its own; yield both and the address."""
    words = ["serve", "--port", "0", "--level", level, "--model", str(model), "--served-model", "m"]
    with foreground(words, scratch) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "listening on " in line, process.communicate()
        yield process, worker_of(process), line.split("listening on ")[1].split(";")[0]


def stream_of(url: str, tokens: int) -> HTTPResponse:
    """Ask for a stream of so many tokens."""
    body = {"model": "m", "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)  # noqa: S310
    answer: HTTPResponse = urllib.request.urlopen(request, timeout=PATIENCE_S)  # noqa: S310  our own address
    return answer


def ends_cleanly(process: subprocess.Popen[str], worker: psutil.Process) -> None:
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert not worker.is_running()


def _answers(url: str) -> bool:
    """Tell whether a server still accepts connections."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) == 0


def next_data(stream: HTTPResponse) -> str:
    """Return the next event's data; what pads events is skipped."""
    for line in stream:
        if line.startswith(b"data: "):
            return line[6:].decode().strip()
    raise AssertionError("the stream broke off")
