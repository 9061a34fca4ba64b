"""Steps with a worker: one round trip for each linear whoever asks, and groups that take turns change no token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_answers import Answer
from real_serving import speaking_checkpoint
from workers import StartWorker

from tsqp import loaded
from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine.api import Finished, Generation, Sampling
from tsqp.engine.loop import GenerationEngine
from tsqp.engine.opening import open_engine
from tsqp.levels import open_model
from tsqp.model.architecture import linear_groups

# Of different lengths and beginnings, so that each has an answer of its own; one is read in several chunks.
PROMPTS = (tuple(range(2, 30)), tuple(range(40, 43)), tuple(range(200, 60, -1)) * 2, tuple(range(90, 100)), (7,))
TOKENS = 24
LEVELS = ("open", "verified", "masked")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking_checkpoint(tmp_path_factory.mktemp("steps"))


@pytest.fixture
def running(checkpoint: Path, worker: StartWorker) -> Callable[..., Any]:
    @contextmanager
    def run(level: str, **settings: Any) -> Iterator[GenerationEngine]:
        model = open_model(str(checkpoint), level)
        if level != "local":
            settings["worker"] = worker(model.directory)
        with open_engine(
            model, EnclaveConfig(level=level, **settings), EngineConfig(kv_memory=1 << 22, reuse_prefixes="off")
        ) as engine:
            yield engine

    return run


def ask(engine: GenerationEngine, prompt: tuple[int, ...]) -> Answer:
    answer = Answer()
    asked = Generation(prompt_ids=prompt, max_tokens=TOKENS, sampling=Sampling(temperature=0), ignore_end=True)
    engine.submit(asked, answer.take)
    return answer


def answered(engine: GenerationEngine) -> list[list[int]]:
    """All prompts at once, some of them twice."""
    answers = [ask(engine, prompt) for prompt in (*PROMPTS, *PROMPTS[:3])]
    assert all(isinstance(answer.end, Finished) for answer in answers)
    return [answer.ids for answer in answers]


@pytest.fixture
def parts_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Into how many groups each step was cut."""
    run, seen = loaded.run_together, list[int]()

    def noted(work: Any) -> list[Any]:
        ((_, parts),) = work
        seen.append(len(parts))
        return run(work)

    monkeypatch.setattr(loaded, "run_together", noted)
    return seen


@pytest.mark.parametrize("level", LEVELS)
def test_groups_in_flight_together_change_no_token(
    level: str, running: Callable[..., Any], parts_of_steps: list[int]
) -> None:
    with running(level, micro_batches=1) as engine:
        expected = answered(engine)
    assert set(parts_of_steps) == {1}
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)  # else a swap could not be seen
    parts_of_steps.clear()
    with running(level, micro_batches=2) as engine:
        assert answered(engine) == expected
    assert parts_of_steps.count(2) >= TOKENS - 1


@pytest.mark.parametrize("level", LEVELS)
def test_a_step_is_one_round_trip_for_each_linear_or_chain_whoever_asks(
    level: str, running: Callable[..., Any], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    gate, run = threading.Event(), loaded.run_together

    def counted(work: Any) -> list[Any]:
        assert gate.wait(60)
        before = engine._workers.meter().round_trips
        (logits,) = found = run(work)
        assert isinstance(logits, list)
        sequences = sum(len(logits_RV) for logits_RV in logits)
        seen.append((sequences, engine._workers.meter().round_trips - before))
        return found

    monkeypatch.setattr(loaded, "run_together", counted)
    with running(level) as engine:
        for count in (1, 16):
            gate.clear()
            answers = [ask(engine, PROMPTS[0]) for _ in range(count)]
            gate.set()
            assert all(isinstance(answer.end, Finished) for answer in answers)
    assert {1, 16} <= {sequences for sequences, _ in seen}
    architecture = open_model(str(checkpoint), level).architecture
    # At `open` an embedding, the first qkv, and the others in chains.
    every = 2 + architecture.layers if level == "open" else len(linear_groups(architecture))
    assert {trips for _, trips in seen} == {every}
