"""``tsqp serve`` as a process: over TLS to OpenAI's package, without core dumps, and without a worker's view."""

from __future__ import annotations

import http.client
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from http_server import own_certificate
from openai import DefaultHttpxClient, OpenAI
from real_serving import MODEL, speaking_checkpoint
from serving import core_limits

from tsqp.errors import NoTeeError, SetupError

PATIENCE_S = 120
HI: list[Any] = [{"role": "user", "content": "Hi"}]


@dataclass(frozen=True)
class Serving:
    """A process that serves over TLS: its number, its host and port, and what trusts its certificate."""

    pid: int
    host: str
    trust: ssl.SSLContext


@contextmanager
def serving(directory: Path) -> Iterator[Serving]:
    """Run the command over a tiny model, with a certificate of ours."""
    cert, key = own_certificate(directory)
    with running(directory, f"--tls-cert {cert} --tls-key {key}") as (pid, host, _):
        yield Serving(pid, host, ssl.create_default_context(cafile=str(cert)))


@contextmanager
def running(directory: Path, options: str) -> Iterator[tuple[int, str, list[str]]]:
    """Run it, and end it as people do; yield its number, host and port, and in the end what it noted."""
    words = f"serve --level local --port 0 --served-model {MODEL} {options}".split()
    noted: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", "tsqp", *words, "--model", str(speaking_checkpoint(directory / "tiny"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "listening on https://" in line, process.communicate()
            host = line.split("https://")[1].split(";")[0]
            yield process.pid, host, noted
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=PATIENCE_S)
            noted.append(errors)
            assert process.returncode == 0, errors
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("served")) as server:
        yield server


def test_openais_package_streams_over_tls(server: Serving) -> None:
    with OpenAI(
        base_url=f"https://{server.host}/v1", api_key="none", http_client=DefaultHttpxClient(verify=server.trust)
    ) as client:
        asked: dict[str, Any] = {"model": MODEL, "messages": HI, "temperature": 0, "max_tokens": 20}
        chunks = list(client.chat.completions.create(**asked, stream=True))
        whole = client.chat.completions.create(**asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert len(chunks) > 3
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_it_leaves_no_core_dump(server: Serving) -> None:
    assert core_limits(server.pid) == ("0", "0")


@pytest.mark.parametrize("path", ["/view", "/view/", "/view?level=open"])
def test_it_never_offers_what_a_worker_sees(server: Serving, path: str) -> None:
    with closing(http.client.HTTPSConnection(server.host, context=server.trust, timeout=PATIENCE_S)) as connection:
        connection.request("GET", path)
        assert connection.getresponse().status == 404


def test_a_server_for_development_says_loudly_that_it_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(
        f'[sgx]\nmrenclave = "{"11" * 32}"\n[collateral]\nfile = "none.json"\n', encoding="utf-8"
    )
    with running(tmp_path, "--attestation none") as (_, host, noted):
        words = [sys.executable, "-m", "tsqp", "verify", f"https://{host}", "--policy", str(tmp_path / "policy.toml")]
        asked = subprocess.run(words, capture_output=True, text=True, check=False)
    assert asked.returncode == NoTeeError.exit_code
    assert asked.stderr == (
        "error: the server runs in no trusted execution environment: its attestation is 'none', for development, and "
        "proves nothing.\n"
    )
    assert "ATTESTATION IS 'none', FOR DEVELOPMENT" in noted[0]


@pytest.mark.parametrize("backend", ["gramine", "tdx"])
def test_where_there_is_no_tee_a_server_that_must_attest_does_not_start(backend: str, tmp_path: Path) -> None:
    words = [
        "serve",
        "--level",
        "local",
        "--attestation",
        backend,
        "--model",
        str(speaking_checkpoint(tmp_path / "tiny")),
    ]
    started = subprocess.run([sys.executable, "-m", "tsqp", *words], capture_output=True, text=True, check=False)
    assert started.returncode == SetupError.exit_code
    assert started.stderr.startswith("error: ")
    assert "Traceback" not in started.stderr
