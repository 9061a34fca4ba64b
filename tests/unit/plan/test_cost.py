"""What a step costs: the formula of docs/planning.md, with constants that make it easy to compute."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from tsqp.errors import ConfigError
from tsqp.model.architecture import linear_groups
from tsqp.plan.calls import calls, traffic
from tsqp.plan.constants import ENCLAVE_UNITS, Constants, LinkConstants, load_constants
from tsqp.plan.cost import PARTS, Setup, dealer_s, gpu_s, own_mask_s, step_cost
from tsqp.plan.machines import load_machines
from tsqp.plan.models import model_shape
from tsqp.plan.work import Product, Step, prefill_steps, work

MACHINES = load_machines(None)
ARCHITECTURE = model_shape("smollm2")[1].architecture
NO_LINK = LinkConstants(trip_s=0, trip_core_s=0, byte_s=0, byte_core_s=0)
STEP = Step(8, 8, 8, 100)


def constants(link: LinkConstants = NO_LINK, **enclave: float) -> Constants:
    own = load_constants(None)
    worker = own.of("masked").worker
    level = structs.replace(own.of("masked"), enclave={**dict.fromkeys(ENCLAVE_UNITS, 0.0), **enclave}, worker=worker)
    return structs.replace(own, levels=dict.fromkeys(("open", "verified", "masked"), level), link=link, engine_step_s=0)


def setup(level: str = "masked", **changes: Any) -> Setup:
    given: dict[str, Any] = {"constants": constants(), "dealers": 1, "latency_s": 0.0, "link_bytes_s": 1e18, "gpus": 1}
    return Setup(
        architecture=ARCHITECTURE,
        level=level,
        dtype="float32",
        gpu=structs.replace(MACHINES.gpus["h100"], **changes.pop("gpu", {})),
        assumed=structs.replace(MACHINES.assumed, **{"request_us": 0.0, **changes.pop("assumed", {})}),
        **{**given, **changes},
    )


# So fast that it counts as nothing.
INFINITE = dict.fromkeys(("memory_gb_per_s", "int8_tops", "single_tflops", "pcie_gb_per_s"), 1e9)


def test_where_only_the_enclave_takes_time_a_step_is_what_it_computes() -> None:
    found = step_cost(setup(constants=constants(call=1e-3), gpu=INFINITE), STEP)
    assert found.round_trips == PARTS * 121
    assert found.time_s == pytest.approx(PARTS * 121 * 1e-3)
    assert found.thread_s == pytest.approx(found.time_s)


def test_where_only_the_network_takes_time_parts_wait_together() -> None:
    found = step_cost(setup(latency_s=1e-3, gpu=INFINITE), STEP)
    assert found.time_s == pytest.approx(121 * 1e-3, rel=1e-3)
    assert found.thread_s == 0


def test_where_only_the_worker_takes_time_its_parts_add_up() -> None:
    found = step_cost(setup(assumed={"request_us": 500.0}, gpu=INFINITE), STEP)
    assert found.time_s == pytest.approx(PARTS * 121 * 500e-6, rel=1e-3)
    assert found.worker_s == pytest.approx(found.time_s)


def test_the_enclave_hides_behind_a_slower_network_but_for_one_part() -> None:
    found = step_cost(setup(constants=constants(call=1e-3), latency_s=5e-3, gpu=INFINITE), STEP)
    assert found.time_s == pytest.approx(121 * 6e-3, rel=1e-3)


def test_bytes_take_time_on_the_link_and_of_the_thread_that_encrypts_them() -> None:
    slow = step_cost(setup(link_bytes_s=1e6, gpu=INFINITE), STEP)
    moved = slow.sent + slow.received
    planned = calls(ARCHITECTURE, "masked", "float32")
    assert moved == sum(PARTS * each for each in (traffic(planned, 4, 4).sent, traffic(planned, 4, 4).received))
    # There and back one part after the other; what is sent of the second overlaps with what the first receives.
    assert slow.time_s == pytest.approx(moved / PARTS / 1e6, rel=0.02)
    link = LinkConstants(trip_s=0, trip_core_s=0, byte_s=0, byte_core_s=1e-6)
    coded = step_cost(setup(constants=constants(link), gpu=INFINITE), STEP)
    assert coded.worker_link_core_s == pytest.approx(moved * 1e-6)
    assert coded.time_s == pytest.approx(moved * 1e-6, rel=0.02)
    assert coded.link_core_s - coded.worker_link_core_s == pytest.approx(coded.masks_received * 1e-6)


def test_a_gpu_is_bound_by_arithmetic_memory_or_pcie() -> None:
    assumed = MACHINES.assumed
    product = Product(words=0, bytes=8e6, weight_bytes=6e6, macs=5e9)
    for gpu, expected in (
        ({**INFINITE, "int8_tops": 100.0}, 8 * 5e9 / (100e12 * assumed.products)),
        ({**INFINITE, "memory_gb_per_s": 100.0}, 6e6 / (100e9 * assumed.memory)),
        ({**INFINITE, "pcie_gb_per_s": 10.0}, 8e6 / (10e9 * assumed.pcie)),
    ):
        assert gpu_s(setup(gpu=gpu), product)[0] == pytest.approx(expected, rel=1e-3)
        assert gpu_s(setup(gpu=gpu, gpus=4), product)[0] == pytest.approx(
            expected / (1 if gpu["pcie_gb_per_s"] < 1e9 else 4), rel=1e-3
        )
    floats = gpu_s(setup("open", gpu={**INFINITE, "single_tflops": 100.0}), product)[0]
    assert floats == pytest.approx(2 * 5e9 / (100e12 * assumed.products), rel=1e-3)


def test_masks_are_paid_by_who_makes_them() -> None:
    words = sum(group.in_features for group in linear_groups(ARCHITECTURE))
    made = constants()
    dealt = setup(gpu=INFINITE)
    assert dealer_s(dealt) == pytest.approx(words * made.mask_word_s)
    assert own_mask_s(dealt) == 0
    own = setup(dealers=0)
    assert own_mask_s(own) > words * made.mask_word_s
    assert step_cost(own, STEP).mask_core_s == pytest.approx(8 * own_mask_s(own))
    assert step_cost(own, STEP).masks_received == 0
    assert own_mask_s(setup("verified", dealers=0)) == 0


def test_rows_of_a_prompt_read_what_is_before_them() -> None:
    whole, chunk, rest = prefill_steps(300)
    assert [step.rows for step in (whole, chunk, rest)] == [128, 128, 44]
    assert [step.kept for step in (whole, chunk, rest)] == [0, 0, 1]
    assert whole.context == sum(range(1, 129)) / 128
    assert rest.context == sum(range(257, 301)) / 44
    counted = work(ARCHITECTURE, "masked", "float32", whole)
    assert len(counted.products) == 117  # nothing of the last layer after attention
    assert sum(product.weight_bytes for product in work(ARCHITECTURE, "masked", "float32", rest).products) == sum(
        group.rows * group.in_features for group in linear_groups(ARCHITECTURE)
    )


def test_a_level_without_constants_is_refused() -> None:
    own = load_constants(None)
    only = structs.replace(own, levels={"open": own.levels["open"]})
    with pytest.raises(ConfigError, match="have none for the level masked"):
        step_cost(replace(setup(), constants=only), STEP)


def test_more_rows_never_take_less() -> None:
    own = setup(constants=load_constants(None), link_bytes_s=1e9, latency_s=1e-4)
    costs = [step_cost(own, Step(rows, rows, rows, 500)) for rows in (1, 2, 3, 5, 8, 40, 250)]
    for name in ("time_s", "thread_s", "link_core_s", "worker_s", "sent", "received", "masks_received"):
        values = [getattr(cost, name) for cost in costs[1:]]
        assert values == sorted(values)
        assert all(math.isfinite(value) for value in values)
