"""``tsqp serve`` with a worker that it started itself, and that ends: it starts it again."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from bad_requests import COMPLETIONS, get, post
from integration.test_interrupts import PATIENCE_S, ends_cleanly, next_data, serving, stream_of, worker_of
from real_serving import speaking_checkpoint

TOKENS = 300
SHORT = json.dumps({"model": "m", "prompt": "abc", "max_tokens": 6, "temperature": 0}).encode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking_checkpoint(tmp_path_factory.mktemp("own"))


def until_ready(host: str) -> None:
    for _ in range(PATIENCE_S * 20):
        if get(host, "/readyz").status == 200:
            return
        time.sleep(0.05)
    raise AssertionError("it was not ready in time")


@pytest.mark.parametrize("level", ["open", "masked"])
def test_the_running_request_goes_on_and_the_next_is_answered(level: str, model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path, level) as (process, worker, url):
        host = url.removeprefix("http://")
        before = post(host, COMPLETIONS, SHORT)
        assert before.status == 200
        with stream_of(url, TOKENS) as stream:
            events = [next_data(stream)]
            worker.kill()
            while events[-1] != "[DONE]":
                events.append(next_data(stream))
        assert not any("error" in json.loads(event) for event in events[:-1])
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        until_ready(host)
        assert post(host, COMPLETIONS, SHORT).content["choices"] == before.content["choices"]
        (another,) = psutil.Process(process.pid).children()
        assert another.pid != worker.pid
        os.killpg(process.pid, signal.SIGINT)
        ends_cleanly(process, another)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_it_starts_again_ends_everything(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as (process, worker, url):
        with stream_of(url, TOKENS) as stream:
            next_data(stream)
            worker.kill()
        another = worker
        while another == worker:
            another = worker_of(process)
        os.killpg(process.pid, signal.SIGINT)
        ends_cleanly(process, another)
    assert list(tmp_path.iterdir()) == []
