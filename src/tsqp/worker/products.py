"""Computes the products that requests ask for: rows of several requests are stacked, multiplied once and split."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from msgspec import Struct
from torch import Tensor

from tsqp.wire import codec
from tsqp.wire.codec import Buffer
from tsqp.wire.messages import TensorSpec
from tsqp.worker.batching import Waiting
from tsqp.worker.services import WorkerService


class Result(Struct, frozen=True):
    """A tensor that is ready to be sent: what it is, and its bytes, which may lie in a slot of the transport's."""

    spec: TensorSpec
    frame: Buffer


class Product(Struct, frozen=True):
    """One product and what becomes of it.

    Attributes:
        requests: that it answers.
        outcomes: for each, its result, or the error that it failed with.
        compute_ns: what it took.
        copy_ns: the part of that in which tensors went to the device and back.
    """

    requests: Sequence[Waiting]
    outcomes: Sequence[Result | Exception]
    compute_ns: int
    copy_ns: int = 0

    def shares_ns(self, request: Waiting) -> tuple[int, int]:
        """Return one request's share of both times, by rows."""
        if len(self.requests) == 1 or not request.rows:
            return self.compute_ns, self.copy_ns
        rows, total = request.rows.count, sum(other.rows.count for other in self.requests if other.rows) or 1
        return self.compute_ns * rows // total, self.copy_ns * rows // total


class Engine(Protocol):
    """Where products are computed: on the CPU at once, on a GPU while the worker's loop goes on."""

    @property
    def busy(self) -> bool:
        """Whether there are products that ``finished`` has not returned."""

    @property
    def has_room(self) -> bool:
        """Whether ``start`` may be called."""

    def start(self, requests: Sequence[Waiting]) -> None:
        """Begin to compute the product of requests for one group, or of one request."""

    def finished(self) -> list[Product]:
        """Return what is done, oldest first."""


class CpuEngine:
    """Computes when asked to start, wherever the service does.

    Args:
        service: computes the products.
    """

    def __init__(self, service: WorkerService) -> None:
        self._service = service
        self._done: list[Product] = []

    @property
    def busy(self) -> bool:
        """See ``Engine.busy``."""
        return bool(self._done)

    @property
    def has_room(self) -> bool:
        """See ``Engine.has_room``."""
        return not self._done

    def start(self, requests: Sequence[Waiting]) -> None:
        """See ``Engine.start``."""
        self._done += compute(self._service, requests)

    def finished(self) -> list[Product]:
        """See ``Engine.finished``."""
        done, self._done = self._done, []
        return done


def compute(service: WorkerService, requests: Sequence[Waiting]) -> list[Product]:
    """Compute the product of requests for one group; if that fails, each alone, so that only the culprit fails."""
    started = time.perf_counter_ns()
    outcomes: Sequence[Result | Exception]
    try:
        outcomes = _outcomes(service, requests)
    except Exception as error:  # noqa: BLE001  it becomes the request's failure
        if len(requests) > 1:
            return [product for request in requests for product in compute(service, [request])]
        outcomes = [error]
    return [Product(requests, outcomes, time.perf_counter_ns() - started)]


def _outcomes(service: WorkerService, requests: Sequence[Waiting]) -> list[Result]:
    first = requests[0]
    if first.rows is None:
        return [_result(service.product(first.header, first.tensors))]
    name = first.rows.name
    if len(requests) == 1:
        return [_alone(service, first, name)]
    x_MK = torch.cat([service.operand(request.header, request.tensors) for request in requests])
    parts = service.multiply(name, x_MK).split([request.rows.count for request in requests if request.rows])
    return [_result(service.result(request.header, y_MN)) for request, y_MN in zip(requests, parts, strict=True)]


def _alone(service: WorkerService, request: Waiting, name: str) -> Result:
    """Compute one request's product, on the CPU written where the client reads it, if it need not be converted."""
    operand_MK = service.operand(request.header, request.tensors)
    if service.device.type != "cpu" or not service.sends_products(request.header):
        return _result(service.result(request.header, service.multiply(name, operand_MK)))
    spec = TensorSpec(codec.dtype_name(service.rows_dtype), (operand_MK.shape[0], service.widths(name)[1]))
    y_MN, frame = _room(request, spec)
    service.multiply(name, operand_MK, y_MN)
    return Result(spec, frame)


def placed(service: WorkerService, request: Waiting, y_MN: Tensor) -> Result:
    """Copy a request's part of a product out of a buffer that will be used again: into the client's memory, or ours."""
    result_MN = service.result(request.header, y_MN)
    spec = codec.spec_of(result_MN)
    out_MN, frame = _room(request, spec)
    out_MN.copy_(result_MN)
    return Result(spec, frame)


def _room(request: Waiting, spec: TensorSpec) -> tuple[Tensor, Buffer]:
    """Return a tensor to write a result to, in a slot of the transport's if it gives one, and the frame to send."""
    slot = request.incoming.allocate(codec.size_of(spec))
    return codec.empty(spec) if slot is None else (codec.tensor_of(spec, slot), slot)


def _result(y: Tensor) -> Result:
    y = y.contiguous()
    return Result(codec.spec_of(y), codec.frame_of(y))
