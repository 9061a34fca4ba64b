"""What ``tsqp plan`` prints with ``--json``."""

from __future__ import annotations

from msgspec import Struct

from tsqp.measurements import Hardware
from tsqp.plan.constants import Constants


class PlanStep(Struct, frozen=True, kw_only=True):
    """One step of one engine; seconds and bytes.

    It has ``rows`` rows, of which ``requests`` are of answers and the others of prompts that come next. It takes
    ``time_s``; meanwhile the engine computes ``enclave_s`` on one core, its links ``link_s`` and masks ``mask_s`` on
    others, and a worker is busy for ``gpu_s``. ``sent`` and ``received`` go to and come from the worker,
    ``masks_received`` comes from the dealers.
    """

    rows: float
    requests: int
    time_s: float
    enclave_s: float
    link_s: float
    mask_s: float
    gpu_s: float
    round_trips: int
    sent: float
    received: float
    masks_received: float


class PlanLoad(Struct, frozen=True, kw_only=True):
    """How much of a part is used: 1 is all of it. ``times`` as much it could do."""

    name: str
    share: float
    times: float


class PlanCost(Struct, frozen=True, kw_only=True):
    """What some machines cost an hour."""

    name: str
    count: float
    price_hour: float
    cost_hour: float


class PlanReport(Struct, frozen=True, kw_only=True):
    """``tsqp plan``: what serves ``users`` users with ``tokens_s`` tokens a second each. Seconds and bytes.

    A token is one of an answer; what is told per token includes what its share of the prompt takes.
    ``round_trips_per_token`` is of a step that all its requests share. ``enclaves`` engines run on ``hosts`` hosts,
    ``per_host`` on each; ``workers`` and ``dealers`` have ``gpus`` GPUs each. ``loads`` begins with what saturates
    first. ``assumptions`` says what was not measured.
    """

    model: str
    level: str
    dtype: str
    users: int
    tokens_s: float
    context: int
    prompt: int
    gpu: str
    gpus: int
    enclave_cores: int
    link_gbps: float
    latency_ms: float
    step: PlanStep
    round_trips_per_token: float
    sent_per_token: float
    received_per_token: float
    enclave_s_per_token: float
    gpu_s_per_token: float
    most_tokens_s: float
    first_token_s: float
    mask_products_s: float
    mask_bytes_s: float
    kv_bytes: int
    enclave_bytes: int
    enclaves: int
    per_host: int
    hosts: int
    workers: int
    dealers: int
    links: int
    loads: list[PlanLoad]
    costs: list[PlanCost]
    currency: str
    prices_date: str
    cost_hour: float
    cost_per_million_tokens: float
    constants_date: str
    constants_cpu: str
    assumptions: list[str]


class PlanPoint(Struct, frozen=True, kw_only=True):
    """One point that was predicted and measured: seconds of one core, the enclave's and a CPU worker's together.

    ``size`` is a prompt's tokens, or how many answers a step of generation computes after ``context`` tokens each.
    ``error`` is predicted / measured - 1. ``enclave_s`` and ``worker_s`` are the measured parts, with their errors.
    ``all_s`` has what was measured in each turn.
    """

    model: str
    level: str
    kind: str
    size: int
    context: int
    measured_s: float
    predicted_s: float
    error: float
    enclave_s: float
    enclave_error: float
    worker_s: float
    worker_error: float
    all_s: list[float]


class PlanCheckReport(Struct, frozen=True, kw_only=True):
    """``tsqp plan --check``: predictions against measurements of other points than those that gave the constants.

    ``points`` are those that are checked, ``fitted`` those that gave the constants. ``ok`` is false when an error of
    ``points`` is above ``limit``; the exit code is then 1.
    """

    date: str
    commit: str
    command: str
    hardware: Hardware
    rounds: int
    limit: float
    ok: bool
    points: list[PlanPoint]
    fitted: list[PlanPoint]
    constants: Constants
