"""Finds constants: how many seconds each unit of work takes, so that sums over units come closest to what was measured.

Errors count as parts of what was measured, so that short steps weigh as much as long ones. No constant is negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from tsqp.errors import InternalError
from tsqp.plan.constants import ENCLAVE_UNITS, WORKER_UNITS, LevelConstants, WorkerConstants
from tsqp.plan.work import Product, StepWork, of_product, together

_TURNS = 8


def nonnegative(
    rows: Sequence[Mapping[str, float]], seconds: Sequence[float], units: Sequence[str]
) -> dict[str, float]:
    """Return seconds per unit.

    All subsets of the units are tried, as there are few, and of the solutions without negative ones the best is taken:
    it is the least-squares solution under that condition.

    Args:
        rows: for each measurement, how much of each unit it has.
        seconds: what it took; all above 0.
        units: those to find a constant for, at most 8.

    Raises:
        InternalError: nothing was measured, or nothing took any time.
    """
    taken = np.array(seconds)
    if not len(taken) or taken.min() <= 0:
        raise InternalError(f"constants cannot be found from {len(taken)} measurements, the shortest of no time.")
    counted = np.array([[row[unit] for unit in units] for row in rows]) / taken[:, None]
    scale = np.maximum(counted.max(axis=0), 1e-300)
    best, found = float("inf"), np.zeros(len(units))
    for size in range(1, len(units) + 1):
        for chosen in combinations(range(len(units)), size):
            columns = list(chosen)
            solution, *_ = np.linalg.lstsq(counted[:, columns] / scale[columns], np.ones(len(taken)), rcond=None)
            if solution.min() < 0:
                continue
            error = float(np.square(counted[:, columns] / scale[columns] @ solution - 1).sum())
            if error < best:
                best, found = error, np.zeros(len(units))
                found[columns] = solution / scale[columns]
    return {unit: float(value) for unit, value in zip(units, found, strict=True)}


def level_constants(
    works: Sequence[Sequence[StepWork]], enclave_s: Sequence[float], worker_s: Sequence[float]
) -> LevelConstants:
    """Return a level's constants.

    Args:
        works: the steps of each measurement.
        enclave_s: what each took of the enclave's core.
        worker_s: and of the worker's.
    """
    enclave = nonnegative([together(steps) for steps in works], enclave_s, ENCLAVE_UNITS)
    products = [[product for step in steps for product in step.products] for steps in works]
    found = [_worker(products, worker_s, overlaps=overlaps) for overlaps in (False, True)]
    best = min(found, key=lambda each: _error(each, products, worker_s))
    return LevelConstants(enclave=enclave, worker=best)


def _worker(products: Sequence[Sequence[Product]], seconds: Sequence[float], *, overlaps: bool) -> WorkerConstants:
    """Fit reading weights and multiplying as a sum, or as the larger of the two.

    For the latter it is found in turns which of them bounds each product, and what the constants are then.
    """
    counted = [_summed([of_product(product) for product in each]) for each in products]
    constants = WorkerConstants(seconds=nonnegative(counted, seconds, WORKER_UNITS), overlaps=overlaps)
    for _ in range(_TURNS if overlaps else 0):
        bound = [_summed([constants.bound(of_product(product)) for product in each]) for each in products]
        constants = WorkerConstants(seconds=nonnegative(bound, seconds, WORKER_UNITS), overlaps=True)
    return constants


def _error(constants: WorkerConstants, products: Sequence[Sequence[Product]], seconds: Sequence[float]) -> float:
    found = [sum(constants.time_s(of_product(product)) for product in each) for each in products]
    return sum((one / taken - 1) ** 2 for one, taken in zip(found, seconds, strict=True))


def _summed(counted: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {unit: sum(each[unit] for each in counted) for unit in WORKER_UNITS}
