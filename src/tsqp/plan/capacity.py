"""How many machines serve so many users: the enclaves on their hosts, workers, dealers, links.

Every part is loaded up to ``assumed.busy`` at most. An engine takes as many requests together as it may for each of
them to get its tokens in time; of all such numbers the one is taken at which a host serves the most users.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tsqp.config import EXACT_LEVELS, EnclaveConfig, EngineConfig
from tsqp.enclave.mask_pool import peak_bytes
from tsqp.engine.memory import cache_bytes, chunk_tokens
from tsqp.errors import ConfigError
from tsqp.model.architecture import linear_groups, weight_shapes
from tsqp.plan.cost import Setup, StepCost, dealer_s, mask_bytes, step_cost
from tsqp.plan.work import Step
from tsqp.sizing import enclave_size

MOST_TOGETHER = 256
# What a GPU holds beside the weights: buffers of three products under way, graphs, CUDA's own.
_GPU_BESIDE_BYTES = 3e9
_GPU_ROOM = 0.9
_MOST_GPUS = 64
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_LEAST_STEP_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked for.

    Attributes:
        users: who generate at the same time.
        tokens_s: that each of them is to get a second.
        context: tokens of a prompt and its answer.
        prompt: of them, the prompt's.
        cores: of an enclave's host.
        memory_bytes: of an enclave's host.
        embedding_item_bytes: of a number in the stored embedding table.
    """

    users: int
    tokens_s: float
    context: int
    prompt: int
    cores: int
    memory_bytes: float
    embedding_item_bytes: int

    @property
    def rows(self) -> float:
        """Rows that are computed for each token of an answer: its own, and its share of the prompt's."""
        return 1 + self.prompt / (self.context - self.prompt)


@dataclass(frozen=True, slots=True)
class Load:
    """How much of something is used: a share of 1, and what of."""

    name: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """A plan.

    Attributes:
        together: requests that an engine runs at once.
        step: of one engine, and what it costs.
        kv_bytes, enclave_bytes: of one engine.
        enclaves, per_host, hosts: engines, how many a host runs, and hosts.
        workers, dealers: how many; each is ``gpus`` GPUs.
        links: of hosts, workers and dealers.
        mask_rows_s: rows of masks a second; 0 where nothing is masked.
        loads: what is used of each, the most first.
    """

    together: int
    step: Step
    cost: StepCost
    kv_bytes: int
    enclave_bytes: int
    enclaves: int
    per_host: int
    hosts: int
    workers: int
    dealers: int
    links: int
    mask_rows_s: float
    loads: tuple[Load, ...]


def usual_step(demand: Demand, together: int) -> Step:
    """Return what an engine's step is on average: a row for each answer, and prompts of those that come next."""
    answer = demand.context - demand.prompt
    read = together * demand.prompt / answer
    rows = together + read
    scores = together * (demand.prompt + answer / 2) + read * demand.prompt / 2
    reads = together * (demand.prompt + answer / 2) + read / chunk_tokens(EngineConfig()) * demand.prompt / 2
    return Step(rows, together, reads * rows / scores, scores / rows)


def gpus_needed(setup: Setup) -> int:
    """Return how many GPUs hold the weights, in powers of two.

    Raises:
        ConfigError: more than 64.
    """
    item = 1 if setup.level in EXACT_LEVELS else _ITEM_BYTES[setup.dtype]
    needed = item * sum(math.prod(shape) for shape in weight_shapes(setup.architecture).values())
    room = _GPU_ROOM * 1e9 * setup.gpu.memory_gb - _GPU_BESIDE_BYTES
    gpus = 1
    while gpus <= _MOST_GPUS and needed > gpus * room:
        gpus *= 2
    if room <= 0 or gpus > _MOST_GPUS:
        raise ConfigError(
            f"the weights take {needed / 1e9:.0f} GB, more than {_MOST_GPUS} GPUs of {setup.gpu.memory_gb:g} GB hold: "
            "choose another --gpu."
        )
    return gpus


def plan(setup: Setup, demand: Demand) -> Capacity:
    """Plan a deployment.

    Raises:
        ConfigError: not even one request can have its tokens in time, or fits a host.
    """
    found = _Engines(setup, demand)
    together = found.best()
    full = found.at(together)
    shared = min(together, demand.users)
    used = found.at(shared)
    steps_s = demand.tokens_s * demand.users / shared
    enclaves = -(-demand.users // together)
    per_host = full.per_host if enclaves > 1 else used.per_host
    rows_s = demand.users * demand.tokens_s * demand.rows if setup.level == "masked" else 0.0
    busy = setup.assumed.busy
    link = busy * setup.link_bytes_s
    worker_s, moved = steps_s * used.cost.worker_s, steps_s * max(used.cost.sent, used.cost.received)
    workers = max(1, math.ceil(worker_s / busy), math.ceil(moved / link))
    dealt_s = rows_s * dealer_s(setup) if setup.dealers else 0.0
    dealt = rows_s * mask_bytes(setup.architecture) if setup.dealers else 0.0
    each = max(1, math.ceil(dealt_s / busy), math.ceil(dealt / link)) if setup.dealers else 0
    hosts = -(-enclaves // per_host)
    loads = [
        *used.loads(demand, setup, min(per_host, enclaves)),
        Load("the workers' GPUs", worker_s / workers),
        Load("the workers' links", moved / workers / setup.link_bytes_s),
    ]
    if setup.dealers:
        loads += [
            Load("the dealers", dealt_s / each),
            Load("the dealers' links", dealt / each / setup.link_bytes_s),
        ]
    return Capacity(
        together=shared,
        step=used.step,
        cost=used.cost,
        kv_bytes=used.kv_bytes,
        enclave_bytes=used.enclave_bytes,
        enclaves=enclaves,
        per_host=min(per_host, enclaves),
        hosts=hosts,
        workers=workers,
        dealers=each * setup.dealers,
        links=hosts + workers + each * setup.dealers,
        mask_rows_s=rows_s,
        loads=tuple(sorted(loads, key=lambda load: -load.share)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine:
    """One engine with so many requests together."""

    step: Step
    cost: StepCost
    kv_bytes: int
    enclave_bytes: int
    per_host: int

    def loads(self, demand: Demand, setup: Setup, per_host: int) -> list[Load]:
        """Return what it uses, with so many of its kind on a host."""
        a_second, cost = demand.tokens_s, self.cost
        received = cost.received + cost.masks_received
        return [
            Load("the time of a step", a_second * cost.time_s),
            Load("the link thread of an enclave", a_second * cost.worker_link_core_s),
            Load("the cores of an enclave's host", per_host * a_second * cost.core_s / demand.cores),
            Load("the memory of an enclave's host", per_host * self.enclave_bytes / demand.memory_bytes),
            Load("the link of an enclave's host", per_host * a_second * max(cost.sent, received) / setup.link_bytes_s),
        ]


class _Engines:
    """Engines by the number of requests that they run together."""

    def __init__(self, setup: Setup, demand: Demand) -> None:
        self._setup, self._demand = setup, demand

    def at(self, together: int) -> _Engine:
        setup, demand = self._setup, self._demand
        step = usual_step(demand, together)
        cost = step_cost(setup, step)
        kv_bytes = together * cache_bytes(setup.architecture, demand.context)
        size = self._enclave_bytes(together, step, kv_bytes)
        one = _Engine(step=step, cost=cost, kv_bytes=kv_bytes, enclave_bytes=size, per_host=1)
        # Those of a host share its cores, memory and link; a step's time and its link thread are an engine's own.
        shared = max(
            load.share / (1.0 if "memory" in load.name else setup.assumed.busy)
            for load in one.loads(demand, setup, 1)[2:]
        )
        return replace(one, per_host=int(1 / shared))

    def best(self) -> int:
        """Return the number at which a host serves the most users.

        Raises:
            ConfigError: there is none.
        """
        users: dict[int, int] = {}
        for together in (*range(1, 33), *range(40, MOST_TOGETHER + 1, 8)):
            engine = self.at(together)
            if self._limit(engine) or not engine.per_host:
                break
            users[together] = together * engine.per_host
        if not users:
            raise ConfigError(self._why_not(self.at(1)))
        return max(users, key=lambda together: (users[together], together))

    def _limit(self, engine: _Engine) -> Load | None:
        """Return what an engine alone uses more of than it may."""
        own = engine.loads(self._demand, self._setup, 1)[:2]
        return next((load for load in own if load.share > self._setup.assumed.busy), None)

    def _why_not(self, engine: _Engine) -> str:
        demand, busy = self._demand, self._setup.assumed.busy
        if self._limit(engine):
            most = busy / max(engine.cost.time_s, engine.cost.worker_link_core_s)
            return (
                f"one request alone gets {most:.2g} tokens a second at most with this model, level and link, "
                f"--tokens-per-s asks for {demand.tokens_s:g}: lower it, or choose a shorter --context or a faster "
                "--link."
            )
        load = max(engine.loads(demand, self._setup, 1)[2:], key=lambda load: load.share)
        return (
            f"one request alone takes {load.share:.3g} times {load.name}: more --enclave-cores, --enclave-memory or "
            "--link are needed, or a shorter --context."
        )

    def _enclave_bytes(self, together: int, step: Step, kv_bytes: int) -> int:
        setup = self._setup
        rows = max(_LEAST_STEP_TOKENS, math.ceil(step.rows))
        masked, groups = setup.level == "masked", linear_groups(setup.architecture)
        config = EnclaveConfig(
            level=setup.level,
            dtype=setup.dtype,
            dealers=tuple(f"dealer-{number}" for number in range(setup.dealers)),
            mask_pool=rows if masked else None,
            mask_memory=max(peak_bytes(groups, rows, together), peak_bytes(groups, rows)),
        )
        engine = EngineConfig(kv_memory=kv_bytes, max_running=together, step_tokens=rows)
        found = enclave_size(
            setup.architecture,
            config,
            engine,
            threads=1,
            embedding_item_bytes=self._demand.embedding_item_bytes,
        )
        return found.needed_bytes
