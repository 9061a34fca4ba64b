"""Each fault once, into real processes under load: the soak that ``make soak`` does for ten minutes, in small."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from faults.load import Answer, Asked, Tally
from faults.masked_words import NEAR, WORDS, MaskedWords, Sent
from faults.programs import failed_clearly
from faults.report import Report, table
from faults.run import FAULTS, Plan, soak

ROOT = Path(__file__).parents[2]
KINDS = {kind.kind for lane in FAULTS.values() for kind in lane} | {"disk full while packing"}
# The machine may have anything else to do: nothing fails here for being slow.
PATIENCE_S = 120.0


@pytest.mark.timeout(900)
def test_every_fault_is_noticed_and_nothing_wrong_is_delivered_or_left() -> None:
    plan = Plan(seconds=0, times=None, clients=4, seed=11, slack_s=PATIENCE_S, prefill_pause_s=5.0)
    report = soak(plan, print)
    assert report.problems == []
    assert {each.kind for each in report.kinds} == KINDS
    assert all(each.injected == 1 for each in report.kinds)
    assert all(each.noticed for each in report.kinds)
    assert (report.masked.reused, report.left) == (0, [])
    assert report.masked.rows > 100
    assert all(each.right > 0 and each.wrong == each.lost == 0 for each in report.clients)
    assert f"Seed {report.seed}" in table(report)


def test_the_table_in_the_docs_is_that_of_the_kept_result() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- soak:faults -->\n(.*?)\n<!-- /soak -->", page, re.DOTALL)
    assert shown
    name = re.search(r"benchmarks/results/(soak-faults-[\d-]+\.json)", page)
    assert name
    result = (ROOT / "benchmarks" / "results" / name[1]).read_bytes()
    assert table(msgspec.json.decode(result, type=Report)) in shown[1]


# The judge itself -----------------------------------------------------------------------------------------------------

ASKED = Asked("abc", 4)


@pytest.mark.parametrize(
    ("answer", "may_be_cut", "outcome"),
    [
        (Answer("right"), False, "right"),
        (Answer("wrong"), False, "wrong"),
        (Answer("righ"), False, "wrong"),
        (Answer("", error=("worker_unavailable", "it is gone.")), False, "error"),
        (Answer("ri", error=("worker_unavailable", "it is gone.")), False, "error"),
        (Answer("ro", error=("worker_unavailable", "it is gone.")), False, "wrong"),
        (Answer("ri", error=("", "")), False, "lost"),
        (Answer("ri", cut=True), True, "cut"),
        (Answer("ro", cut=True), True, "wrong"),
        (Answer("ri", cut=True), False, "lost"),
        (Answer("ri", silent=True), True, "lost"),
    ],
)
def test_what_an_answer_counts_as(answer: Answer, may_be_cut: bool, outcome: str) -> None:  # noqa: FBT001
    tally = Tally()
    assert tally.add(ASKED, answer, "right", may_be_cut=may_be_cut) == outcome
    assert bool(tally.problems) == (outcome in ("wrong", "lost"))


def test_a_mask_that_hides_two_inputs_is_found() -> None:
    chance = np.random.default_rng(0)
    masks = chance.integers(0, 1 << 32, (3000, 48), dtype=np.uint32)
    inputs = chance.integers(-NEAR // 2, NEAR // 2, (2, 48)).astype(np.uint32)
    words = MaskedWords()
    words.add("layers.0.qkv", masks.tobytes(), 48)
    words.add("layers.0.qkv", masks.tobytes(), 48)  # the same bytes tell nothing new
    words.add("layers.0.o", (masks[:1] + inputs[:1]).tobytes(), 48)  # masks of another group are others
    assert words.look() == Sent(rows=3001, resent=1, reused=0)
    words.add("layers.0.qkv", (masks[5:7] + inputs).tobytes(), 48)
    assert words.look() == Sent(rows=3003, resent=1, reused=2)
    narrow = MaskedWords()
    narrow.add("head", masks[:9, :WORDS].tobytes(), WORDS)
    assert narrow.look().reused == 0


@pytest.mark.parametrize(
    ("code", "said", "notes", "clear"),
    [
        (3, {"error": {"exit_code": 3, "message": "no room."}}, "error: no room.", True),
        (1, {"error": {"exit_code": 1, "message": "no room."}}, "", False),
        (3, {}, "", False),
        (3, {"error": {"exit_code": 3, "message": ""}}, "", False),
        (3, {"error": {"exit_code": 3, "message": "no room."}}, "Traceback (most recent call last):", False),
    ],
)
def test_what_a_clear_failure_is(code: int, said: dict[str, object], notes: str, clear: bool) -> None:  # noqa: FBT001
    assert failed_clearly(code, said, notes, (3, 4)) == clear
