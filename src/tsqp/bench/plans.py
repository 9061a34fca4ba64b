"""The variants that the commands of ``tsqp bench`` measure."""

from __future__ import annotations

from dataclasses import dataclass

from tsqp.threads import SHARED_WAITING

_ACTIVE = {"OMP_WAIT_POLICY": "ACTIVE"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One variant.

    Attributes:
        name: of the variant.
        level: what its process runs.
        environment: it runs in.
        settings: for the report.
        link: which worker it uses.
        packed: it runs the packed model.
        masks_ready: its mask pool is full before each run.
        dealer: its masks come from a dealer.
        all_logits: it computes the head at every position.
        timed: whether it takes part in every round.
        floor: it measures the level's parts alone.
    """

    name: str
    level: str
    environment: dict[str, str]
    settings: str
    link: str = "shm"
    packed: bool = False
    masks_ready: bool = False
    dealer: bool = False
    all_logits: bool = False
    timed: bool = True
    floor: bool = False

    @property
    def traced(self) -> bool:
        """Whether a timeline of it is worth a look: a level with a worker, over shared memory, its masks ready."""
        return self.name in ("open", "verified", "masked")


def _exact(name: str, level: str, settings: str, *, masks_ready: bool = False, dealer: bool = False) -> Plan:
    return Plan(
        name=name,
        level=level,
        environment=SHARED_WAITING,
        settings=settings,
        link="exact",
        packed=True,
        masks_ready=masks_ready,
        dealer=dealer,
    )


# The published client sets nothing, so it gets OpenMP's own default.
PLANS = (
    Plan(
        name="monolithic-active",
        level="monolithic",
        environment=_ACTIVE,
        settings="transformers, sdpa, inference mode, no cache, OpenMP active",
    ),
    Plan(
        name="monolithic-passive",
        level="monolithic",
        environment=SHARED_WAITING,
        settings="transformers, sdpa, inference mode, no cache, OpenMP passive",
    ),
    Plan(name="local", level="local", environment={}, settings="this engine in one process, OpenMP default"),
    Plan(
        name="open",
        level="open",
        environment=SHARED_WAITING,
        settings="this engine, worker over shm, OpenMP passive on both sides",
    ),
    Plan(name="open-ipc", level="open", environment=SHARED_WAITING, settings="as open, worker over ipc", link="ipc"),
    Plan(
        name="local-int8",
        level="local",
        environment={},
        settings="packed model, exact products in one process",
        packed=True,
    ),
    _exact("verified", "verified", "worker over shm, every row of every product checked"),
    _exact("masked", "masked", "as verified, masked by the enclave, pool filled before each run", masks_ready=True),
    _exact("masked-sustained", "masked", "as masked, masks made by the enclave within the run"),
    _exact("masked-dealer", "masked", "as masked, by one dealer over ipc with CURVE", masks_ready=True, dealer=True),
    _exact("masked-dealer-sustained", "masked", "as masked-dealer, fetched within the run", dealer=True),
    Plan(
        name="legacy",
        level="legacy",
        environment={},
        settings="published client over tcp, one blocking call per module, sdpa, OpenMP default",
        link="tcp",
    ),
    Plan(
        name="open-all-logits",
        level="open",
        environment=SHARED_WAITING,
        settings="as open, head at every position; once, for its bytes",
        all_logits=True,
        timed=False,
    ),
    Plan(
        name="legacy-matmul",
        level="legacy-matmul",
        environment={},
        settings="as legacy, attention's two products on the worker, as with eager attention",
        link="tcp",
    ),
)


def _floor(level: str) -> Plan:
    return Plan(
        name=f"floor of {level}",
        level=level,
        environment={},
        settings="the parts of the level, each alone in one process",
        link="shm" if level == "open" else "exact",
        packed=level != "open",
        masks_ready=level == "masked",
        floor=True,
    )


_BY_NAME = {plan.name: plan for plan in PLANS}
LEVEL_PLANS = (
    _BY_NAME["local"],
    _BY_NAME["local-int8"],
    _BY_NAME["open"],
    _BY_NAME["verified"],
    _BY_NAME["masked"],
    _BY_NAME["monolithic-active"],
    _BY_NAME["monolithic-passive"],
    *map(_floor, ("open", "verified", "masked")),
)
# What `tsqp bench scaling` measures unless told otherwise: prompt lengths, and numbers of prompts.
SCALING_LENGTHS = (16, 64, 128, 256, 512, 1024, 2048, 4096)
SCALING_BATCHES = (1, 2, 4, 8, 16, 32)
SCALING_PLANS = tuple(_BY_NAME[name] for name in ("open", "masked", "local", "monolithic-active"))


def _generate(waiting: str, environment: dict[str, str]) -> Plan:
    return Plan(
        name=f"transformers-{waiting}",
        level="monolithic",
        environment=environment,
        settings=f"transformers generate, sdpa, KV cache, one batch, OpenMP {waiting}",
    )


# Levels in engines of their own; all prompts of a run are submitted at once.
DECODE_PLANS = (
    _generate("active", _ACTIVE),
    _generate("passive", SHARED_WAITING),
    _BY_NAME["local"],
    _BY_NAME["open"],
    _exact("masked", "masked", "worker over shm, enclave masks, pool full before a run, left alone", masks_ready=True),
    _exact("masked-sustained", "masked", "as masked, the engine's own pool, filled within the run"),
    _exact("masked-dealer-sustained", "masked", "as masked-sustained, by one dealer over ipc with CURVE", dealer=True),
)
