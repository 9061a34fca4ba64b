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
def open_engine(model, config, *, on_step, on_notice):
    yield FakeEngine()
sys.modules["tsqp.engine.loop"] = types.SimpleNamespace(open_engine=open_engine)
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
        workers = children_of(process.pid)
        assert len(workers) == 1
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert not Path(f"/proc/{workers[0]}").exists()


@pytest.mark.parametrize(
    ("flags", "environment", "says"),
    [
        (["--level", "local"], {}, "there is no worker to show"),
        (["--level", "none"], {}, "expected one of"),
        ([], {"LLAMA_GPU_ENDPOINT": "127.0.0.1:1"}, "unset LLAMA_GPU_ENDPOINT"),
        (["--port", "70000"], {}, "at most 65535"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_sentence(
    flags: list[str], environment: dict[str, str], says: str
) -> None:
    result = CliRunner().invoke(app, ["demo", "--no-browser", *flags], env=environment)
    assert result.exit_code != 0
    assert says in " ".join(result.output.split())
