"""``tsqp demo`` as a process: its page, its view and its end. The engine is a stand-in; worker and server are real."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bad_requests import CHAT, post
from real_serving import speaking_checkpoint
from serving import core_limits
from tiny_models import tiny_checkpoint_with_words
from typer.testing import CliRunner

from tsqp.cli import app

PATIENCE_S = 120
# The command as it is, but for the engine: it needs no worker, and so the view stays empty.
START = f"""
import sys, types
from contextlib import contextmanager
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from fake_engine import FakeEngine
@contextmanager
def open_engine(model, config, settings, *, on_step, on_notice):
    on_notice("an engine of %d bytes." % settings.kv_memory)
    yield FakeEngine()
sys.modules["tsqp.engine.opening"] = types.SimpleNamespace(open_engine=open_engine)
from tsqp.cli import main
main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint_with_words(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@contextmanager
def demo(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command; yield it and what it printed up to the page's address."""
    words = [sys.executable, "-c", START, "demo", "--no-browser", *flags]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            printed = process.stdout.readline() + process.stdout.readline()
            yield process, printed
        finally:
            process.kill()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells whose child a process is")
@pytest.mark.parametrize("level", ["masked", "open"])
def test_it_serves_the_page_and_the_view_and_ends_cleanly(model: Path, level: str) -> None:
    with demo("--model", str(model), "--level", level) as (process, printed):
        assert f"level {level}" in printed
        assert ("reads every prompt" in printed) is (level == "open")
        url = printed.split("the page is at ")[1].split(";")[0]
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as page:  # noqa: S310  our own address
            assert b"What the worker sees" in page.read()
            assert "default-src 'none'" in page.headers["content-security-policy"]
        for file, kind in (("app.js", "text/javascript"), ("style.css", "text/css")):
            with urllib.request.urlopen(f"{url}/{file}", timeout=PATIENCE_S) as found:  # noqa: S310
                assert found.headers.get_content_type() == kind
        with urllib.request.urlopen(f"{url}/view", timeout=PATIENCE_S) as view:  # noqa: S310
            event = json.loads(view.readline().removeprefix(b"data: "))
        assert (event["level"], event["requests"]) == (level, 0)
        assert core_limits(process.pid) == ("0", "0")
        workers = children_of(process.pid)
        assert len(workers) == 1
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert not Path(f"/proc/{workers[0]}").exists()


def test_it_reads_the_engines_settings_and_states_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_KV_MEMORY", "1000000")
    monkeypatch.setenv("TSQP_DEFAULT_TOKENS", "5")
    with demo("--model", str(speaking_checkpoint(tmp_path / "tiny")), "--level", "open") as (process, printed):
        url = printed.split("the page is at ")[1].split(";")[0]
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
        answered = post(url.removeprefix("http://"), CHAT, json.dumps(body).encode())
        assert answered.content["choices"][0]["message"]["content"] == "Hello"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert "memory: keys and values 1.0 MB (2560 tokens)." in errors
    assert "an engine of 1000000 bytes." in errors


@pytest.mark.parametrize(
    ("flags", "environment", "says"),
    [
        (["--level", "local"], {}, "there is no worker to show"),
        (["--level", "none"], {}, "expected one of"),
        ([], {"LLAMA_GPU_ENDPOINT": "127.0.0.1:1"}, "unset LLAMA_GPU_ENDPOINT"),
        ([], {"TSQP_WORKERS": "127.0.0.1:1"}, "TSQP_WORKERS"),
        ([], {"TSQP_WORKER_KEY": "worker.key"}, "TSQP_WORKER_KEY"),
        ([], {"TSQP_WORKER_KEYS": "worker.key"}, "TSQP_WORKER_KEYS"),
        ([], {"TSQP_TLS_CERT": "cert.pem"}, "both a certificate and its key"),
        (["--port", "70000"], {}, "at most 65535"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_sentence(
    flags: list[str], environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.serve.process.forbid_core_dumps", lambda: None)  # of this process
    result = CliRunner().invoke(app, ["demo", "--no-browser", *flags], env=environment)
    assert result.exit_code != 0
    assert says in " ".join(result.output.split())
