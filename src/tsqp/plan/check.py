"""Takes the constants on this machine, and checks what they predict against other points, all in turns in one run."""

from __future__ import annotations

import datetime as dt
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tsqp.bench import hardware
from tsqp.config import WORKER_LEVELS
from tsqp.plan.constants import Constants
from tsqp.plan.cost import priced
from tsqp.plan.fit import level_constants
from tsqp.plan.measure import Place, Point, Sample, Subject, keystream_word_s, link_constants, subjects
from tsqp.plan.reports import PlanCheckReport, PlanPoint
from tsqp.plan.work import StepWork, of_product, together

OnStep = Callable[[str, float], None]

LIMIT = 0.25
# Planning a step and telling its tokens: scheduling of ``tsqp bench decode``, 16 requests
# (benchmarks/results/decode-2026-11-29.json).
_ENGINE_STEP_S = 0.0006
# Constants come from these; none of their points is checked.
FITTED = (
    Place(
        name="random 2M",
        sizes=(128, 384, 4, (4, 2), 4096),
        prompts=(16, 64, 128),
        batches=((1, 15), (8, 15), (32, 15), (8, 500)),
    ),
    Place(
        name="random 31M",
        sizes=(512, 1536, 8, (8, 4), 8192),
        prompts=(16, 64, 192),
        batches=((1, 15), (8, 15), (32, 15), (8, 500)),
    ),
    Place(
        name="random 88M",
        sizes=(1536, 4096, 3, (12, 4), 8192),
        prompts=(24, 96),
        batches=((1, 15), (8, 15)),
    ),
    Place(name="smollm2", sizes=None, prompts=(16, 48), batches=((1, 15), (6, 15), (24, 15), (6, 500))),
)
CHECKED = (
    Place(
        name="random 7M, checked",
        sizes=(256, 768, 6, (4, 2), 8192),
        prompts=(32, 128, 256),
        batches=((2, 100), (4, 100), (16, 100)),
    ),
    Place(name="smollm2, checked", sizes=None, prompts=(32, 128, 256), batches=((2, 100), (4, 100), (16, 100))),
    Place(
        name="random 107M, checked",
        sizes=(1024, 2816, 8, (16, 4), 16384),
        prompts=(32, 128, 256),
        batches=((2, 100), (4, 100), (16, 100)),
    ),
)


@dataclass(slots=True)
class Measured:
    """Samples by point, with what each point is."""

    works: dict[Point, list[StepWork]] = field(default_factory=dict)
    samples: defaultdict[Point, list[Sample]] = field(default_factory=lambda: defaultdict(list))

    def median(self, point: Point, part: Callable[[Sample], float]) -> float:
        """Return the median of a part."""
        return statistics.median(map(part, self.samples[point]))


def measured(places: Sequence[Place], levels: Sequence[str], rounds: int, on_step: OnStep) -> Measured:
    """Measure every point of some places in turns.

    Args:
        places: models and sizes.
        levels: at which.
        rounds: how often each point has its turn.
        on_step: told the fraction done.
    """
    found = Measured()
    with subjects(places, levels, on_step) as measuring:
        for done in range(rounds):
            for at, subject in enumerate(measuring):
                on_step("measuring steps", (done + at / len(measuring)) / rounds)
                subject.settle()
                for point in subject.points():
                    _measure(subject, point, found)
    on_step("measuring steps", 1.0)
    return found


def _measure(subject: Subject, point: Point, found: Measured) -> None:
    found.works[point] = subject.work(point)
    found.samples[point].append(subject.run(point))


def constants_of(found: Measured, places: Sequence[Place], command: str, commit: str) -> Constants:
    """Return the constants that some places' points give; ``command`` and ``commit`` say what measured them."""
    names = {place.name for place in places}
    levels = {}
    for level in dict.fromkeys(point.level for point in found.works):
        points = [point for point in found.works if point.level == level and point.model in names]
        levels[level] = level_constants(
            [found.works[point] for point in points],
            [found.median(point, lambda sample: sample.enclave_s) for point in points],
            [found.median(point, lambda sample: sample.worker_s) for point in points],
        )
    return Constants(
        date=dt.datetime.now(dt.timezone.utc).date().isoformat(),
        commit=commit,
        command=command,
        hardware=hardware.describe(),
        levels=levels,
        link=link_constants(),
        mask_word_s=keystream_word_s(),
        engine_step_s=_ENGINE_STEP_S,
    )


def take_constants(rounds: int, command: str, on_step: OnStep) -> Constants:
    """Measure constants on this machine."""
    commit = hardware.commit()
    return constants_of(measured(FITTED, WORKER_LEVELS, rounds, on_step), FITTED, command, commit)


def check(rounds: int, command: str, on_step: OnStep, levels: Sequence[str] = WORKER_LEVELS) -> PlanCheckReport:
    """Measure constants and, in the same turns, the points that they are to predict."""
    commit = hardware.commit()
    found = measured((*FITTED, *CHECKED), levels, rounds, on_step)
    return compared(found, CHECKED, constants_of(found, FITTED, command, commit), rounds)


def compared(found: Measured, places: Sequence[Place], constants: Constants, rounds: int) -> PlanCheckReport:
    """Compare what constants predict with what was measured of some places; all others gave the constants."""
    names = {place.name for place in places}
    points = {point: _point(point, found, constants) for point in found.works}
    checked = [each for point, each in points.items() if point.model in names]
    return PlanCheckReport(
        date=constants.date,
        commit=constants.commit,
        command=constants.command,
        hardware=constants.hardware,
        rounds=rounds,
        limit=LIMIT,
        ok=all(abs(point.error) <= LIMIT for point in checked),
        points=checked,
        fitted=[each for point, each in points.items() if point.model not in names],
        constants=constants,
    )


def _point(point: Point, found: Measured, constants: Constants) -> PlanPoint:
    enclave_s, worker_s = predicted(found.works[point], constants, point.level)
    measured_s = found.median(point, lambda sample: sample.total_s)
    measured_enclave_s = found.median(point, lambda sample: sample.enclave_s)
    measured_worker_s = found.median(point, lambda sample: sample.worker_s)
    return PlanPoint(
        model=point.model,
        level=point.level,
        kind=point.kind,
        size=point.size,
        context=point.context,
        measured_s=measured_s,
        predicted_s=enclave_s + worker_s,
        error=(enclave_s + worker_s) / measured_s - 1,
        enclave_s=measured_enclave_s,
        enclave_error=enclave_s / measured_enclave_s - 1,
        worker_s=measured_worker_s,
        worker_error=worker_s / measured_worker_s - 1,
        all_s=[sample.total_s for sample in found.samples[point]],
    )


def predicted(works: Sequence[StepWork], constants: Constants, level: str) -> tuple[float, float]:
    """Return what steps take of the enclave's core and of a CPU worker's."""
    known = constants.of(level)
    counted: Mapping[str, float] = together(works)
    products = [of_product(product) for step in works for product in step.products]
    return priced(known.enclave, counted), sum(map(known.worker.time_s, products))
