"""Hundreds of requests by sixteen clients at once, some of which leave or ask wrongly, at a server over a tiny model.

``benchmarks/soak_serving.py`` does the same with the bundled model.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bad_requests import bad_requests
from real_serving import speaking_checkpoint
from soak.answers import Answer, Tolerance, judged
from soak.asked import Asked
from soak.holdings import Holdings
from soak.report import leaks
from soak.run import Load, Words, soak

from tsqp.levels import open_model

TEXT = Path(__file__).parents[2] / "benchmarks" / "texts" / "alice.txt"
# About 15 of the longest requests: some wait, and prefixes are given up.
CACHE_TOKENS = 8000
NO_NATIVE = {"TSQP_NATIVE": "off"}
# As with a worker on another machine: two groups of a step are in flight together.
TWO_GROUPS = {"TSQP_MICRO_BATCHES": "2"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking_checkpoint(tmp_path_factory.mktemp("soaked"))


@pytest.mark.parametrize(
    ("level", "requests", "environment"),
    [("masked", 252, {}), ("masked", 126, TWO_GROUPS), ("verified", 126, NO_NATIVE), ("open", 252, {})],
    ids=["masked", "masked, two groups", "verified, without native kernels", "open"],
)
def test_answers_are_those_of_requests_alone_and_nothing_is_left_behind(
    level: str, requests: int, environment: dict[str, str], checkpoint: Path
) -> None:
    tokenizer = open_model(str(checkpoint), "local").tokenizer
    assert tokenizer is not None
    words = Words(TEXT.read_text(encoding="utf-8")[:2000], tokenizer.encode, tokenizer.decode)
    load = Load(requests=requests, cache_tokens=CACHE_TOKENS, environment=environment)
    report = soak(str(checkpoint), level, words, load)
    assert report.problems == []
    assert (report.completed, report.left, report.refused) == (requests * 4 // 6, requests // 6, requests // 6)
    assert report.kinds_refused == min(len(bad_requests("", 1, 1, keys=True)), report.refused)
    assert report.choices > report.completed > report.streamed > report.completed // 4
    assert not [each for each in report.diverged if not each.drawn and each.gap > report.gap_allowed]
    # Else nothing of this means much.
    assert report.most_sequences >= 12
    assert report.rows_per_step > 8
    assert report.after.stats["completion_tokens"] > report.completion_tokens > 10 * report.completed
    assert (report.after.stats["reused_tokens"] > 0) == (level != "masked")
    assert (report.after.masks is not None) == (level == "masked")
    sys.stdout.write(f"{level}: {len(report.diverged)} of {report.choices} answers diverged\n")


# The judge itself -----------------------------------------------------------------------------------------------------

LIKELIEST = Asked(chat=False, body={"temperature": 0})
DRAWN = Asked(chat=False, body={"temperature": 1})
ALONE = Answer("abc", "length", ["a", "b", "c"], [None, -1.0, -2.0], [9.0, 0.5, 0.001])
CLOSE = Tolerance(0.001)


@pytest.mark.parametrize(
    ("asked", "changes", "tolerance", "problem"),
    [
        (LIKELIEST, {}, Tolerance(), ""),
        (LIKELIEST, {"tokens": [], "logprobs": []}, Tolerance(), ""),
        (LIKELIEST, {"text": "abd"}, Tolerance(), "text differs"),
        (LIKELIEST, {"finish": "stop"}, Tolerance(), "finish differs"),
        (LIKELIEST, {"logprobs": [None, -1.0, -2.0000001]}, Tolerance(), "log-probabilities differ"),
        (DRAWN, {"tokens": ["a", "b", "d"]}, Tolerance(), "tokens or"),
        (LIKELIEST, {}, CLOSE, ""),
        (LIKELIEST, {"logprobs": [None, -1.0, -2.001]}, CLOSE, ""),
        (LIKELIEST, {"logprobs": [None, -1.0, -2.003]}, CLOSE, "off by 3"),
        (LIKELIEST, {"text": "abd"}, CLOSE, "another text"),
        (LIKELIEST, {"tokens": [], "logprobs": []}, CLOSE, "without log-probabilities"),
        (LIKELIEST, {"text": "abd", "tokens": ["a", "b", "d"]}, CLOSE, ""),
        (LIKELIEST, {"text": "adc", "tokens": ["a", "d", "c"]}, CLOSE, "token 1 differs"),
        (DRAWN, {"text": "adc", "tokens": ["a", "d", "c"]}, CLOSE, ""),
        (LIKELIEST, {"text": "a", "tokens": ["a"], "logprobs": [None]}, CLOSE, "token 1 differs"),
    ],
)
def test_what_an_answer_may_differ_in(
    asked: Asked, changes: dict[str, Any], tolerance: Tolerance, problem: str
) -> None:
    found = replace(ALONE, **changes)
    verdict = judged(asked, ALONE, found, tolerance)
    assert problem in verdict.problem
    assert bool(problem) == bool(verdict.problem)
    assert (verdict.position is not None) == (bool(tolerance.logit and found.tokens) and found.tokens != ALONE.tokens)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, None),
        ({"memory_bytes": 1100}, None),
        ({"memory_bytes": 1101}, "memory_bytes grew"),
        ({"worker_bytes": 2000}, "worker_bytes grew"),
        ({"threads": 4}, "threads grew"),
        ({"files": 9}, "files grew"),
        ({"objects": {"Choice": 1}}, "Choice"),
        ({"cached_blocks": 1}, "blocks are free"),
        ({"stats": {"running": 1, "queued": 0, "blocks_free": 8, "blocks_total": 10}}, "1 run"),
        ({"masks": {"again": 1}}, "a second time"),
        ({"masks": {"used": 49}}, "50 mask rows were handed out and 49 used"),
        ({"masks": {"drawn": 61}}, "61 mask rows were drawn"),
        ({"rows": 24}, "24 rows were computed"),
    ],
)
def test_what_a_server_must_not_hold(changes: dict[str, Any], word: str | None) -> None:
    masks = {"drawn": 60, "taken": 50, "used": 50, "held": 10, "again": 0, "of_layers": 25}
    held = {
        "stats": {"running": 0, "queued": 0, "blocks_free": 8, "blocks_total": 10},
        "cached_blocks": 2,
        "masks": masks,
        "rows": 25,
        "steps": 5,
        "most_sequences": 5,
        "largest_logit": 3.0,
        "memory_bytes": 1000,
        "worker_bytes": 1000,
        "threads": 3,
        "files": 8,
        "objects": {},
    }
    after = {**held, **changes, "masks": {**masks, **changes.get("masks", {})}}
    slack = {"memory_bytes": 100, "worker_bytes": 100}
    found = leaks(msgspec.convert(held, Holdings), msgspec.convert(after, Holdings), slack)
    assert len(found) == (word is not None)
    assert word is None or word in found[0]
