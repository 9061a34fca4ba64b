"""Generation on the bundled model: against transformers, between levels, and when the worker goes away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from engine_answers import Answer
from tiny_models import reference_from
from workers import free_port

from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine.api import Engine, Failed, Finished, Generation, PromptRead, Sampling
from tsqp.engine.opening import open_engine
from tsqp.errors import TransportError
from tsqp.launch import local_worker
from tsqp.levels import open_model
from tsqp.model.tokenizer import read_tokenizer

PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "In 1969,",
    "My favourite food is",
    "The meaning of life",
    "Dear Sir,",
    "Roses are red,",
    "To be or not",
)
TOKENS = 64
GREEDY = Sampling(temperature=0)
# About 90 blocks: all that is asked here at once, and not the default's 1 GiB.
SMALL = EngineConfig(kv_memory=1 << 28)
_PATIENCE_S = 120


@dataclass
class Running:
    """An engine with the tokenizer of its model."""

    engine: Engine
    encode: object

    def ask(self, prompt: str, tokens: int = TOKENS, *, end: bool = False, sampling: Sampling = GREEDY) -> Answer:
        answer = Answer()
        ids = tuple(self.encode(prompt))  # type: ignore[operator]
        self.engine.submit(
            Generation(prompt_ids=ids, max_tokens=tokens, sampling=sampling, ignore_end=not end), answer.take
        )
        return answer


@contextmanager
def running(level: str, name: str = "smollm2", micro_batches: int | None = None) -> Iterator[Running]:
    model = open_model(name, level)
    assert model.tokenizer is not None
    config = EnclaveConfig(level=level, micro_batches=micro_batches)
    with ExitStack() as stack:
        if level != "local":
            config = replace(config, worker=stack.enter_context(local_worker(["--model", str(model.directory)])))
        yield Running(stack.enter_context(open_engine(model, config, SMALL)), model.tokenizer.encode)


def generated(
    level: str, name: str = "smollm2", micro_batches: int | None = None, tokens: int = TOKENS
) -> list[list[int]]:
    """All prompts at once."""
    with running(level, name, micro_batches) as run:
        answers = [run.ask(prompt, tokens) for prompt in PROMPTS]
        for answer in answers:
            assert isinstance(answer.end, Finished)
        return [answer.ids for answer in answers]


@pytest.fixture(scope="module")
def likeliest(bundled_directory: Path) -> Callable[[str, list[int]], list[int]]:
    """What transformers finds likeliest after a prompt, and after each of the tokens that follow it but the last.

    Where these are the tokens themselves, its greedy ``generate`` gives them too, one by one.
    """
    model, tokenizer = reference_from(bundled_directory), read_tokenizer(bundled_directory)

    @torch.inference_mode()
    def ask(prompt: str, ids: list[int]) -> list[int]:
        known = tokenizer.encode(prompt)
        logits_TV = model(torch.tensor([known + ids])).logits[0, len(known) - 1 : -1]
        found: list[int] = logits_TV.argmax(-1).tolist()
        return found

    return ask


@pytest.mark.parametrize("level", ["local", "open"])
def test_greedy_tokens_are_those_of_transformers(level: str, likeliest: Callable[[str, list[int]], list[int]]) -> None:
    found = generated(level)
    assert [len(ids) for ids in found] == [TOKENS] * len(PROMPTS)
    assert found == [likeliest(prompt, ids) for prompt, ids in zip(PROMPTS, found, strict=True)]


def test_packed_levels_generate_the_same_tokens() -> None:
    directory = str(open_model("smollm2", "masked").directory)
    local = generated("local", directory, tokens=24)
    assert generated("masked", tokens=24) == local
    assert generated("verified", micro_batches=2, tokens=24) == local  # two groups in flight


@pytest.fixture(scope="module")
def local() -> Iterator[Running]:
    with running("local") as run:
        yield run


def test_a_request_has_the_same_tokens_alone_and_among_others(local: Running) -> None:
    alone = local.ask(PROMPTS[0], 24)
    assert isinstance(alone.end, Finished)
    answers = [local.ask(prompt * 40, 24) for prompt in PROMPTS[1:]]
    among = local.ask(PROMPTS[0], 24)
    assert all(isinstance(answer.end, Finished) for answer in [*answers, among])
    assert among.ids == alone.ids


def test_blocks_are_free_again_whatever_ended_a_request(local: Running) -> None:
    before = local.engine.stats()
    kept = local.ask("Once", 8)
    cancelled = Answer()
    number = local.engine.submit(
        Generation(prompt_ids=(1, 2, 3), max_tokens=500, sampling=GREEDY, ignore_end=True), cancelled.take
    )
    local.engine.cancel(number)
    assert isinstance(cancelled.end, Finished)
    assert cancelled.end.reason == "cancelled"
    assert isinstance(kept.end, Finished)
    assert isinstance(kept.events[0], PromptRead)
    after = local.engine.stats()
    assert after.running == after.queued == 0
    assert after.blocks_free == before.blocks_free


def test_a_lost_worker_ends_requests_with_an_error_and_a_new_one_serves_again() -> None:
    model = open_model("smollm2", "open")
    assert model.tokenizer is not None
    address = f"127.0.0.1:{free_port()}"
    words = ["--model", str(model.directory), "--listen", address]
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        first.enter_context(local_worker(words))
        config = EnclaveConfig(level="open", worker=address, request_timeout_s=2.0, connect_timeout_s=2.0)
        run = Running(stack.enter_context(open_engine(model, config, SMALL)), model.tokenizer.encode)
        asked = run.ask("Once upon a time", 400)
        while len(asked.ids) < 3:
            assert not asked.ended.wait(0.01)
        first.close()
        assert isinstance(asked.end, Failed)
        assert isinstance(asked.end.error, TransportError)
        with pytest.raises(TransportError):
            run.ask("Once", 4)
        assert not run.engine.stats().ready
        assert run.engine.stats().reason
        stack.enter_context(local_worker(words))
        for _ in range(_PATIENCE_S):
            if run.engine.stats().ready:
                break
            threading.Event().wait(1)
        assert isinstance(run.ask("Once", 4).end, Finished)
