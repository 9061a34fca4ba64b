"""What a GPU works in: streams, and memory of the CPU that it copies from and to by itself.

A lane is behind a protocol so that the engine over it is tested where there is no GPU (tests/unit/worker).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

_LEAST_BYTES = 1 << 20
# Pinned memory is taken from all other processes for good: a buffer keeps no more. Two of each lane.
MAX_PINNED_BYTES = 256 << 20

Work = Callable[[], Tensor]


class Moment(Protocol):
    """A point in a lane's work."""

    def query(self) -> bool:
        """Whether the device has come to it.

        Raises:
            RuntimeError: the device has failed, and does nothing any more.
        """

    def elapsed_time(self, end_event: Any) -> float:  # noqa: ANN401  of the same kind
        """Return the milliseconds from this to another that has been reached."""


class Lane(Protocol):
    """Does work in order, and returns before it is done: tensors must be left alone until a later moment comes."""

    def memory(self, size: int) -> Tensor:
        """Return ``size`` bytes on the CPU that the device copies from and to by itself."""

    def working(self) -> AbstractContextManager[object]:
        """Make what is called inside this lane's work."""

    def moment(self) -> Moment:
        """Mark the point after all work so far."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy a tensor."""

    def compute(self, work: Work) -> Tensor:
        """Return what ``work`` makes; errors that it raises are raised now."""

    def capture(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """Record ``work`` without doing it.

        Returns:
            What does it, as often as it is called, and the tensor that it writes each time.

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

    def copy(self, source: Tensor, target: Tensor) -> None:
        """See ``Lane.copy``."""
        target.copy_(source, non_blocking=True)

    def compute(self, work: Work) -> Tensor:
        """See ``Lane.compute``."""
        return work()

    def capture(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """See ``Lane.capture``.

        ``torch.cuda.graph`` would wait for the whole device, with all lanes, and empty its caches. The libraries have
        the memory that they take at first use: a product is captured on a stream that has computed it before.
        """
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            y_MN = work()
        finally:
            graph.capture_end()
        return graph.replay, y_MN


class Staging:
    """One buffer of a lane, grown when more is needed and kept, up to ``MAX_PINNED_BYTES``.

    Args:
        memory: allocates bytes.
    """

    def __init__(self, memory: Callable[[int], Tensor]) -> None:
        self._memory = memory
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def view(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the buffer as a tensor. It ends the ones returned before: the lane must be done with them.

        What is larger than the buffer may become is plain memory of its own, which is copied while the caller waits.
        """
        size = shape[0] * shape[1] * dtype.itemsize
        if size > MAX_PINNED_BYTES:
            return torch.empty(shape, dtype=dtype)
        if size > len(self._bytes):
            self._bytes = self._memory(max(_LEAST_BYTES, 1 << (size - 1).bit_length()))
        return self._bytes[:size].view(dtype).view(shape)
