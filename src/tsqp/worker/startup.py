"""Brings a worker up from its settings: device, address, model, in the order in which mistakes are cheapest."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tsqp.arith import native, ring
from tsqp.config import DEALER_PORT, WorkerConfig
from tsqp.errors import ConfigError, SetupError
from tsqp.model.architecture import LinearGroup, linear_groups, module_count
from tsqp.model.digest import model_digest
from tsqp.model.linears import Linears
from tsqp.model.locate import is_packed_model, locate_packed
from tsqp.model.ops import read_state
from tsqp.model.packed import open_codes
from tsqp.threads import set_threads
from tsqp.transport.keys import KeyPair, load_allowed, load_secret
from tsqp.transport.nearby import make_nearby
from tsqp.transport.server import Server
from tsqp.transport.urls import Endpoint, check_clear, parse
from tsqp.wire import codec
from tsqp.wire.messages import Service
from tsqp.worker.clients import Limits
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.loading import open_checkpoint, read_codes
from tsqp.worker.ranks.leader import Leader
from tsqp.worker.ranks.links import Load
from tsqp.worker.ranks.placement import Placement, placement, rank_device
from tsqp.worker.ranks.split import SplitExactService, SplitLinears
from tsqp.worker.server import Worker
from tsqp.worker.services import DealerService, ExactService, OpenService, WorkerService

if TYPE_CHECKING:
    from tsqp.worker.metrics import MetricsServer

# How long a worker that ends waits for clients to take their replies.
LINGER_S = 10.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How start-up tells what it does: one-line notices, and the fraction done of a named step."""

    notice: Callable[[str], None]
    step: Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class RunningWorker:
    """A worker that is bound and loaded but does not serve yet."""

    worker: Worker
    transport: Server
    endpoints: tuple[Endpoint, ...]
    device: torch.device
    dtype: str
    serves: Service
    threads: int
    modules: int
    model: str
    digest: str
    public_key: str | None
    metrics: MetricsServer | None
    leader: Leader | None

    @property
    def ranks(self) -> int:
        """How many processes compute each product together."""
        return self.worker.dispatcher.service.ranks

    def serve(self) -> None:
        """Answer requests until SIGINT or SIGTERM, or until the parent hangs up; then close.

        What was taken in is answered, and replies have ``LINGER_S`` to leave.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self.worker.stop())
        try:
            self.worker.serve()
            self.transport.close(LINGER_S)
        finally:
            self.transport.close()
            if self.metrics:
                self.metrics.close()
            if self.leader:
                self.leader.close()


def open_worker(config: WorkerConfig, progress: Progress, hangup_fd: int | None = None) -> RunningWorker:
    """Resolve the device, bind the addresses, load the model.

    Args:
        config: the worker's settings.
        progress: where to report to.
        hangup_fd: the worker stops when this file descriptor closes, such as a pipe from its parent.

    Raises:
        ConfigError: an address beyond this machine, no key, and nobody said that this is meant.
        SetupError: device or key missing, address in use, model missing or too large.
    """
    place = placement(config, os.environ)
    if place.share.rank:
        raise ConfigError(
            f"torchrun started this process as rank {place.share.rank} of {place.share.ranks}: it can do so with "
            "'tsqp worker' and tee_gpu/server.py only. Unset RANK and WORLD_SIZE to start it alone."
        )
    threads = set_threads(config.threads if place.share.is_whole else place.threads(config.threads))
    device = rank_device(config.device, place.local, progress.notice)
    endpoints = tuple(parse(url) for url in config.listen) or _default_endpoints(config, progress)
    key = load_secret(config.key) if config.key is not None else None
    allowed = load_allowed(config.allow)
    if config.serves == "masks":
        _check_dealer(endpoints, key, progress)
    for endpoint in endpoints:
        if key is None:
            check_clear(endpoint, insecure=config.insecure == "on")
        if not endpoint.stays_on_this_machine:
            _tell_exposure(endpoint, key, allowed, progress)
    with ExitStack() as opened:
        transport = Server(endpoints, config.max_message_bytes, hangup_fd, key, allowed)
        opened.callback(transport.close)
        metrics = _metrics(config.metrics, progress)
        if metrics:
            opened.callback(metrics.close)
        dispatcher, leader = _load(config, device, place, progress, opened)
        opened.pop_all()
    if metrics:
        metrics.show(dispatcher)
    return RunningWorker(
        worker=Worker(dispatcher, transport, cuda_graphs=config.cuda_graphs == "on"),
        transport=transport,
        endpoints=endpoints,
        device=device,
        dtype=codec.dtype_name(dispatcher.service.dtype),
        serves=dispatcher.service.serves,
        threads=threads,
        modules=module_count(dispatcher.service.groups.values()),
        model=config.model,
        digest=dispatcher.digest,
        public_key=key.public.decode() if key else None,
        metrics=metrics,
        leader=leader,
    )


def _metrics(address: str | None, progress: Progress) -> MetricsServer | None:
    """Listen for Prometheus, if an address is given."""
    if address is None:
        return None
    try:
        from tsqp.worker.metrics import MetricsServer  # noqa: PLC0415  of an extra
    except ModuleNotFoundError as error:
        raise SetupError(f"{error.name} is not installed: run 'pip install tsqp[metrics]'.") from error
    return MetricsServer(address, progress.notice)


def _default_endpoints(config: WorkerConfig, progress: Progress) -> tuple[Endpoint, ...]:
    """Return where to listen by default: on loopback, and in shared memory where that takes no secrets in clear."""
    if config.serves == "masks":
        return (parse(f"127.0.0.1:{DEALER_PORT}"),)
    loopback, nearby = parse(f"127.0.0.1:{config.port}"), None
    if config.key is None:
        try:
            nearby = make_nearby(config.port)
        except SetupError as error:
            progress.notice(f"no shared memory, {loopback} only: {error}")
    return (loopback, nearby) if nearby else (loopback,)


def _tell_exposure(
    endpoint: Endpoint, key: KeyPair | None, allowed: frozenset[bytes] | None, progress: Progress
) -> None:
    """Say who can do what with an address that the network reaches."""
    if key is None:
        progress.notice(f"{endpoint} is open to the network, unencrypted: whoever reaches it can use and read it.")
    elif allowed is None:
        progress.notice(
            f"{endpoint} is open to the network, encrypted: whoever reaches it and has its public key can use it; "
            "--allow names who may."
        )


def _check_dealer(endpoints: tuple[Endpoint, ...], key: KeyPair | None, progress: Progress) -> None:
    """Refuse shared memory, which carries no encryption, and say what a dealer without a key is good for."""
    if any(endpoint.scheme == "shm" for endpoint in endpoints):
        raise ConfigError("a dealer cannot listen on shm: seeds must not lie in shared memory; use tcp or ipc.")
    if key is None:
        progress.notice(
            "no key: seeds and mask products travel in clear, which is for development only (--key, 'tsqp keys new')."
        )


def _load(
    config: WorkerConfig, device: torch.device, place: Placement, progress: Progress, opened: ExitStack
) -> tuple[Dispatcher, Leader | None]:
    if config.serves in ("exact", "masks") or (config.serves == "auto" and is_packed_model(config.model)):
        return _load_codes(config, device, place, progress, opened)
    architecture, checkpoint = open_checkpoint(config.model, lambda done: progress.step("converting the model", done))
    leader = _leader(place, linear_groups(architecture), opened)
    digest = model_digest(architecture, checkpoint, lambda done: progress.step("hashing the weights", done))
    dtype = codec.TORCH_DTYPES[config.dtype]
    step = _step("loading the weights", progress, leader)
    if leader:
        leader.load(_order(config, device, place, digest, exact=False))
        linears: Linears = SplitLinears(leader, architecture, checkpoint, dtype, device, step)
        leader.join(device)
    else:
        linears = Linears(architecture, checkpoint, dtype, device, step)
    service = OpenService(linears, read_state(linears, checkpoint))
    return Dispatcher(service, config.model, digest, _limits(config)), leader


def _leader(place: Placement, groups: Sequence[LinearGroup], opened: ExitStack) -> Leader | None:
    """Start the other ranks, if there are to be any."""
    if place.share.is_whole:
        return None
    place.share.check(groups)
    leader = Leader(place)
    opened.callback(leader.close)
    return leader


def _step(name: str, progress: Progress, leader: Leader | None) -> Callable[[float], None]:
    """Report a step, and look after the other ranks meanwhile."""

    def step(done: float) -> None:
        if leader:
            leader.check()
        progress.step(name, done)

    return step


def _order(config: WorkerConfig, device: torch.device, place: Placement, digest: str, *, exact: bool) -> Load:
    return Load(
        model=config.model,
        digest=digest,
        exact=exact,
        dtype=config.dtype,
        device=str(device),
        threads=place.threads(config.threads),
        log_level=config.log_level,
        log_format=config.log_format,
    )


def _limits(config: WorkerConfig) -> Limits:
    return Limits(config.max_clients, config.max_client_requests, config.max_client_bytes)


def _load_codes(
    config: WorkerConfig, device: torch.device, place: Placement, progress: Progress, opened: ExitStack
) -> tuple[Dispatcher, Leader | None]:
    """Load int8 codes."""
    packed = open_codes(locate_packed(config.model, lambda done: progress.step("packing the model", done)))
    leader = _leader(place, packed.groups, opened)
    if leader:
        leader.load(_order(config, device, place, packed.codes_digest, exact=True))
    codes = read_codes(packed, device, place.share, _step("loading the codes", progress, leader))
    for slower in (native.notice() if device.type == "cpu" else None, ring.notice(device)):
        if slower:
            progress.notice(slower)
    service: WorkerService
    if leader:
        leader.join(device)
        service = SplitExactService(leader, packed.groups, codes, device)
    else:
        service = (DealerService if config.serves == "masks" else ExactService)(packed.groups, codes, device)
    return Dispatcher(service, config.model, packed.codes_digest, _limits(config)), leader
