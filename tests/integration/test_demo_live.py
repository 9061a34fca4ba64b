"""``tsqp demo`` as people meet it: the bundled model and a real Chromium, an answer and what the worker sees of it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from browser import Page, chromium

PATIENCE_S = 120
QUESTION = "What is the capital of France?"
DONE = "!document.querySelector('#send').disabled && document.querySelectorAll('.message').length >= 2"
PARTS_OF_ENCLAVE = ("attention", "quantise", "mask", "check", "ahead", "mask_wait")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@contextmanager
def demo(level: str, scratch: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command as a shell does; yield it and the page's address."""
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    with subprocess.Popen(
        [sys.executable, "-m", "tsqp", "demo", "--no-browser", "--level", level],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**environment, "TMPDIR": str(scratch)},
    ) as process:
        try:
            assert process.stdout is not None
            printed = process.stdout.readline() + process.stdout.readline()
            assert "the page is at " in printed, process.communicate()
            yield process, printed.split("the page is at ")[1].split(";")[0]
        finally:
            process.kill()


def bars_of(page: Page) -> list[float]:
    return list(
        page.run("[...document.querySelectorAll('#histogram rect')].map((bar) => +bar.attributes.height.value)")
    )


def entropy(bars: list[float]) -> float:
    """Return the entropy of what bars of such heights show, in bits."""
    shares = [bar / sum(bars) for bar in bars if bar]
    return -sum(share * math.log2(share) for share in shares)


def ask(page: Page, tokens: int) -> None:
    """Ask for so many tokens, and wait until the first is there while the answer is still being made."""
    page.run(f"document.querySelector('#max-tokens').value = {tokens}")
    page.type("#prompt", QUESTION)
    page.press("Enter", 13)
    page.until("[...document.querySelectorAll('.assistant .body')].at(-1)?.textContent")


@pytest.mark.parametrize("level", ["masked", "open"])
def test_the_answer_and_what_the_worker_sees_of_it(
    level: str, page: Page, bundled_packed: Path, tmp_path: Path
) -> None:
    assert bundled_packed.exists()
    reads = level == "open"
    with demo(level, tmp_path) as (process, url):
        (worker,) = psutil.Process(process.pid).children(recursive=True)
        page.open(url)
        page.until("document.querySelector('#verdict').textContent.startsWith('Nothing yet')")
        ask(page, 24)
        page.until("document.querySelector('#words').textContent")
        page.until(DONE)
        assert "Paris" in page.text(".assistant .body")
        if reads:  # the view is a moment behind, and has all in the end
            page.until("document.querySelector('#read-answer').textContent.includes('Paris')")
        assert (QUESTION in page.text("#text")) is reads
        assert ("Paris" in page.text("#text")) is reads
        assert page.run("document.querySelector('#verdict').className") == f"verdict {'bad' if reads else 'good'}"
        bars = bars_of(page)
        assert len(bars) == 64
        assert (entropy(bars) > 5.9) is not reads  # chance alone takes a few hundredths from 6 bits
        page.until("document.querySelector('#parts-list').textContent.includes('worker')")
        with urllib.request.urlopen(f"{url}/status", timeout=PATIENCE_S) as answer:  # noqa: S310  our own address
            seconds = json.load(answer)["seconds"]
        assert sum(seconds[name] for name in PARTS_OF_ENCLAVE) < seconds["enclave"]
        ask(page, 48)
        os.killpg(process.pid, signal.SIGINT)
        page.until("!document.querySelector('#send').disabled")
        assert page.run("document.querySelector('#error').hidden")
        page.call("Page.navigate", url="about:blank")
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert not worker.is_running()
    assert list(tmp_path.iterdir()) == []
