"""The floor of each part of a level: the same work alone, in one process, with warm caches and without any transport.

* worker: the level's products of all rows, every group in order, and at `open` what it computes between them;
* protection: quantising, masking, checking, also what is done ahead, with products computed in this process at once;
* the rest of the enclave: the forward pass where each product is a ready-made tensor of the right shape.

docs/performance.md says how they are put together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from tsqp import prefill
from tsqp.bench.child import Order, Sample, settings, tell
from tsqp.config import WorkerConfig
from tsqp.errors import InternalError
from tsqp.levels import open_model, runnable
from tsqp.loaded import Runnable
from tsqp.model.architecture import LlamaConfig, chain_name, chains, linear_groups
from tsqp.model.llama import Llama
from tsqp.model.overlap import Pending
from tsqp.paths import private_socket_directory
from tsqp.threads import using_threads
from tsqp.transport.base import Buffer, ClientTransport, Delivery
from tsqp.wire import codec, messages
from tsqp.worker.services import WorkerService
from tsqp.worker.startup import Progress, open_worker

_LARGEST = 1 << 20
_PRODUCTS = (messages.Embedding, messages.Linear, messages.LinearChain, messages.LinearExact)


class Floors:
    """Measures one level's parts.

    Args:
        order: the level, and the worker that it connects to; no product is sent there.
        service: this process's own products, the same as the worker's.
        state: the model's non-linear parameters.
        protected: the level over ``Loopback``, where it protects anything.
    """

    def __init__(
        self,
        order: Order,
        config: LlamaConfig,
        service: WorkerService,
        state: dict[str, Tensor],
        protected: Runnable | None,
    ) -> None:
        self._threads = order.threads
        self._config = config
        self._service = service
        self._protected = protected
        self._ready = ReadyOps(config, state, chains=service.serves == "open")
        self._llama = Llama(config, self._ready)
        self._inputs: list[tuple[str, Tensor]] = []

    @staticmethod
    @contextmanager
    def of(order: Order) -> Iterator[Floors]:
        """Load what is needed for the time of a ``with`` block."""
        opened = open_model(order.model, order.level)
        with own_service(order) as service:
            if opened.packed is None:
                yield Floors(order, opened.architecture, service, service.state, None)
                return
            with runnable(
                order.level,
                opened,
                settings(order),
                wrap=lambda _peer: lambda link: Loopback(link, service),
                on_notice=tell,
            ) as protected:
                yield Floors(order, opened.architecture, service, opened.packed.state, protected)

    def measured(self, ids_BT: Tensor) -> Sample:
        """Measure each part once: the worker's is ``worker_s``, the enclave's are what else ``total_s`` holds."""
        rest_s, worker_s = self._rest_s(ids_BT), self._worker_s(*ids_BT.shape)
        if self._protected is None:
            return Sample(total_s=rest_s + worker_s, waited_s=worker_s, worker_s=worker_s)
        cost = prefill.timed(self._protected, ids_BT)[0].cost
        return Sample(
            total_s=rest_s + worker_s + cost.protection_ns / 1e9,
            waited_s=worker_s,
            worker_s=worker_s,
            quantise_s=cost.quantise_ns / 1e9,
            mask_s=cost.mask_ns / 1e9,
            ahead_s=cost.ahead_ns / 1e9,
            check_s=cost.check_ns / 1e9,
        )

    def _rest_s(self, ids_BT: Tensor) -> float:
        """Time the forward pass without products, with one thread and with all; the shorter one."""
        taken = []
        for threads in sorted({1, self._threads}):
            with using_threads(threads):
                self._ready.refill(*ids_BT.shape)
                started = time.perf_counter()
                self._llama.prefill(ids_BT)
                taken.append(time.perf_counter() - started)
        return min(taken)

    def _worker_s(self, batch: int, tokens: int) -> float:
        """Time every product once, one after the other."""
        asked = self._asked(product_rows(self._config, batch, tokens))
        if [len(x_MK) for _, x_MK in self._inputs] != list(asked.values()):
            self._inputs = [(name, self._operand(name, count)) for name, count in asked.items()]
        started = time.perf_counter()
        for name, x_MK in self._inputs:
            self._service.multiply(name, x_MK)
        if self._service.device.type == "cuda":
            torch.cuda.synchronize(self._service.device)
        return time.perf_counter() - started

    def _asked(self, rows: Mapping[str, int]) -> Mapping[str, int]:
        """Return how many rows of what a worker is asked for: of groups, or of the first one and chains."""
        if not self._service.chains:
            return rows
        first = next(iter(rows))
        return {first: rows[first], **{chain_name(names): rows[names[0]] for names in chains(self._config)}}

    def _operand(self, name: str, rows: int) -> Tensor:
        generator, shape = torch.Generator().manual_seed(0), (rows, self._service.widths(name)[0])
        device, dtype = self._service.device, self._service.rows_dtype
        if self._service.serves == "open":
            return torch.randn(shape, generator=generator).to(device, dtype)
        return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(device, dtype)


@contextmanager
def own_service(order: Order) -> Iterator[WorkerService]:
    """Load what a worker would hold. Its address is bound and never served."""
    with private_socket_directory() as directory:
        config = WorkerConfig(
            model=order.model,
            dtype=order.dtype,
            threads=order.threads,
            device=order.device,
            listen=(f"ipc://{directory}/floor",),
            serves="open" if order.level == "open" else "exact",
        )
        running = open_worker(config, Progress(tell, lambda _name, _done: None))
        try:
            yield running.worker.dispatcher.service
        finally:
            running.transport.close()


def product_rows(config: LlamaConfig, batch: int, tokens: int) -> dict[str, int]:
    """Return how many rows each group multiplies in one prefill: after the last attention one per prompt is left."""
    last = f"layers.{config.layers - 1}."
    alone = ("head", f"{last}o", f"{last}gate_up", f"{last}down")
    return {group.name: batch if group.name in alone else batch * tokens for group in linear_groups(config)}


class ReadyOps:
    """``LinearOps`` whose products are there already: random tensors of the right shape.

    Args:
        config: the model's architecture.
        state: its non-linear parameters.
        chains: whether what stands between two layers' attention comes as one.
    """

    def __init__(self, config: LlamaConfig, state: dict[str, Tensor], *, chains: bool) -> None:
        self._config = config
        self._state = state
        self._chains = chains
        self._left: deque[Tensor] = deque()
        self._random = torch.randn(_LARGEST, generator=torch.Generator().manual_seed(0))

    def refill(self, batch: int, tokens: int) -> None:
        """Make every product of one prefill."""
        rows = product_rows(self._config, batch, tokens)
        shapes = [(batch * tokens, self._config.hidden_size)]
        shapes += [(rows[group.name], group.rows) for group in linear_groups(self._config)]
        self._left = deque(self._filled(*shape) for shape in shapes)

    def _filled(self, rows: int, columns: int) -> Tensor:
        times = -(-rows * columns // _LARGEST)
        return self._random.repeat(times)[: rows * columns].view(rows, columns)

    def embedding(self, ids_M: Tensor) -> Pending:  # noqa: ARG002  the shape is known
        """See ``LinearOps.embedding``."""
        return self._left.popleft

    def linear(self, group: str, x_MK: Tensor) -> Pending:  # noqa: ARG002  the shape is known
        """See ``LinearOps.linear``."""
        return self._left.popleft

    def linear_chain(self, groups: tuple[str, ...], x_MK: Tensor, residual_MD: Tensor) -> Pending | None:  # noqa: ARG002
        """See ``LinearOps.linear_chain``."""
        return partial(self._last_of_chain, residual_MD) if self._chains else None

    def _last_of_chain(self, residual_MD: Tensor) -> Tensor:
        o_MD, _, down_MD, last_MN = (self._left.popleft() for _ in range(4))
        residual_MD.add_(o_MD).add_(down_MD)
        return last_MN

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """See ``LinearOps.matmul``; not used here."""
        raise InternalError(f"a floor has no product of {tuple(a.shape)} and {tuple(b.shape)}.")

    def state(self) -> dict[str, Tensor]:
        """See ``LinearOps.state``."""
        return self._state

    def abandon(self) -> None:
        """See ``LinearOps.abandon``."""
        self._left.clear()


class Loopback:
    """A link whose products are computed here while they are sent; everything else passes on to the worker.

    Args:
        link: to a worker.
        service: computes the products.
    """

    def __init__(self, link: ClientTransport, service: WorkerService) -> None:
        self._link = link
        self._service = service
        self._replies: deque[Sequence[Buffer]] = deque()

    @property
    def peer(self) -> str:
        """See ``ClientTransport.peer``."""
        return self._link.peer

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:  # noqa: ARG002  there are no slots
        """See ``ClientTransport.allocate``."""
        return None

    def discard(self, slot: memoryview) -> None:
        """See ``ClientTransport.discard``."""

    def send(self, frames: Sequence[Buffer]) -> None:
        """See ``ClientTransport.send``."""
        request = codec.decode_request(frames)
        if not isinstance(request.header, _PRODUCTS):
            self._link.send(frames)
            return
        y_MN = self._service.product(request.header, request.tensors)
        result = messages.Result(id=request.header.id, y=codec.spec_of(y_MN), compute_ns=0)
        self._replies.append([messages.encode(result), codec.frame_of(y_MN)])

    def receive(self, timeout_s: float) -> Delivery:
        """See ``ClientTransport.receive``."""
        return Delivery(self._replies.popleft()) if self._replies else self._link.receive(timeout_s)

    def close(self) -> None:
        """See ``ClientTransport.close``."""
        self._link.close()
