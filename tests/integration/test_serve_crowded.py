"""The HTTP server before real engines that are full, or slow, or left: who waits, who is refused, and what is freed."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from bad_requests import CHAT, COMPLETIONS, post
from real_serving import CONTEXT, MODEL, Tiny, client_of, speaking_checkpoint

from tsqp import loaded
from tsqp.engine.loop import GenerationEngine
from tsqp.engine.memory import cache_bytes
from tsqp.model.architecture import read_config

_PATIENCE_S = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking_checkpoint(tmp_path_factory.mktemp("tiny"))


class Held:
    """Steps that wait to be let go, but for the first ``free`` ones."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open, self.free = threading.Event(), 0
        run = loaded.run_together

        def waiting(work: Any) -> list[Any]:
            self.free -= 1
            assert self.free >= 0 or self.open.wait(_PATIENCE_S)
            return list(run(work))

        patch.setattr(loaded, "run_together", waiting)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch)
    yield held
    held.open.set()


def test_a_full_queue_is_a_429_and_leaves_nothing_of_the_request(checkpoint: Path, held: Held) -> None:
    with ExitStack() as stack:
        tiny = Tiny(checkpoint, "local", stack, max_running=2, max_queued=4)
        stack.callback(held.open.set)
        body = json.dumps({"model": MODEL, "prompt": "abc", "max_tokens": 4, "n": 4, "ignore_eos": True}).encode()
        answers: list[int] = []
        first = threading.Thread(target=lambda: answers.append(post(tiny.host, COMPLETIONS, body).status))
        first.start()
        while tiny.engine.stats().running + tiny.engine.stats().queued < 4:
            assert first.is_alive()
        refused = post(tiny.host, COMPLETIONS, body)
        assert (refused.status, refused.content["error"]["code"]) == (429, "queue_full")
        held.open.set()
        first.join()
        assert answers == [200]
        until_idle(tiny.engine)
        assert tiny.engine.stats().completion_tokens == 16  # none of the request that was refused
        assert post(tiny.host, COMPLETIONS, body).status == 200
        stats = tiny.engine.stats()
        assert (stats.running, stats.queued) == (0, 0)


def test_a_client_that_leaves_frees_its_blocks(checkpoint: Path, held: Held) -> None:
    """Whether its prompt is being read, its answer streams, or it waits for the whole."""
    held.open.set()
    with ExitStack() as stack:
        tiny = Tiny(checkpoint, "local", stack)
        client = stack.enter_context(client_of(tiny.server)).with_options(timeout=0.3)
        create: Any = partial(client.completions.create, model=MODEL, max_tokens=600, extra_body={"ignore_eos": True})
        for stream in (True, False):
            held.open.clear()
            with pytest.raises(openai.APITimeoutError):
                list(create(prompt="x" * 300, stream=stream))
            until_idle(tiny.engine)  # before the step has ended
            held.open.set()
        assert tiny.engine.stats().completion_tokens < 1200


def test_a_client_that_leaves_in_the_middle_of_its_answer_frees_its_blocks(checkpoint: Path, held: Held) -> None:
    held.free = 50
    with ExitStack() as stack:
        tiny = Tiny(checkpoint, "local", stack)
        stack.callback(held.open.set)
        client = stack.enter_context(client_of(tiny.server))
        with client.completions.create(
            model=MODEL, prompt="abc", max_tokens=600, stream=True, extra_body={"ignore_eos": True}
        ) as chunks:
            assert [bool(next(chunks).choices) for _ in range(3)] == [True] * 3
        until_idle(tiny.engine)  # before the step has ended
        held.open.set()
        assert tiny.engine.stats().completion_tokens <= 51  # at most with the step that was held


def test_chats_that_name_no_limit_run_together(tmp_path: Path) -> None:
    """As OpenAI's package asks by default. All the room that there is would be a quarter of the cache for each."""
    directory = speaking_checkpoint(tmp_path / "long", max_position_embeddings=8 * CONTEXT)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True, "ignore_eos": True}
    with ExitStack() as stack:
        tiny = Tiny(directory, "local", stack, kv_memory=4 * cache_bytes(read_config(directory), 8 * CONTEXT))
        for _ in range(16):
            connection = stack.enter_context(closing(http.client.HTTPConnection(tiny.host, timeout=_PATIENCE_S)))
            connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
            assert connection.getresponse().status == 200  # the engine has it
        until(lambda: tiny.engine.stats().running == 16)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.02)


def until_idle(engine: GenerationEngine) -> None:
    until(lambda: not (engine.stats().running or engine.stats().queued))
    assert engine.stats().blocks_free == engine.stats().blocks_total
