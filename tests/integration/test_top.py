"""``tsqp top`` on a real worker at debug, beside Prometheus; it goes away and comes back, and Ctrl-C ends the watch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from serving import metrics_of
from typer.testing import CliRunner
from workers import free_port, linked

from tsqp.cli import app
from tsqp.model.architecture import read_config
from tsqp.model.llama import Llama

PATIENCE_S = 120
# No count or size of anything else here.
IDS = [73, 97, 89]


@dataclass
class Running:
    """A worker that is started, stopped and started again at one address."""

    model: Path
    log: Path
    address: str
    metrics: str
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        words = ["worker", "--model", str(self.model), "--device", "cpu", "--listen", self.address, "--json"]
        words += ["--metrics", self.metrics, "--log-level", "debug", "--log-format", "json"]
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tsqp", *words], stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout
        assert json.loads(self.process.stdout.readline())["endpoints"]

    def stop(self) -> None:
        if self.process and self.process.stdout:
            self.process.terminate()
            assert self.process.wait(PATIENCE_S) == 0
            self.process.stdout.close()
            self.process = None


@pytest.fixture(scope="module")
def running(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("top") / "log"
    worker = Running(tiny_llama, log, f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}")
    worker.start()
    yield worker
    worker.stop()


def top(*words: str) -> str:
    done = CliRunner().invoke(app, ["top", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_worker_is_shown_and_nothing_of_what_it_computes(running: Running, tiny_llama: Path) -> None:
    with linked(running.address, tiny_llama) as link:
        logits_BTV = Llama(read_config(tiny_llama), link.ops).prefill(torch.tensor([IDS]), all_logits=True)
    found = json.loads(top(running.address, "--once", "--json", "--interval", "0.1"))
    assert (found["kind"], found["url"], found["serves"], found["device"]) == ("worker", running.address, "open", "cpu")
    assert sum(found["parts"].values()) == pytest.approx(1.0)
    assert found["memory_total_bytes"] > found["memory_bytes"] > 0
    assert f"worker {running.address}" in top(running.address, "--once", "--interval", "0.1")

    with urllib.request.urlopen(f"http://{running.metrics}/metrics", timeout=PATIENCE_S) as answer:
        scraped = metrics_of(answer.read().decode())
    assert scraped["tsqp_worker_rows_total", ()] >= len(IDS)
    assert scraped["tsqp_worker_requests_total", ("hello",)] == 3

    lines = running.log.read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    computed = [entry for entry in entries if "rows by" in entry["message"]]
    assert {"request_id", "duration_s"} <= computed[0].keys()
    numbers = [f"{abs(value):.4f}" for value in logits_BTV.flatten()[:50].tolist()]
    text = running.log.read_text(encoding="utf-8")
    assert not [each for each in (str(IDS)[1:-1], "tensor(", *numbers) if each in text]


@contextmanager
def watching(running: Running, out: Path) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "tsqp", "top", running.address, "--interval", "0.2", "--json"]
    with out.open("w", encoding="utf-8") as file, subprocess.Popen(words, stdout=file, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_worker_that_goes_and_comes_back_is_watched_on_and_ctrl_c_ends_it(running: Running, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def wait_for(text: str, start: int = 0) -> int:
        """Wait until a text has been printed since; return how much has."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in (printed := out.read_text(encoding="utf-8"))[start:]:
            assert time.monotonic() < deadline, printed
            time.sleep(0.1)
        return len(printed)

    with watching(running, out) as process:
        seen = wait_for('"interval_s"')
        running.stop()
        seen = wait_for('"error"', seen)
        running.start()
        wait_for('"interval_s"', seen)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
    for line in out.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        assert entry.keys() == {"error"} or entry["kind"] == "worker"


def test_nobody_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_CONNECT_TIMEOUT_S", "0.1")
    done = CliRunner().invoke(app, ["top", f"127.0.0.1:{free_port()}"])
    assert done.exit_code == 4
    assert "no TSQP worker answered at" in done.stderr
