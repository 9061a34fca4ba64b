"""Products on a GPU while the worker's loop goes on: copies and products of one batch overlap with those of others.

A lane is a stream with pinned buffers. A batch takes a free lane: its rows are stacked in pinned memory, copied to the
device, multiplied and copied back, all queued at once; an event tells when the result is here. Where the same shape
comes again, the product is captured as a CUDA graph, one launch instead of many.

There was no GPU where this was written: what needs none is tested with a lane that is none (tests/unit/worker), the
rest by tests/integration/test_cuda.py, which has not been run yet.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tsqp.errors import DeviceMemoryError
from tsqp.worker.batching import Waiting
from tsqp.worker.products import Product, Result, compute, placed
from tsqp.worker.services import WorkerService

# One batch is copied in, one multiplied, one copied out.
LANES = 3
# What graphs save is launches, which more rows than these outlast. Each keeps its operand and result on the device.
MAX_GRAPH_ROWS = 64
MAX_GRAPHS = 512
# A shape is captured when it comes for the third time: prompts come in all lengths, tokens by ones and twos.
_USES_BEFORE_CAPTURE = 2
_MAX_SHAPES = 4096
_LEAST_BYTES = 1 << 20

_log = logging.getLogger(__name__)

Multiply = Callable[[Tensor], Tensor]
Shape = tuple[str, int, torch.dtype]


class Moment(Protocol):
    """A point in a lane's work."""

    def query(self) -> bool:
        """Whether the device has come to it."""

    def elapsed_time(self, end_event: Any) -> float:  # noqa: ANN401  of the same kind
        """Return the milliseconds from this to another that has been reached."""


class Lane(Protocol):
    """Does work in order, and returns before it is done."""

    def memory(self, size: int) -> Tensor:
        """Return ``size`` bytes on the CPU that the device copies from and to by itself."""

    def working(self) -> AbstractContextManager[object]:
        """Make what is called inside this lane's work."""

    def moment(self) -> Moment:
        """Mark the point after all work so far."""

    def capture(self, multiply: Multiply, x_MK: Tensor) -> Multiply:
        """Record ``multiply`` for operands of this shape; the result repeats it.

        Args:
            multiply: what to record.
            x_MK: an operand; it is not kept.

        Raises:
            RuntimeError: it cannot be recorded.
        """


class CudaLane:
    """A CUDA stream.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # Graphs of a lane never run at the same time, and each writes what it reads later, so they share memory.
        # Results stay alive with their graph, and are not shared.
        self._pool = torch.cuda.graph_pool_handle()

    def memory(self, size: int) -> Tensor:
        """See ``Lane.memory``: pinned."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def working(self) -> AbstractContextManager[object]:
        """See ``Lane.working``."""
        return torch.cuda.stream(self._stream)

    def moment(self) -> Moment:
        """See ``Lane.moment``."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def capture(self, multiply: Multiply, x_MK: Tensor) -> Multiply:
        """See ``Lane.capture``."""
        kept_MK = torch.empty_like(x_MK)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            y_MN = multiply(kept_MK)

        def replay(operand_MK: Tensor) -> Tensor:
            kept_MK.copy_(operand_MK)
            graph.replay()
            return y_MN

        return replay


class Staging:
    """One buffer of a lane, grown when more is needed and kept.

    Args:
        memory: allocates bytes.
    """

    def __init__(self, memory: Callable[[int], Tensor]) -> None:
        self._memory = memory
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def view(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the buffer as a tensor. It ends the ones returned before: the lane must be done with them."""
        size = shape[0] * shape[1] * dtype.itemsize
        if size > len(self._bytes):
            self._bytes = self._memory(max(_LEAST_BYTES, 1 << (size - 1).bit_length()))
        return self._bytes[:size].view(dtype).view(shape)


class GraphCache:
    """Which shapes of one lane are captured: those that came often enough, the least recently used given up first.

    Args:
        capture: captures a product; once it has failed no more are captured, which is said once.
    """

    def __init__(self, capture: Callable[[Multiply, Tensor], Multiply]) -> None:
        self._capture = capture
        self._uses: OrderedDict[Shape, int] = OrderedDict()
        self._graphs: OrderedDict[Shape, Multiply] = OrderedDict()
        self.enabled = True

    def __len__(self) -> int:
        return len(self._graphs)

    def multiply(self, group: str, x_MK: Tensor, plainly: Multiply) -> Tensor:
        """Multiply by a captured product of this shape if there is one, else by ``plainly``."""
        shape = (group, len(x_MK), x_MK.dtype)
        graph = self._graphs.get(shape)
        if graph is None and self._is_due(shape):
            graph = self._captured(shape, plainly, x_MK)
        if graph is None:
            return plainly(x_MK)
        self._graphs.move_to_end(shape)
        return graph(x_MK)

    def _is_due(self, shape: Shape) -> bool:
        """Count a use; tell whether the shape has been used often enough."""
        if not self.enabled or shape[1] > MAX_GRAPH_ROWS:
            return False
        self._uses[shape] = uses = self._uses.pop(shape, 0) + 1
        if len(self._uses) > _MAX_SHAPES:
            self._uses.popitem(last=False)
        return uses > _USES_BEFORE_CAPTURE

    def _captured(self, shape: Shape, plainly: Multiply, x_MK: Tensor) -> Multiply | None:
        try:
            graph = self._capture(plainly, x_MK)
        except (RuntimeError, DeviceMemoryError) as error:
            self.enabled = False
            self._graphs.clear()
            _log.warning("products are not captured as CUDA graphs from here on, which costs launches: %s", error)
            return None
        del self._uses[shape]
        self._graphs[shape] = graph
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return graph


class _Track:
    """A lane with its buffers and graphs."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.operands, self.results = Staging(lane.memory), Staging(lane.memory)
        self.graphs = GraphCache(lane.capture)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A product that is under way."""

    requests: Sequence[Waiting]
    track: _Track
    y_MN: Tensor
    began: Moment
    ended: Moment


class CudaEngine:
    """Computes products on a GPU, several under way at a time.

    Args:
        service: its weights are on the device.
        lanes: where products run; by default ``LANES`` streams of the service's device.
        graphs: capture products that repeat.
    """

    def __init__(self, service: WorkerService, lanes: Sequence[Lane] | None = None, *, graphs: bool = True) -> None:
        self.service = service
        if lanes is None:
            torch.cuda.synchronize(service.device)  # weights were copied by another stream
            lanes = [CudaLane(service.device) for _ in range(LANES)]
        self._tracks = [_Track(lane) for lane in lanes]
        for track in self._tracks:
            track.graphs.enabled = graphs
        self._free = deque(self._tracks)
        self._flying: deque[_Flight] = deque()
        self._done: list[Product] = []

    @property
    def captured(self) -> int:
        """How many products are captured as graphs."""
        return sum(len(track.graphs) for track in self._tracks)

    @property
    def busy(self) -> bool:
        """See ``Engine.busy``."""
        return bool(self._flying or self._done)

    @property
    def has_room(self) -> bool:
        """See ``Engine.has_room``."""
        return bool(self._free)

    def start(self, requests: Sequence[Waiting]) -> None:
        """See ``Engine.start``. What is no product with a group's weights is computed at once."""
        rows = requests[0].rows
        if rows is None:
            self._done += compute(self.service, requests)
            return
        track = self._free.popleft()
        try:
            self._flying.append(self._launch(track, rows.group, requests))
        except Exception:  # noqa: BLE001  compute() finds out which request it was, and why
            self._free.append(track)
            self._done += compute(self.service, requests)

    def _launch(self, track: _Track, group: str, requests: Sequence[Waiting]) -> _Flight:
        service, spec = self.service, self.service.groups[group]
        count = sum(request.rows.count for request in requests if request.rows)
        x_MK = track.operands.view((count, spec.in_features), service.rows_dtype)
        y_MN = track.results.view((count, spec.rows), service.rows_dtype)
        first = 0
        for request in requests:
            operand_MK = service.operand(request.header, request.tensors)
            x_MK[first : first + len(operand_MK)].copy_(operand_MK)
            first += len(operand_MK)
        with track.lane.working(), torch.inference_mode():
            began = track.lane.moment()
            on_device_MK = x_MK.to(service.device, non_blocking=True)
            product_MN = track.graphs.multiply(group, on_device_MK, lambda x_MK: service.multiply(group, x_MK))
            y_MN.copy_(product_MN, non_blocking=True)
            return _Flight(requests, track, y_MN, began, track.lane.moment())

    def finished(self) -> list[Product]:
        """See ``Engine.finished``. Products end in the order in which they began, or a little later."""
        done, self._done = self._done, []
        while self._flying and self._flying[0].ended.query():
            flight = self._flying.popleft()
            done.append(self._landed(flight))
            self._free.append(flight.track)
        return done

    def _landed(self, flight: _Flight) -> Product:
        """Take the result out of the lane's buffer, which the next batch overwrites."""
        parts = flight.y_MN.split([request.rows.count for request in flight.requests if request.rows])
        outcomes: list[Result | Exception] = []
        for request, y_MN in zip(flight.requests, parts, strict=True):
            try:
                outcomes.append(placed(self.service, request, y_MN))
            except Exception as error:  # noqa: BLE001, PERF203  it becomes the request's failure
                outcomes.append(error)
        elapsed_ns = round(flight.began.elapsed_time(flight.ended) * 1e6)
        return Product(flight.requests, outcomes, elapsed_ns)
