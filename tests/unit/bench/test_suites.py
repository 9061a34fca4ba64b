"""What the suites compute from their samples: medians, floors, what is hidden, limits."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
import torch
from bench_reports import variant

from tsqp.bench.child import Order, Sample
from tsqp.bench.children import Child
from tsqp.bench.floors import ReadyOps, product_rows
from tsqp.bench.levels_suite import floor_of
from tsqp.bench.overlap_suite import _points
from tsqp.bench.overlap_suite import ratios as overlap_ratios
from tsqp.bench.plans import LEVEL_PLANS, PLANS
from tsqp.bench.prefill_suite import model_bytes, ratios
from tsqp.bench.summary import ratio, spread, typical
from tsqp.bench.transport_suite import SIZES, size_text
from tsqp.bench.transport_suite import ratios as transport_ratios
from tsqp.measurements import TransportPoint, TransportRow
from tsqp.model.architecture import linear_groups, norm_shapes, read_config, weight_shapes
from tsqp.model.llama import Llama


class Stub(Child):
    """A variant that has run already."""

    def __init__(self, samples: list[Sample]) -> None:
        self.plan = PLANS[3]
        self.samples = samples


def test_spread_lies_between_two_values_where_need_be() -> None:
    assert [spread([3.0, 1.0, 2.0], part) for part in (0.0, 0.25, 0.5, 1.0)] == [1.0, 1.5, 2.0, 3.0]
    assert spread([7.0], 0.9) == 7.0


def test_the_typical_run_is_the_one_nearest_the_median() -> None:
    samples = [Sample(total_s=total) for total in (1.0, 9.0, 2.0, 3.0)]
    assert typical(samples).total_s in (2.0, 3.0)


@pytest.mark.parametrize(("value", "ok"), [(1.0, True), (1.01, False)])
def test_a_limit_is_kept_or_missed(value: float, ok: bool) -> None:  # noqa: FBT001
    assert ratio("a", value, at_most=1.0).ok is ok
    assert ratio("a", -value, at_least=-1.0).ok is ok
    assert ratio("a", value).ok is None


def test_overlap_hides_parts_but_no_waiting_is_negative() -> None:
    sample = Sample(total_s=1.0, waited_s=0.4, worker_s=0.7)
    assert sample.enclave_s == pytest.approx(0.6)
    assert sample.wire_s == 0.0


def test_the_floor_of_a_level() -> None:
    child = Stub([Sample(total_s=1.0, bytes_moved=10**9, round_trips=100)])
    alone = Sample(total_s=0.5, waited_s=0.2, worker_s=0.2, quantise_s=0.1, check_s=0.05)
    floor = floor_of(child, alone, 1e10, 1e-4)
    assert floor is not None
    assert floor.wire_s == pytest.approx(0.11)
    assert floor.enclave_s == pytest.approx(0.3)
    assert floor.rest_s == pytest.approx(0.15)
    assert floor.overlapped_s == pytest.approx(0.3)
    assert floor.serial_s == pytest.approx(0.61)


def test_what_is_hidden_of_a_delay() -> None:
    places = [(0.0, 1), (0.0, 2), (1.0, 1), (1.0, 2), (2.0, 1), (2.0, 2)]
    seconds = (1.0, 0.9, 2.0, 1.2, 3.0, 2.5)
    points = _points(places, [Stub([Sample(total_s=each)]) for each in seconds])
    assert [point.hidden for point in points] == [None, None, None, pytest.approx(0.8), None, pytest.approx(0.25)]
    assert points[3].times_undelayed == pytest.approx(1.2)
    verdicts = {each.name: each.ok for each in overlap_ratios(points)}
    assert verdicts["1 ms each way, 2 micro-batches: part of the link's cost that is hidden"] is True
    assert verdicts["2 ms each way, 2 micro-batches: part of the link's cost that is hidden"] is None


OPEN = {"open over shm / monolithic": "at most 1"}


@pytest.mark.parametrize(
    ("tokens", "dtype", "limits"),
    [
        (
            128,
            "float32",
            {
                **OPEN,
                "open over ipc / monolithic": "at most 1.1",
                "masked, pool filled / monolithic": "at most 1.8",
                "masked: protection / total, all of it": "at most 0.1",
                "legacy client with Matmul over tcp / open over shm": "at least 4",
                "bytes per token: open / legacy": "at most 0.73",
                "bytes per token: open / legacy with Matmul": "at most 0.53",
                "memory of the enclave at open / float32 model": "at most 0.35",
            },
        ),
        (1024, "float32", OPEN),
        (1023, "float32", {}),
        (128, "bfloat16", {}),
        (1024, "bfloat16", {}),
    ],
)
def test_limits_are_those_of_what_was_promised(tokens: int, dtype: str, limits: dict[str, str]) -> None:
    found = ratios([variant(plan.name) for plan in PLANS], 10**9, tokens, dtype)
    assert {each.name: each.limit for each in found if each.limit} == limits


def test_protection_is_judged_whole_and_reported_without_what_waiting_hides() -> None:
    hidden = {"masked": msgspec.structs.replace(variant("masked"), protection_s=0.03, ahead_s=0.012)}
    found = ratios([hidden.get(plan.name) or variant(plan.name) for plan in PLANS], 10**9, 128, "float32")
    shares = {each.name: each for each in found if "protection" in each.name}
    assert {name: share.value for name, share in shares.items()} == {
        "masked: protection / total, all of it": pytest.approx(0.15),
        "masked: protection / total, on the critical path": pytest.approx(0.09),
    }
    assert [share.ok for share in shares.values()] == [False, None]


def test_transports_are_compared_with_tcp() -> None:
    def row(name: str, seconds: float) -> TransportRow:
        points = [TransportPoint(bytes=size, median_s=seconds, p10_s=seconds, p90_s=seconds) for size in SIZES]
        return TransportRow(name=name, settings="", points=points)

    found = transport_ratios(
        [
            row("tcp", 1.0),
            row("tcp, encrypted", 5.0),
            row("tcp, filled and summed", 2.0),
            row("shm, copied", 0.2),
            row("shm, in place", 0.4),
            row("shm, filled and summed", 0.5),
        ]
    )
    judged = {each.name: (each.ok, each.value) for each in found if each.limit}
    assert judged == {
        "4 KB: shm, copied / tcp": (True, 0.2),
        "8 MB: shm, filled and summed / tcp, filled and summed": (True, 0.25),
        "1 MB: throughput, tcp, encrypted / tcp": (False, 0.2),
    }
    assert len(found) == 4 * len(SIZES) + 1
    assert [size_text(size) for size in SIZES] == ["4 KB", "1 MB", "1.5 MB", "8 MB"]


@pytest.mark.parametrize("chains", [False, True])
def test_ready_made_products_have_the_shapes_of_a_prefill(tiny_llama: Path, *, chains: bool) -> None:
    config = read_config(tiny_llama)
    ops = ReadyOps(config, {name: torch.ones(shape) for name, shape in norm_shapes(config).items()}, chains=chains)
    ops.refill(2, 5)
    logits_BV = Llama(config, ops).prefill(torch.zeros(2, 5, dtype=torch.int64))
    assert logits_BV.shape == (2, config.vocab_size)
    assert not ops._left
    rows = product_rows(config, 2, 5)
    assert list(rows) == [group.name for group in linear_groups(config)]
    assert set(rows.values()) == {2, 10}


def test_each_level_with_a_worker_has_a_floor() -> None:
    assert {plan.level for plan in LEVEL_PLANS if plan.floor} == {"open", "verified", "masked"}
    assert Order(level="open", model="m", ids=[1], dtype="float32", threads=1, worker="w").floor is False


def test_the_model_counts_tied_weights_once(tiny_llama: Path) -> None:
    config = read_config(tiny_llama)
    elements = model_bytes(config) // 4
    assert elements == sum(math.prod(shape) for shape in weight_shapes(config).values())
