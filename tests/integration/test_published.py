"""The published scripts: their commands, variables and lines of output."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from workers import free_port

ROOT = Path(__file__).parents[2]
RULE = "=" * 50


def run(folder: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT / folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextmanager
def server(**environment: str) -> Iterator[list[str]]:
    """Run tee_gpu/server.py; yield the lines it prints until it serves."""
    process = subprocess.Popen(
        [sys.executable, "server.py"],
        cwd=ROOT / "tee_gpu",
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        lines: list[str] = []
        while not lines or "ZeroMQ server started" not in lines[-1]:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            lines.append(line.rstrip("\n"))
        yield lines
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        process.stdout.close()
        process.stderr.close()


@pytest.fixture(scope="module")
def port(bundled_directory: Path) -> Iterator[tuple[str, list[str]]]:
    number = str(free_port())
    with server(LLAMA_GPU_PORT=number, LLAMA_MODEL_PATH=str(bundled_directory)) as lines:
        yield number, lines


def test_server_says_what_it_serves(port: tuple[str, list[str]], bundled_directory: Path) -> None:
    number, lines = port
    assert lines == [
        f"Model: {bundled_directory}",
        "Device: cpu",
        "Dtype: float32",
        "✓ Registered 212 remote modules",
        f"✓ ZeroMQ server started on port {number}",
    ]


def test_split_runner_prints_the_published_lines(port: tuple[str, list[str]], bundled_directory: Path) -> None:
    endpoint = f"localhost:{port[0]}"
    done = run("tee_gpu", "tee_runner.py", LLAMA_GPU_ENDPOINT=endpoint, LLAMA_MODEL_PATH=str(bundled_directory))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        f"✓ Connected to server at {endpoint}",
        "✓ Found 212 linear/embedding modules",
        "✓ Model setup complete",
    ]
    assert_block(lines[3:], "Token length: 128", 128)


def test_split_runner_takes_tokens_and_batch(port: tuple[str, list[str]], bundled_directory: Path) -> None:
    environment = {"LLAMA_GPU_ENDPOINT": f"127.0.0.1:{port[0]}", "LLAMA_MODEL_PATH": str(bundled_directory)}
    done = run("tee_gpu", "tee_runner.py", "--tokens", "16", "--batch", "2", **environment)
    assert done.returncode == 0, done.stderr
    assert_block(done.stdout.splitlines()[3:], "Token length: 16 (batch of 2)", 32)


def test_local_runner_prints_the_same_block(bundled_directory: Path) -> None:
    done = run("tee_only_llama", "tee_runner.py", "--dtype", "bfloat16", LLAMA_MODEL_PATH=str(bundled_directory))
    assert done.returncode == 0, done.stderr
    assert_block(done.stdout.splitlines()[1:], "Token length: 128", 128)


def assert_block(lines: list[str], length: str, tokens: int) -> None:
    """Check the result between its rules, and that time and throughput fit each other."""
    assert (lines[0], lines[1], lines[4:]) == (RULE, length, [RULE])
    seconds = re.fullmatch(r"Prefill time: ([\d.]+) s", lines[2])
    rate = re.fullmatch(r"Throughput: ([\d.]+) tokens/s", lines[3])
    assert seconds
    assert rate
    assert float(rate[1]) * float(seconds[1]) == pytest.approx(tokens, rel=0.01)


def test_runner_without_a_server_names_host_and_port_and_fails(tiny_llama: Path) -> None:
    endpoint = f"localhost:{free_port()}"
    environment = {
        "LLAMA_GPU_ENDPOINT": endpoint,
        "LLAMA_MODEL_PATH": str(tiny_llama),
        "TSQP_CONNECT_TIMEOUT_S": "0.5",
    }
    done = run("tee_gpu", "tee_runner.py", **environment)
    assert done.returncode == 4
    assert f"no TSQP worker answered at {endpoint} within 0.5 s" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("script", "variable"), [("server.py", "TSQP_LISTEN"), ("tee_runner.py", "LLAMA_GPU_ENDPOINT")]
)
def test_the_scripts_use_the_network_in_clear_only_if_that_is_said(script: str, variable: str, tmp_path: Path) -> None:
    """Before the model is looked for, which is not there."""
    address = f"0.0.0.0:{free_port()}"
    environment = {"LLAMA_MODEL_PATH": str(tmp_path / "none"), "LLAMA_GPU_DEVICE": "cpu", variable: address}
    for said, complaint in (("off", f"{address} is beyond this machine"), ("on", str(tmp_path / "none"))):
        done = run("tee_gpu", script, **environment, TSQP_INSECURE=said)
        assert done.returncode == 3
        assert complaint in " ".join(done.stderr.split())


def test_a_gpu_that_was_asked_for_and_is_missing_is_an_error(tiny_llama: Path) -> None:
    environment = {"LLAMA_GPU_DEVICE": "cuda:99", "LLAMA_MODEL_PATH": str(tiny_llama)}
    done = run("tee_gpu", "server.py", **environment)
    assert done.returncode == 3
    assert "cuda:99 was asked for" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
