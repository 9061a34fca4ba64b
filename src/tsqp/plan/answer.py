"""From what is asked for to the plan that is printed."""

from __future__ import annotations

import math
from dataclasses import replace

from tsqp.config import EngineConfig
from tsqp.engine.memory import chunk_tokens
from tsqp.model.architecture import linear_groups
from tsqp.model.shape import Shape
from tsqp.plan.capacity import Capacity, Demand, gpus_needed, plan
from tsqp.plan.constants import Constants
from tsqp.plan.cost import Setup, mask_bytes, step_cost
from tsqp.plan.machines import Machines
from tsqp.plan.question import Question
from tsqp.plan.reports import PlanCost, PlanLoad, PlanReport, PlanStep
from tsqp.plan.work import Step

_GB = 1e9
_MILLION = 1e6
_HOUR_S = 3600


def answer(question: Question, name: str, shape: Shape, constants: Constants, machines: Machines) -> PlanReport:
    """Plan.

    Args:
        question: what is asked for, in range.
        name: of the model.
        shape: the model's.
        constants: of the enclave's processor.
        machines: GPUs and prices.

    Raises:
        ConfigError: the GPU is not known, the context is longer than the model's, or nothing serves the users.
    """
    question.check_context(shape.architecture)
    setup = Setup(
        architecture=shape.architecture,
        level=question.level,
        dtype=question.dtype,
        constants=constants,
        gpu=machines.gpu(question.gpu),
        gpus=1,
        assumed=machines.assumed,
        link_bytes_s=question.link_gbps * 1e9 / 8,
        latency_s=question.latency_ms / 1e3,
        dealers=question.dealers if question.masks == "dealers" else 0,
    )
    setup = replace(setup, gpus=gpus_needed(setup))
    demand = Demand(
        users=question.users,
        tokens_s=question.tokens_s,
        context=question.context,
        prompt=question.prompt,
        cores=question.enclave_cores,
        memory_bytes=question.memory_gb * _GB,
        embedding_item_bytes=shape.embedding_item_bytes,
    )
    found = plan(setup, demand)
    costs = _costs(question, setup, found, machines)
    cost_hour = sum(cost.cost_hour for cost in costs)
    tokens_s = question.users * question.tokens_s
    step, cost = found.step, found.cost
    groups = linear_groups(shape.architecture)
    return PlanReport(
        model=name,
        level=question.level,
        dtype=question.dtype,
        users=question.users,
        tokens_s=question.tokens_s,
        context=question.context,
        prompt=question.prompt,
        gpu=question.gpu.lower(),
        gpus=setup.gpus,
        enclave_cores=question.enclave_cores,
        link_gbps=question.link_gbps,
        latency_ms=question.latency_ms,
        step=PlanStep(
            rows=step.rows,
            requests=found.together,
            time_s=cost.time_s,
            enclave_s=cost.thread_s,
            link_s=cost.link_core_s,
            mask_s=cost.mask_core_s,
            gpu_s=cost.worker_s,
            round_trips=cost.round_trips,
            sent=cost.sent,
            received=cost.received,
            masks_received=cost.masks_received,
        ),
        round_trips_per_token=cost.round_trips / found.together,
        sent_per_token=cost.sent / found.together,
        received_per_token=cost.received / found.together,
        enclave_s_per_token=cost.core_s / found.together,
        gpu_s_per_token=cost.worker_s / found.together,
        most_tokens_s=1 / cost.time_s,
        first_token_s=_first_token_s(setup, demand, found),
        mask_products_s=found.mask_rows_s * len(groups),
        mask_bytes_s=found.mask_rows_s * mask_bytes(shape.architecture) * max(1, setup.dealers),
        kv_bytes=found.kv_bytes,
        enclave_bytes=found.enclave_bytes,
        enclaves=found.enclaves,
        per_host=found.per_host,
        hosts=found.hosts,
        workers=found.workers,
        dealers=found.dealers,
        links=found.links,
        loads=[PlanLoad(name=load.name, share=load.share, times=1 / max(load.share, 1e-9)) for load in found.loads],
        costs=costs,
        currency=machines.prices.currency,
        prices_date=machines.prices.date,
        cost_hour=cost_hour,
        cost_per_million_tokens=cost_hour * _MILLION / (tokens_s * _HOUR_S),
        constants_date=constants.date,
        constants_cpu=constants.hardware.cpu,
        assumptions=_assumptions(question, setup),
    )


def _first_token_s(setup: Setup, demand: Demand, found: Capacity) -> float:
    """Return how long a prompt takes to be read, chunk by chunk, in steps that others' answers share."""
    chunk = chunk_tokens(EngineConfig())
    rows = found.together - 1 + min(chunk, demand.prompt)
    known = demand.prompt + (demand.context - demand.prompt) / 2
    context = (known * (found.together - 1) + demand.prompt / 2 * min(chunk, demand.prompt)) / rows
    step = Step(rows, found.together, found.together, context)
    return math.ceil(demand.prompt / chunk) * step_cost(setup, step).time_s


def _costs(question: Question, setup: Setup, found: Capacity, machines: Machines) -> list[PlanCost]:
    prices = machines.prices
    memory_gb = found.hosts * found.per_host * found.enclave_bytes / _GB
    counted = [
        ("enclave cores", float(found.hosts * question.enclave_cores), prices.enclave_core_hour),
        ("enclave memory, GB", memory_gb, prices.enclave_gb_hour),
        ("GPUs of workers", float(found.workers * setup.gpus), setup.gpu.price_hour),
        ("GPUs of dealers", float(found.dealers * setup.gpus), setup.gpu.price_hour),
        ("links", float(found.links), prices.link_hour),
    ]
    return [
        PlanCost(name=name, count=count, price_hour=price, cost_hour=count * price)
        for name, count, price in counted
        if count
    ]


def _assumptions(question: Question, setup: Setup) -> list[str]:
    assumed, constants = setup.assumed, setup.constants
    gpu = (
        f"{question.gpu.lower()}: datasheet, not measured; of it {assumed.products:.0%} of the operations, "
        f"{assumed.memory:.0%} of the memory bandwidth and {assumed.pcie:.0%} of PCIe, and {assumed.request_us:g} us "
        "for each request."
    )
    enclave = (
        f"Enclave: measured on {constants.hardware.cpu}, {constants.date}, commit {constants.commit}; in SGX or TDX it "
        "is slower, by how much was not measured."
    )
    found = [
        gpu,
        enclave,
        f"Nothing is busy for more than {assumed.busy:.0%} of the time. All users generate all the time.",
        "Prices are examples until you put yours into the file given with --machines.",
    ]
    if setup.gpus > 1:
        found.insert(1, f"{setup.gpus} GPUs share the weights of a worker, and combining their results takes no time.")
    return found
