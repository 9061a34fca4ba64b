"""How ranks find each other, and the process group that tensors travel through."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from tsqp.errors import SetupError
from tsqp.model.share import Share
from tsqp.worker.ranks.links import BEATS, COMMANDS, Channel, Purpose, Welcoming, introduce

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# Loading torch takes long where many ranks do it at once.
JOIN_S = 300.0
# How long a product may take at most: ranks that are gone or silent are found by other means, and sooner.
LONGEST_S = 1800.0
_LOOPBACK = "lo"
_ADDRESS, _TOKEN = "tsqp/address", "tsqp/token"
_TCP = "tcp:"


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where ranks find each other's addresses: a file in a private directory, or torchrun's store.

    Attributes:
        store: holds the addresses.
        one_machine: whether all ranks are on this one.
    """

    store: Store
    one_machine: bool

    def welcome(self, directory: Path) -> Welcoming:
        """Listen for followers, as the leader, and tell them where.

        Args:
            directory: private, for a socket that only this user can reach; used if all ranks are on this machine.

        Raises:
            SetupError: it cannot be listened there.
        """
        host = os.environ.get("MASTER_ADDR", "")
        try:
            if self.one_machine:
                listener = socket.socket(socket.AF_UNIX)
                listener.bind(str(directory / "ranks"))
                listener.listen()
                address = str(directory / "ranks")
            else:
                listener = socket.create_server((host, 0))
                address = f"{_TCP}{host}:{listener.getsockname()[1]}"
        except OSError as error:
            raise SetupError(
                f"rank 0 cannot listen for the other ranks ({host or directory}): {error.strerror or error}. "
                "Rank 0 must run on the machine that MASTER_ADDR names."
            ) from error
        welcoming = Welcoming(listener)
        self.store.set(_TOKEN, welcoming.token.hex())
        self.store.set(_ADDRESS, address)
        return welcoming

    def join(self, rank: int) -> tuple[Channel, socket.socket]:
        """Connect to the leader, as a follower.

        Returns:
            Where commands come, and where to tell that this process lives.

        Raises:
            SetupError: the leader is not there.
        """
        try:
            self.store.set_timeout(timedelta(seconds=JOIN_S))
            address = self.store.get(_ADDRESS).decode()
            token = bytes.fromhex(self.store.get(_TOKEN).decode())
            return Channel(_connected(address, token, COMMANDS, rank)), _connected(address, token, BEATS, rank)
        except (OSError, RuntimeError, ValueError) as error:
            raise SetupError(
                f"rank 0 was not found ({str(error).splitlines()[0]}): it has ended, or is out of reach."
            ) from error

    def connect(self, share: Share, device: torch.device) -> None:
        """Form the process group: NCCL between GPUs, else gloo. All ranks do so at the same time."""
        backend = "nccl" if device.type == "cuda" else "gloo"
        if self.one_machine:  # gloo would listen where the host's name leads
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group(
            backend,
            store=self.store,
            rank=share.rank,
            world_size=share.ranks,
            timeout=timedelta(seconds=LONGEST_S),
            device_id=device if device.type == "cuda" else None,
        )


def _connected(address: str, token: bytes, purpose: Purpose, rank: int) -> socket.socket:
    if address.startswith(_TCP):
        host, _, port = address.removeprefix(_TCP).rpartition(":")
        connection = socket.create_connection((host, int(port)))
    else:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
    introduce(connection, token, purpose, rank)
    return connection


def meet_in(directory: Path, ranks: int) -> Meeting:
    """Meet in a private directory of the leader's."""
    store = distributed.FileStore(str(directory / "store"), ranks)  # type: ignore[attr-defined]  # it is exported
    return Meeting(store, one_machine=True)


def meet_by_torchrun(*, one_machine: bool) -> Meeting:
    """Meet where torchrun says (MASTER_ADDR, MASTER_PORT).

    Raises:
        SetupError: nobody is there.
    """
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
    except (RuntimeError, ValueError) as error:
        raise SetupError(
            f"torchrun's store at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} does not answer "
            f"({str(error).splitlines()[0]}): start all ranks with torchrun."
        ) from error
    return Meeting(store, one_machine=one_machine)


def bytes_of(x: Tensor) -> Tensor:
    """Return a contiguous tensor's bytes, which every backend carries."""
    return x.view(-1).view(torch.uint8)
