"""Which ranks a worker has, which of them this process is, and what each computes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tsqp.config import WorkerConfig
from tsqp.errors import ConfigError, SetupError
from tsqp.model.share import Share
from tsqp.threads import available_cores
from tsqp.worker.devices import resolve_device

# What torchrun tells each process that it starts.
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Placement:
    """One rank's place.

    Attributes:
        share: its place among all ranks.
        local: its place among those of its machine.
        launched: whether torchrun started all ranks; if not, the leader starts the others itself.
    """

    share: Share
    local: Share
    launched: bool

    @property
    def one_machine(self) -> bool:
        """Whether all ranks are on this machine."""
        return self.local.ranks == self.share.ranks

    def threads(self, asked: int | None) -> int:
        """Return how many CPU threads this rank has of those that the ranks of a machine share."""
        total = available_cores() if asked is None else asked
        return max(1, total // self.local.ranks)


def placement(config: WorkerConfig, environment: Mapping[str, str]) -> Placement:
    """Return this process's place: by torchrun, which has started it, or as the leader of ranks that it will start.

    Raises:
        ConfigError: the settings contradict torchrun or each other, or links between ranks would leave the machine.
    """
    place = _launched(config, environment) if all(name in environment for name in _LAUNCHED) else None
    if place is None:
        alone = Share(0, config.tensor_parallel or 1)
        place = Placement(alone, alone, launched=False)
    if place.share.is_whole:
        return place
    if config.serves == "masks":
        raise ConfigError(
            "a dealer is one process (--tensor-parallel 1): masks would cross from rank to rank in clear. Use several "
            "dealers, or a machine that holds the whole model."
        )
    if not place.one_machine and config.insecure != "on":
        raise ConfigError(
            f"{place.local.ranks} of {place.share.ranks} ranks are on this machine: what they send to the others would "
            "cross the network in clear. Start all on one, or, on a network of your own, say --insecure "
            "(TSQP_INSECURE=on)."
        )
    return place


def _launched(config: WorkerConfig, environment: Mapping[str, str]) -> Placement:
    ranks, rank = _number(environment, "WORLD_SIZE"), _number(environment, "RANK")
    if config.tensor_parallel not in (None, ranks):
        raise ConfigError(
            f"--tensor-parallel {config.tensor_parallel}, but torchrun started {ranks} ranks (WORLD_SIZE): give it "
            f"--nproc-per-node {config.tensor_parallel}, leave --tensor-parallel out, or unset RANK and WORLD_SIZE."
        )
    near = environment["MASTER_ADDR"] in _LOOPBACK
    local_ranks = _number(environment, "LOCAL_WORLD_SIZE", ranks if near else 1)
    local_rank = _number(environment, "LOCAL_RANK", rank if near else 0)
    if not (rank < ranks and local_rank < local_ranks <= ranks):
        raise ConfigError(
            f"rank {rank} of {ranks}, on this machine {local_rank} of {local_ranks}: torchrun's RANK, WORLD_SIZE, "
            "LOCAL_RANK and LOCAL_WORLD_SIZE do not go together."
        )
    return Placement(Share(rank, ranks), Share(local_rank, local_ranks), launched=True)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"environment variable {name}: expected a number as torchrun sets it, got {text!r}.")
    return int(text)


def rank_device(asked: str | None, local: Share, notice: Callable[[str], None]) -> torch.device:
    """Return what a rank computes on: the CPU, or as many GPUs further as there are ranks before it on its machine.

    Args:
        asked: ``cpu``, or ``cuda:N``, which is of the machine's first rank; None for ``cuda:0`` where there is one.
        local: the rank's place on its machine.
        notice: told in one line when there is none and the CPU is used.

    Raises:
        ConfigError: not a device name.
        SetupError: there are fewer GPUs than ranks.
    """
    first = resolve_device(asked, notice)
    if first.type != "cuda":
        return first
    start, found = first.index or 0, torch.cuda.device_count()
    if start + local.ranks > found:
        raise SetupError(
            f"{local.ranks} ranks need cuda:{start} to cuda:{start + local.ranks - 1}, one each, and torch "
            f"{torch.__version__} finds {found} CUDA devices: at most {found - start} ranks fit (--tensor-parallel), "
            "or use --device cpu."
        )
    return torch.device("cuda", start + local.rank)
