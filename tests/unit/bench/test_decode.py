"""What ``tsqp bench decode`` takes of a run, how it times products, and what it computes from samples."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_reports import decoding, step_parts
from msgspec import structs
from torch import Tensor

from tsqp.bench import decode_watch
from tsqp.bench.decode_child import DecodeAsk, DecodeSample
from tsqp.bench.decode_page import parts
from tsqp.bench.decode_suite import Child, Sizes, _check_agreement, _parts, _point, ratios
from tsqp.bench.decode_watch import TimedOps, Watch
from tsqp.bench.plans import DECODE_PLANS
from tsqp.engine.api import EngineStats, Failed, Finished, Token
from tsqp.errors import InputError, InternalError, TransportClosedError
from tsqp.model.overlap import in_turns
from tsqp.reports import schema

TIMES = dict.fromkeys(("worker", "wire", "enclave", "attention", "sampling", "mask_wait", "mask_fill"), 0.0)


class Clock:
    """Counts seconds; whoever works moves it on."""

    def __init__(self) -> None:
        self.now_ns = 0

    def work(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    ours = SimpleNamespace(perf_counter_ns=lambda: clock.now_ns, perf_counter=lambda: clock.now_ns / 1e9)
    monkeypatch.setattr(decode_watch, "time", ours)
    return clock


class StubEngine:
    """Has moved ten bytes each way by each second."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def stats(self) -> EngineStats:
        names = set(EngineStats.__dataclass_fields__) - {"seconds", "ready", "reason"}
        counts: dict[str, Any] = dict.fromkeys(names, 0)
        counts |= dict.fromkeys(("bytes_sent", "bytes_received"), self._clock.now_ns // 10**8)
        return EngineStats(**counts, seconds=dict(TIMES), ready=True)


def run(clock: Clock, starts: list[int], tokens: int, *, told_s: float = 0.01) -> Watch:
    """Steps of a second, in which each request has a token from the step in which it starts until it has enough."""
    engine: Any = StubEngine(clock)
    watch = Watch(engine, len(starts), tokens, None)
    listeners = [watch.listener(number) for number in range(len(starts))]
    for step in range(max(starts) + tokens):
        clock.work(1)
        for number, start in enumerate(starts):
            if start <= step < start + tokens:
                clock.work(told_s)
                listeners[number](Token(100 + number + step, "x"))
                if step == start + tokens - 1:
                    listeners[number](Finished("length", "", 1, tokens))
    return watch


def test_one_request_is_measured_from_its_second_token_to_its_last(clock: Clock) -> None:
    first, last = run(clock, [2], 5).window()
    assert [first.at_s, last.at_s] == pytest.approx([4.02, 7.05])
    assert last.steps - first.steps == 3
    assert last.bytes_moved - first.bytes_moved == 60


def test_of_many_the_steps_that_all_of_them_share_are_measured(clock: Clock) -> None:
    """The last starts in step 3 and the first ends in step 9: 5 steps after step 4, with three tokens to tell each."""
    watch = run(clock, [0, 1, 3], 10)
    first, last = watch.window()
    assert last.steps - first.steps == 5
    assert last.at_s - first.at_s == pytest.approx(5 * (1 + 3 * 0.01))
    assert watch.first_token == 100


@pytest.mark.parametrize("start", [3, 4, 5, 9])
def test_requests_without_a_step_together_are_no_measurement(clock: Clock, start: int) -> None:
    """With 5 tokens the first ends in step 4: one that starts in 3 has its second token then, and others have later."""
    with pytest.raises(InternalError, match="the first ended before the last had well begun: more than 5 tokens"):
        run(clock, [0, start], 5).window()


def test_one_step_together_is_enough(clock: Clock) -> None:
    first, last = run(clock, [0, 2], 5).window()
    assert last.steps - first.steps == 1


def test_a_failure_is_passed_on(clock: Clock) -> None:
    engine: Any = StubEngine(clock)
    watch = Watch(engine, 2, 4, None)
    watch.listener(0)(Failed(TransportClosedError("gone")))
    watch.listener(1)(Finished("length", "", 1, 4))
    with pytest.raises(TransportClosedError, match="gone"):
        watch.window()


class SlowOps:
    """Asking takes 1 s, a product 10 s, and the head's twice as long."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.abandoned = 0

    def embedding(self, ids_M: Tensor) -> Callable[[], Tensor]:
        return self._product(10, ids_M)

    def linear(self, group: str, x_MK: Tensor) -> Callable[[], Tensor]:
        return self._product(20 if group == "head" else 10, x_MK)

    def _product(self, seconds: float, x: Tensor) -> Callable[[], Tensor]:
        self._clock.work(1)

        def collect() -> Tensor:
            self._clock.work(seconds)
            return x + 1

        return collect

    def abandon(self) -> None:
        self.abandoned += 1


def forward(ops: TimedOps, clock: Clock, *, fails: bool = False) -> Any:
    """A model of one layer that takes 100 s beside its products."""
    x = yield ops.embedding(torch.zeros(1))
    clock.work(100)
    if fails:
        raise InternalError("no")
    x = yield ops.linear("layers.0.qkv", x)
    return (yield ops.linear("head", x))


@pytest.mark.parametrize("groups", [1, 2])
def test_products_are_timed_within_steps(clock: Clock, groups: int) -> None:
    slow: Any = SlowOps(clock)
    ops = TimedOps(slow)
    for _ in range(2):
        clock.work(1000)  # between steps
        results = in_turns([forward(ops, clock) for _ in range(groups)], ops.abandon)
        assert [y.item() for y in results] == [3.0] * groups
    assert ops.products_ns == pytest.approx(2 * groups * 43e9)
    assert ops.computed_ns == pytest.approx(2 * groups * 143e9)


def test_a_step_that_failed_is_not_taken_for_a_part_of_the_next(clock: Clock) -> None:
    slow: Any = SlowOps(clock)
    ops = TimedOps(slow)
    with pytest.raises(InternalError):
        in_turns([forward(ops, clock, fails=True)], ops.abandon)
    clock.work(1000)
    in_turns([forward(ops, clock)], ops.abandon)
    assert slow.abandoned == 1
    assert ops.computed_ns == pytest.approx(143e9)


def child(name: str, samples: dict[DecodeAsk, list[DecodeSample]]) -> Child:
    process: Any = None
    return Child(next(plan for plan in DECODE_PLANS if plan.name == name), process, samples)


ASK = DecodeAsk(batch=4, tokens=32)
SAMPLE = DecodeSample(
    total_s=10.0,
    steps=100,
    first_token=7,
    bytes_moved=4000,
    mask_wait_s=1.0,
    mask_fill_s=2.0,
    products_s=6.0,
    waited_s=5.0,
    worker_s=4.0,
    attention_s=2.0,
    computed_s=9.0,
    told_s=0.5,
)


def test_a_point_is_the_median_of_its_runs() -> None:
    runs = [DecodeSample(total_s=total_s, steps=10, first_token=7, bytes_moved=80) for total_s in (3.0, 1.0, 2.0)]
    point = _point(child("open", {ASK: runs}), ASK)
    assert (point.median_s, point.tokens_per_s, point.bytes_per_token) == (0.2, 20.0, 2.0)
    assert point.all_s == [0.3, 0.1, 0.2]
    assert point.p10_s <= point.median_s <= point.p90_s <= point.p95_s
    masked = _point(child("masked", {ASK: [SAMPLE]}), ASK)
    assert (masked.masks, masked.mask_wait_s, masked.mask_fill_s) == ("ready", 0.01, 0.02)


def test_a_step_is_the_sum_of_its_parts() -> None:
    step = _parts(child("open", {ASK: [SAMPLE]}), ASK)
    assert step.overhead_s == pytest.approx(0.02)
    assert step.overhead_s == pytest.approx(step.between_s + step.sampling_s + step.scheduling_s)
    assert sum(value for _, value in parts(step)) == pytest.approx(step.step_s * 1e3)
    shown = dict(parts(step))
    assert shown["products: enclave"] == pytest.approx(10.0)
    assert [shown["worker"], shown["wire"]] == pytest.approx([40.0, 10.0])


def test_a_worker_that_was_not_waited_for_has_no_part_of_the_step() -> None:
    overlapped = DecodeSample(total_s=10.0, steps=100, first_token=7, products_s=6.0, waited_s=1.0, worker_s=4.0)
    step = _parts(child("masked", {ASK: [overlapped]}), ASK)
    assert (step.worker_s, step.wire_s) == (0.01, 0.0)


def test_the_overhead_is_the_median_of_all_runs() -> None:
    totals = (10.0, 12.0, 9.0)
    runs = [DecodeSample(total_s=total_s, steps=100, first_token=7, products_s=6.0) for total_s in totals]
    step = _parts(child("open", {ASK: runs}), ASK)
    assert step.all_overhead_s == [pytest.approx(each) for each in (0.04, 0.06, 0.03)]
    assert step.overhead_s == pytest.approx(0.04)
    assert step.step_s == pytest.approx(0.1)


def test_variants_must_begin_the_same_answer() -> None:
    other = DecodeSample(total_s=1.0, steps=1, first_token=8)
    drawn = DecodeAsk(batch=4, tokens=32, top_p=0.9)
    same = child("local", {ASK: [SAMPLE], drawn: [other]})
    _check_agreement([same, child("open", {ASK: [SAMPLE]}), child("masked", {ASK: [other]})])
    with pytest.raises(InternalError, match="do not agree on the first token"):
        _check_agreement([same, child("open", {ASK: [SAMPLE, other]})])


@pytest.mark.parametrize(
    ("tokens", "batches", "sentence"),
    [
        (15, (1, 16), "--tokens 15: at least 16 are needed"),
        (32, (1, 65), "--batch 65: an engine runs at most 64 requests at once"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(tokens: int, batches: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Sizes.of(tokens, batches)


def test_one_request_is_always_measured_and_many_are_those_of_the_promise() -> None:
    sizes = Sizes.of(32, (32, 16, 4))
    assert sizes.batches == (1, 4, 16, 32)
    assert (sizes.most, sizes.together, sizes.mask_rows) == (32, 16, 32 * 64)
    assert Sizes.of(32, (4,)).together == 4
    assert Sizes.of(32, (1,)).together == 1


RATES = {
    "transformers-active": (19.0, 90.0),
    "transformers-passive": (20.0, 100.0),
    "local": (40.0, 300.0),
    "open": (30.0, 150.0),
    "masked": (25.0, 75.0),
    "masked-sustained": (10.0, 30.0),
    "masked-dealer-sustained": (8.0, 40.0),
}


@pytest.mark.parametrize(
    ("together", "promised", "limited"), [(16, True, 6), (4, True, 2), (16, False, 0)], ids=["all", "one", "none"]
)
def test_ratios_are_those_of_the_rates_and_limits_those_that_were_promised(
    together: int,
    promised: bool,  # noqa: FBT001
    limited: int,
) -> None:
    points = [decoding(name, *each) for name, rates in RATES.items() for each in zip((1, together), rates, strict=True)]
    steps = [
        structs.replace(step_parts("open"), batch=together),
        structs.replace(step_parts("open", "top-p 0.9", 0.004), batch=together),
    ]
    found = {each.name: each for each in ratios(points, steps, together, promised=promised)}
    values = {name: each.value for name, each in found.items()}
    many = f"{together} requests"
    assert values["1 request: open / transformers generate"] == pytest.approx(1.5)
    assert values["1 request: open / local"] == pytest.approx(0.75)
    assert values[f"{many} / 1: open"] == pytest.approx(5.0)
    assert values[f"{many} / 1: masked, pool filled"] == pytest.approx(3.0)
    assert values[f"{many} / 1: masked, sustained, enclave masks"] == pytest.approx(3.0)
    assert values[f"{many} / 1: masked, sustained, one dealer"] == pytest.approx(5.0)
    assert values[f"{many}: overhead, open, greedy, ms"] == pytest.approx(2.5)
    limits = {name: (each.limit, each.ok) for name, each in found.items() if each.limit}
    assert len(limits) == limited
    if limited == 6:
        assert limits == {
            "1 request: open / transformers generate": ("at least 1", True),
            "1 request: open / local": ("at least 0.7", True),
            "16 requests / 1: open": ("at least 4", True),
            "16 requests / 1: masked, pool filled": ("at least 4", False),
            "16 requests: overhead, open, greedy, ms": ("at most 3", True),
            "16 requests: overhead, open, top-p 0.9, ms": ("at most 3", False),
        }


def test_one_request_alone_is_compared_with_no_others() -> None:
    points = [decoding(name, 1, rates[0]) for name, rates in RATES.items()]
    found = ratios(points, [structs.replace(step_parts("open"), batch=1)], 1, promised=True)
    assert not [each.name for each in found if "requests" in each.name]


def test_the_schema_describes_the_report() -> None:
    assert {"DecodeReport", "DecodePoint", "StepParts"} <= set(schema()["$defs"])
