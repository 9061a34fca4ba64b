"""What must hold for any plan: more work never needs fewer machines, and nothing is busier than it may be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from tsqp.errors import ConfigError
from tsqp.model.architecture import linear_groups
from tsqp.model.attention import BLOCK_TOKENS
from tsqp.model.paged_cache import block_bytes
from tsqp.plan.answer import answer
from tsqp.plan.constants import load_constants
from tsqp.plan.machines import Machines, load_machines
from tsqp.plan.models import model_shape
from tsqp.plan.question import Question
from tsqp.plan.reports import PlanReport

MACHINES = load_machines(None)
CONSTANTS = load_constants(None)
ASKED = Question(
    users=100,
    tokens_s=2.0,
    context=1024,
    prompt=512,
    level="masked",
    masks="dealers",
    dealers=1,
    dtype="float32",
    gpu="h100",
    enclave_cores=16,
    memory_gb=256.0,
    link_gbps=25.0,
    latency_ms=0.1,
)


def planned(model: str = "llama-3.2-1b", machines: Machines = MACHINES, **changes: Any) -> PlanReport:
    if changes.get("level", "masked") != "masked":
        changes = {"masks": None, **changes}
    name, shape = model_shape(model)
    return answer(replace(ASKED, **changes), name, shape, CONSTANTS, machines)


LEVELS = st.sampled_from(["open", "verified", "masked"])
COUNTED = ("enclaves", "hosts", "workers", "dealers", "links")


@given(level=LEVELS, users=st.integers(1, 5000), more=st.integers(1, 5000))
@settings(max_examples=10)
def test_more_users_never_need_fewer_machines(level: str, users: int, more: int) -> None:
    few, many = (planned("smollm2", level=level, users=count) for count in (users, users + more))
    assert all(getattr(few, name) <= getattr(many, name) for name in COUNTED)
    assert few.mask_products_s <= many.mask_products_s
    assert few.cost_hour <= many.cost_hour * 1.0001


@given(level=LEVELS, users=st.integers(1, 100_000), tokens_s=st.floats(0.1, 3.0))
@settings(max_examples=10)
def test_nothing_is_busier_than_it_may_be(level: str, users: int, tokens_s: float) -> None:
    found = planned("smollm2", level=level, users=users, tokens_s=tokens_s)
    for load in found.loads:
        assert load.share <= (1.0 if "memory" in load.name else MACHINES.assumed.busy) * 1.0001
    assert [load.share for load in found.loads] == sorted((load.share for load in found.loads), reverse=True)
    assert found.most_tokens_s * MACHINES.assumed.busy >= tokens_s * 0.999
    assert found.enclaves * found.step.requests >= users or found.enclaves == 1


def test_machines_are_enough_and_no_more_than_enough() -> None:
    found = planned(users=3000)
    assert (found.enclaves - 1) * found.step.requests < 3000 <= found.enclaves * found.step.requests
    assert (found.hosts - 1) * found.per_host < found.enclaves <= found.hosts * found.per_host
    assert found.links == found.hosts + found.workers + found.dealers
    busiest = next(load for load in found.loads if load.name == "the workers' GPUs")
    assert busiest.share * found.workers / (found.workers - 1) > MACHINES.assumed.busy


def test_mask_products_are_counted_for_every_row_and_linear() -> None:
    found = planned("smollm2", users=10, tokens_s=1.0, context=1024, prompt=512)
    groups = linear_groups(model_shape("smollm2")[1].architecture)
    # A token of an answer is a row, and so is the token of a prompt that comes with it.
    assert found.mask_products_s == pytest.approx(10 * 1.0 * 2 * len(groups))
    assert found.mask_bytes_s == pytest.approx(10 * 2 * sum(4 * group.rows for group in groups))
    assert planned("smollm2", level="verified").mask_products_s == 0


def test_memory_of_keys_and_values_is_the_cache_s() -> None:
    found = planned("smollm2", context=1000, prompt=500)
    blocks = found.step.requests * -(-1000 // BLOCK_TOKENS)
    assert found.kv_bytes == blocks * block_bytes(model_shape("smollm2")[1].architecture)
    assert found.enclave_bytes > found.kv_bytes


def test_every_party_of_dealers_is_as_many_machines() -> None:
    one, three = planned(users=1000), planned(users=1000, dealers=3)
    assert three.dealers >= 3 * one.dealers
    received = [found.step.masks_received / found.step.rows for found in (one, three)]
    assert received[1] == pytest.approx(3 * received[0])
    assert planned(masks="enclave", users=3, tokens_s=0.5).dealers == 0
    assert planned(level="open", users=3).dealers == 0


def test_masks_by_the_enclave_take_its_cores() -> None:
    own, dealt = planned("smollm2", masks="enclave"), planned("smollm2")
    assert own.step.mask_s > 0 == dealt.step.mask_s
    assert own.enclave_s_per_token > dealt.enclave_s_per_token


def test_weights_that_do_not_fit_are_shared() -> None:
    assert planned("llama-3.1-8b", tokens_s=0.5).gpus == 1
    large = planned("llama-3.1-70b", tokens_s=0.2)
    assert large.gpus == 2
    assert any("2 GPUs share" in sentence for sentence in large.assumptions)
    assert planned("llama-3.1-70b", tokens_s=0.2, gpu="h200").gpus == 1


def test_costs_follow_the_prices() -> None:
    prices = MACHINES.prices
    doubled = structs.replace(
        prices,
        currency="EUR",
        **{name: 2 * getattr(prices, name) for name in ("enclave_core_hour", "enclave_gb_hour", "link_hour")},
    )
    gpu = MACHINES.gpus["h100"]
    gpus = {"h100": structs.replace(gpu, price_hour=2 * gpu.price_hour)}
    twice = structs.replace(MACHINES, prices=doubled, gpus=gpus)
    usual, dear = planned(), planned(machines=twice)
    assert dear.cost_hour == pytest.approx(2 * usual.cost_hour)
    assert dear.currency == "EUR"
    assert usual.cost_per_million_tokens == pytest.approx(usual.cost_hour * 1e6 / (100 * 2.0 * 3600))
    assert usual.cost_hour == pytest.approx(sum(cost.count * cost.price_hour for cost in usual.costs))


def test_a_slower_network_never_makes_a_step_shorter() -> None:
    times = [planned("smollm2", users=1, tokens_s=0.1, latency_ms=delay).most_tokens_s for delay in (0, 0.1, 1, 10)]
    assert times == sorted(times, reverse=True)
    assert times[-1] < times[0] / 2
    with pytest.raises(ConfigError, match="one request alone gets"):
        planned("smollm2", tokens_s=5.0, latency_ms=10)


def test_what_nothing_serves_is_refused_with_a_reason() -> None:
    with pytest.raises(ConfigError, match=r"one request alone gets .* tokens a second at most"):
        planned("llama-3.1-70b", tokens_s=50.0)
    with pytest.raises(ConfigError, match=r"one request alone takes .* the memory of an enclave's host"):
        planned("llama-3.1-8b", tokens_s=0.1, context=100_000, memory_gb=4.0)
    with pytest.raises(ConfigError, match="more than 64 GPUs of 4 GB hold"):
        planned("llama-3.1-70b", gpu="t4", tokens_s=0.1, level="open", dtype="float32", machines=tiny_gpus())


def tiny_gpus() -> Machines:
    return structs.replace(MACHINES, gpus={"t4": structs.replace(MACHINES.gpus["t4"], memory_gb=4.0)})
