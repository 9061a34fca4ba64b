"""Measuring steps, and how predictions are judged by what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from typer.testing import CliRunner

from tsqp.cli import app
from tsqp.plan import check
from tsqp.plan.check import CHECKED, FITTED, Measured, compared, constants_of, measured, predicted
from tsqp.plan.constants import Constants, LinkConstants, load_constants
from tsqp.plan.measure import Place, Point, Sample, steps_of
from tsqp.plan.models import model_shape
from tsqp.plan.reports import PlanCheckReport
from tsqp.plan.work import work
from tsqp.reports import schema

LEVELS = ("open", "verified", "masked")
TINY = Place(name="tiny", sizes=(64, 128, 2, (4, 2), 256), prompts=(4, 130), batches=((1, 3), (5, 20)))
ROOT = Path(__file__).parents[3]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_steps_are_measured_with_what_they_compute() -> None:
    found = measured([TINY], ("open", "masked"), 1, lambda _name, _done: None)
    asked = (("prefill", 4), ("prefill", 130), ("decode", 1), ("decode", 5))
    assert [(point.level, point.kind, point.size) for point in found.works] == [
        (level, kind, size) for level in ("open", "masked") for kind, size in asked
    ]
    for point, (sample,) in found.samples.items():
        assert 0 < sample.worker_s < sample.total_s
        # A prompt's first 128 tokens need nothing of the last layer after its attention.
        whole, begun = (4, 3) if point.level == "open" else (9, 5)
        expected = [begun, whole] if point.size == 130 else [whole]
        assert [len(each.products) for each in found.works[point]] == expected
    fitted = constants_of(found, [TINY], "tsqp plan --measure", "0123456")
    assert set(fitted.levels) == {"open", "masked"}
    assert 0 < fitted.link.trip_core_s <= fitted.link.trip_s
    assert 0 < fitted.mask_word_s < 1e-6


def made(off: float = 1.0) -> Measured:
    """What would be measured if the constants were right, and some points took ``off`` times as long."""
    own, found = load_constants(None), Measured()
    for place in (*FITTED, *CHECKED):
        for level in LEVELS:
            for number, size in enumerate(place.prompts):
                point = Point(model=place.name, level=level, kind="prefill", size=size)
                found.works[point] = [
                    work(model_shape("smollm2")[1].architecture, level, "float32", step) for step in steps_of(point)
                ]
                enclave_s, worker_s = predicted(found.works[point], own, level)
                times = off if place in CHECKED and not number else 1.0
                sample = Sample(total_s=times * (enclave_s + worker_s), worker_s=times * worker_s)
                found.samples[point] = [sample, sample]
    return found


def test_predictions_are_judged_by_points_that_gave_no_constants() -> None:
    own = load_constants(None)
    report = compared(made(), CHECKED, own, 2)
    assert report.ok
    assert {point.model for point in report.points} == {place.name for place in CHECKED}
    assert {point.model for point in report.fitted} == {place.name for place in FITTED}
    assert not {place.name for place in CHECKED} & {place.name for place in FITTED}
    assert max(abs(point.error) for point in report.points) < 1e-9
    assert compared(made(1.3), CHECKED, own, 2).ok  # 1 / 1.3 is 23 % less
    for off, error in ((1.4, 1 / 1.4 - 1), (0.7, 1 / 0.7 - 1)):
        report = compared(made(off), CHECKED, own, 2)
        assert not report.ok
        assert max((point.error for point in report.points), key=abs) == pytest.approx(error)


def test_what_is_checked_is_none_of_what_is_fitted() -> None:
    """Neither models nor sizes of a step are the same."""
    fitted = {(place.sizes, size) for place in FITTED for size in (*place.prompts, *place.batches)}
    checked = {(place.sizes, size) for place in CHECKED for size in (*place.prompts, *place.batches)}
    assert not fitted & checked
    assert len({place.sizes for place in CHECKED}) == len(CHECKED) == 3
    assert all(len(place.prompts) == len(place.batches) == 3 for place in CHECKED)


def run(monkeypatch: pytest.MonkeyPatch, off: float, *words: str) -> Any:
    link = LinkConstants(trip_s=1e-4, trip_core_s=1e-5, byte_s=1e-9, byte_core_s=1e-9)
    monkeypatch.setattr(check, "measured", lambda *_: made(off))
    monkeypatch.setattr(check, "link_constants", lambda: link)
    return CliRunner().invoke(app, ["plan", *words])


@pytest.mark.usefixtures("one_thread")
def test_the_command_ends_with_1_where_a_prediction_is_too_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(monkeypatch, 1.0, "--check", "--json")
    assert done.exit_code == 0
    assert set(json.loads(done.stdout)) == set(schema()["$defs"]["PlanCheckReport"]["required"])
    done = run(monkeypatch, 2.0, "--check")
    assert done.exit_code == 1
    assert "18 of 27 within 25%" in done.stdout


@pytest.mark.usefixtures("one_thread")
def test_constants_that_were_measured_are_kept_and_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "constants.json"
    done = run(monkeypatch, 1.0, "--measure", "--constants", str(path), "--tokens-per-s", "1", "--json")
    assert done.exit_code == 0, done.output
    kept: Constants = load_constants(path)
    assert kept.link.trip_s == 1e-4
    again = CliRunner().invoke(app, ["plan", "--constants", str(path), "--tokens-per-s", "1", "--json"])
    assert json.loads(again.stdout) == json.loads(done.stdout)
    path.unlink()
    assert run(monkeypatch, 2.0, "--check", "--constants", str(path)).exit_code == 1
    assert load_constants(path).levels.keys() == kept.levels.keys()


def newest() -> PlanCheckReport:
    path = max((ROOT / "benchmarks" / "results").glob("plan-*.json"))
    return msgspec.json.decode(path.read_bytes(), type=PlanCheckReport)


def test_the_constants_that_come_with_it_are_those_of_the_newest_check() -> None:
    """But for the link's, which are of another clock and were taken again on their own (docs/planning.md)."""
    own = load_constants(None)
    assert msgspec.structs.replace(newest().constants, link=own.link) == own
