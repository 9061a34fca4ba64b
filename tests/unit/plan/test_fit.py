"""Constants are found again from times that they made, and never are negative."""

from __future__ import annotations

import random

import pytest

from tsqp.errors import InternalError
from tsqp.plan.constants import ENCLAVE_UNITS, WORKER_UNITS, WorkerConstants
from tsqp.plan.cost import priced
from tsqp.plan.fit import level_constants, nonnegative
from tsqp.plan.models import model_shape
from tsqp.plan.work import Step, of_product, prefill_steps, together, work

TRUE = {"a": 2e-3, "b": 5e-9, "c": 0.0}
# Read in 20 ps a byte, multiplied in 15 ps: 4 rows of float32 are bound by memory, 8 by arithmetic.
WORKER = {"call": 5e-5, "weight_byte": 2e-11, "mac": 1.5e-11, "word": 1e-9}


def rows(seed: int = 0) -> list[dict[str, float]]:
    drawn = random.Random(seed)
    return [{"a": drawn.randint(1, 9), "b": drawn.uniform(1e4, 1e7), "c": drawn.uniform(1, 9)} for _ in range(12)]


def test_constants_are_found_again() -> None:
    found = nonnegative(rows(), [priced(TRUE, row) for row in rows()], tuple(TRUE))
    assert found == pytest.approx(TRUE, rel=1e-6, abs=1e-9)


def test_none_is_negative_where_the_best_fit_would_have_one() -> None:
    counted = [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 3.0}]
    found = nonnegative(counted, [3.0, 2.0, 1.0], ("a", "b"))
    assert found["b"] == 0
    assert found["a"] > 0


def test_a_measurement_of_no_time_is_a_mistake() -> None:
    with pytest.raises(InternalError, match="the shortest of no time"):
        nonnegative([{"a": 1.0}], [0.0], ("a",))
    with pytest.raises(InternalError, match="from 0 measurements"):
        nonnegative([], [], ("a",))


@pytest.mark.parametrize("overlaps", [False, True])
def test_it_is_found_whether_reading_and_multiplying_overlap(*, overlaps: bool) -> None:
    worker = WorkerConstants(seconds=WORKER, overlaps=overlaps)
    enclave = dict.fromkeys(ENCLAVE_UNITS, 1e-9) | {"step": 1e-3, "call": 1e-4}
    shapes = [model_shape(name)[1].architecture for name in ("smollm2", "llama-3.2-1b", "llama-3.1-8b")]
    steps = [*prefill_steps(96), *(Step(count, count, count, 60.0 * count) for count in (1, 3, 8, 40))]
    works = [[work(shape, "open", "float32", step)] for shape in shapes for step in steps]
    worker_s = [sum(worker.time_s(of_product(product)) for product in each[0].products) for each in works]
    enclave_s = [priced(enclave, together(each)) for each in works]
    found = level_constants(works, enclave_s, worker_s)
    assert found.worker.overlaps == overlaps
    assert found.worker.seconds == pytest.approx(WORKER, rel=0.02)
    assert set(found.enclave) == set(ENCLAVE_UNITS)
    assert set(found.worker.seconds) == set(WORKER_UNITS)
    assert [priced(found.enclave, together(each)) for each in works] == pytest.approx(enclave_s, rel=1e-3)
