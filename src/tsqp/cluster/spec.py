"""What a pool is told to be, and what is known of each of its members; plain data that travels between processes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from tsqp.cluster.scaling import Bounds
from tsqp.errors import ConfigError

Kind = Literal["worker", "dealer"]
# placed: on a node, not started yet. lost: its process ended, or its actor.
Phase = Literal["placing", "placed", "starting", "ready", "draining", "lost"]

# Nodes of other parties have this label, whose value names the party (ray start --labels tsqp-dealer=NAME).
PARTY_LABEL = "tsqp-dealer"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """What a pool is to be.

    Attributes:
        name: of the pool, within its Ray cluster.
        arguments: further options of ``tsqp worker``.
        dealer_arguments: further options of ``tsqp dealer``.
        dealers: how many, each on nodes of another party.
        cpus: logical CPUs that each worker or dealer takes.
        gpus_per_rank: GPUs that each rank of a worker takes; fractions share one.
        tensor_parallel: ranks of a worker.
        key: file of the workers' secret key on their nodes; None lets each make one of its own when it starts.
        dealer_key: file of a dealer's secret key on its node.
        allow: public keys of the clients that may connect; empty lets all in.
        port: of the directory.
        drain_s: how long a worker may take to end once it has left the directory.
        settle_s: how long enclaves have to see that, before it is told to end.

    Raises:
        ConfigError: a number or name that cannot be.
    """

    name: str
    arguments: tuple[str, ...] = ()
    dealer_arguments: tuple[str, ...] = ()
    dealers: int = 0
    cpus: float = 1.0
    gpus_per_rank: float = 0.0
    tensor_parallel: int = 1
    key: str | None = None
    dealer_key: str | None = None
    allow: tuple[str, ...] = ()
    port: int = 0
    drain_s: float = 30.0
    settle_s: float = 5.0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"{self.name!r} is no name for a pool: expected up to 31 lowercase letters, digits and hyphens."
            )
        if self.dealers < 0 or self.tensor_parallel < 1 or self.gpus_per_rank < 0 or self.cpus <= 0:
            raise ConfigError(
                f"{self.dealers} dealers, {self.tensor_parallel} ranks, {self.gpus_per_rank:g} GPUs and {self.cpus:g} "
                "CPUs: expected 0 dealers or more, 1 rank or more, 0 GPUs or more, and more than 0 CPUs."
            )
        if self.tensor_parallel > 1 and self.gpus_per_rank % 1:
            raise ConfigError(
                f"{self.gpus_per_rank:g} GPUs for each of {self.tensor_parallel} ranks: ranks of one worker do not "
                "share a GPU; give a whole number (--gpus-per-worker)."
            )
        if self.dealers and self.dealer_key is None:
            raise ConfigError(
                "dealers need keys, which enclaves pin: give the file that each has on its own node (--dealer-key)."
            )

    def resources(self, kind: Kind) -> dict[str, float]:
        """Return what a member takes of its node, in Ray's terms."""
        gpus = self.gpus_per_rank * self.tensor_parallel if kind == "worker" else 0.0
        return {"CPU": self.cpus} | ({"GPU": gpus} if gpus else {})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a member is.

    Attributes:
        node: Ray's id of the node.
        address: of the node.
        party: whose node it is, by its label; empty for the pool's own.
        pid: of its actor.
    """

    node: str
    address: str
    party: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a member says of itself.

    Attributes:
        phase: as far as it knows.
        place: where it is; None before that is known.
        url: where its process listens, once ready.
        key: the public key of that, in z85; None for links in clear.
        pid: of its process, 0 for none.
        waiting: requests that wait there.
        reason: why it was lost.
    """

    phase: Phase
    place: Place | None = None
    url: str = ""
    key: str | None = None
    pid: int = 0
    waiting: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How many workers a pool wants, and within which bounds."""

    workers: int
    bounds: Bounds = field(default_factory=lambda: Bounds(0, 0))
