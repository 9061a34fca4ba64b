"""Products on a GPU while the worker's loop goes on: copies and products of one batch overlap with those of others.

A lane is a stream with pinned buffers. A batch takes a free lane: its rows are stacked in pinned memory, copied to the
device, multiplied and copied back, all queued at once; an event tells when the result is here. Where the same shape
comes again, the product is captured as a CUDA graph, one launch instead of many. Lanes are shared by all clients
(docs/decisions/0015).

There was no GPU where this was written: what needs none is tested with a lane that is none (tests/unit/worker), the
rest by tests/integration/test_cuda.py, which has not been run yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.errors import DeviceError, TsqpError
from tsqp.worker.batching import Waiting
from tsqp.worker.devices import device_failed
from tsqp.worker.graphs import Capturing, Graph, GraphCache
from tsqp.worker.lanes import CudaLane, Lane, Moment, Staging
from tsqp.worker.products import Product, Result, compute, placed
from tsqp.worker.services import WorkerService

# One batch is copied in, one multiplied, one copied out.
LANES = 3


class _Track:
    """A lane with its buffers and graphs."""

    def __init__(self, lane: Lane, capturing: Capturing) -> None:
        self.lane = lane
        self.operands, self.results = Staging(lane.memory), Staging(lane.memory)
        self.graphs = GraphCache(capturing)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A product that is under way: when it began, had its operand, was computed, and had its result here."""

    requests: Sequence[Waiting]
    track: _Track
    y_MN: Tensor
    began: Moment
    arrived: Moment
    computed: Moment
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
        capturing = Capturing(enabled=graphs)
        self._tracks = [_Track(lane, capturing) for lane in lanes]
        # The one that became free last is taken first: a lone client always has the same, with its graphs.
        self._free = list(self._tracks)
        self._flying: deque[_Flight] = deque()
        self._done: list[Product] = []
        self._failure: DeviceError | None = None

    @property
    def captured(self) -> int:
        """How many products are captured as graphs."""
        return sum(len(track.graphs) for track in self._tracks)

    @property
    def busy(self) -> bool:
        """See ``Engine.busy``."""
        return bool(self._flying or self._done or self._failure)

    @property
    def has_room(self) -> bool:
        """See ``Engine.has_room``."""
        return bool(self._free)

    def start(self, requests: Sequence[Waiting]) -> None:
        """See ``Engine.start``. What is no product with a group's weights is computed at once."""
        rows = requests[0].rows
        if rows is None:
            self._compute(requests)
            return
        track = self._free.pop()
        try:
            self._flying.append(self._launch(track, rows.name, requests))
        except Exception:  # noqa: BLE001  compute() finds out which request it was, and why
            self._free.append(track)
            self._compute(requests)

    def _compute(self, requests: Sequence[Waiting]) -> None:
        """Compute at once. Where that fails unexpectedly, ask a lane whether the device has failed."""
        products = compute(self.service, requests)
        self._done += products
        if any(not isinstance(each, Result | TsqpError) for product in products for each in product.outcomes):
            lane = self._tracks[0].lane
            try:
                with lane.working():
                    lane.moment().query()
            except RuntimeError as error:
                self._fail(error)

    def _launch(self, track: _Track, name: str, requests: Sequence[Waiting]) -> _Flight:
        service = self.service
        inputs, outputs = service.widths(name)
        count = sum(request.rows.count for request in requests if request.rows)
        x_MK = track.operands.view((count, inputs), service.rows_dtype)
        y_MN = track.results.view((count, outputs), service.rows_dtype)
        first = 0
        for request in requests:
            rows_MK = service.operand(request.header, request.tensors)
            x_MK[first : first + len(rows_MK)].copy_(rows_MK)
            first += len(rows_MK)
        lane = track.lane
        with lane.working(), torch.inference_mode():
            graph = track.graphs.find((name, count), lambda: self._capture(lane, name, x_MK))
            began = lane.moment()
            if graph:
                operand_MK, product_MN = graph.operand_MK, graph.result_MN
            else:
                operand_MK = torch.empty_like(x_MK, device=service.device)
            lane.copy(x_MK, operand_MK)
            arrived = lane.moment()
            if graph:
                graph.replay()
            else:
                product_MN = lane.compute(lambda: service.multiply(name, operand_MK))
            computed = lane.moment()
            lane.copy(product_MN, y_MN)
            return _Flight(requests, track, y_MN, began, arrived, computed, lane.moment())

    def _capture(self, lane: Lane, name: str, like_MK: Tensor) -> Graph:
        operand_MK = torch.empty_like(like_MK, device=self.service.device)
        replay, result_MN = lane.capture(lambda: self.service.multiply(name, operand_MK))
        return Graph(operand_MK, result_MN, replay)

    def finished(self) -> list[Product]:
        """See ``Engine.finished``. Products end in the order in which they began, or a little later.

        Raises:
            DeviceError: the device has failed. Requests that were under way have been answered with failures.
        """
        if self._failure and not self._done:
            raise self._failure
        try:
            while self._flying and self._flying[0].ended.query():
                self._done.append(self._landed(self._flying[0]))
                self._free.append(self._flying.popleft().track)
        except RuntimeError as error:
            self._fail(error)
        done, self._done = self._done, []
        return done

    def _fail(self, error: RuntimeError) -> None:
        """Take the device for lost: an error that comes with an event comes with every call from then on."""
        self._failure = device_failed(self.service.device, error)
        self._done += [Product(flight.requests, [self._failure] * len(flight.requests), 0) for flight in self._flying]
        self._flying.clear()
        self._free.clear()

    def _landed(self, flight: _Flight) -> Product:
        """Take the result out of the lane's buffer, which the next batch overwrites."""
        parts = flight.y_MN.split([request.rows.count for request in flight.requests if request.rows])
        outcomes: list[Result | Exception] = []
        for request, y_MN in zip(flight.requests, parts, strict=True):
            try:
                outcomes.append(placed(self.service, request, y_MN))
            except Exception as error:  # noqa: BLE001, PERF203  it becomes the request's failure
                outcomes.append(error)
        whole_ms = flight.began.elapsed_time(flight.ended)
        copy_ms = whole_ms - flight.arrived.elapsed_time(flight.computed)
        return Product(flight.requests, outcomes, round(whole_ms * 1e6), max(0, round(copy_ms * 1e6)))
