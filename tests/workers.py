"""Real worker processes for tests, and links to them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tsqp.config import EnclaveConfig
from tsqp.enclave.connect import Link, Peer, connect
from tsqp.launch import local_worker
from tsqp.model.architecture import read_config, weight_shapes
from tsqp.model.digest import model_digest
from tsqp.model.pack import pack
from tsqp.model.weights import Checkpoint

StartWorker = Callable[..., str]


@contextmanager
def running_worker(directory: Path, scheme: str = "shm", command: str = "worker", **options: str) -> Iterator[str]:
    """Run a worker or dealer with further options (``dtype="bfloat16"``); yield its shm, ipc or tcp address."""
    flags = [part for name, value in {"device": "cpu", **options}.items() for part in (f"--{name}", value)]
    tcp = f"127.0.0.1:{free_port()}"
    own = "ipc" if scheme == "tcp" else scheme
    with local_worker(["--model", str(directory), "--listen", tcp, *flags], own, command=command) as url:
        yield tcp if scheme == "tcp" else url


@contextmanager
def linked(url: str, directory: Path, config: EnclaveConfig | None = None) -> Iterator[Link]:
    """Connect to a worker as the enclave does, with the model in ``directory``."""
    architecture = read_config(directory)
    checkpoint = Checkpoint(directory)
    checkpoint.require(weight_shapes(architecture))
    peer = Peer(address=url)
    with connect(peer, config or EnclaveConfig(), architecture, model_digest(architecture, checkpoint)) as link:
        yield link


def packed_tiny(directory: Path, out: Path) -> Path:
    """Pack a checkpoint; return where to."""
    pack(directory, "tiny", out, lambda _done: None)
    return out


def free_port() -> int:
    """Return a tcp port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
