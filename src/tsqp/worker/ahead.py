"""Which weights a worker on a CPU reads while it waits: those that are multiplied next.

With few rows a product takes as long as its weights take to come from memory. An enclave asks for a model's groups in
their order, so while it computes between two products, the worker reads the beginning of the next group's weights into
its caches (docs/performance.md has what this gains). A wrong guess costs nothing but the reading.
"""

from __future__ import annotations

from tsqp.worker.services import WorkerService

# More than can be read between two products; a part of a cache that cores share.
_LIMIT_BYTES = 8 << 20


class WeightsAhead:
    """The weights that come after those of the last product, as ``spinning.Ahead``.

    Args:
        service: whose weights; on a CPU.
    """

    def __init__(self, service: WorkerService) -> None:
        names = list(service.groups)
        self._next = dict(zip(names, [*names[1:], names[0]], strict=True))
        self._next |= {name: self._next[last] for name, last in service.chains.items()}
        self._service = service
        self._group = ""
        self._at = self._left = self._budget = 0

    def after(self, name: str) -> None:
        """Guess from the last product, with a group's weights or a chain's."""
        self._budget = _LIMIT_BYTES
        self._begin(self._next[name])

    def _begin(self, group: str) -> None:
        weights = self._service.weights(group)
        self._group = group
        self._at, self._left = (0, 0) if weights is None else (weights.data_ptr(), min(weights.nbytes, self._budget))

    def span(self) -> tuple[int, int]:
        """See ``Ahead.span``."""
        return self._at, self._left

    def fetched(self, size: int) -> None:
        """See ``Ahead.fetched``. After a group comes the next."""
        self._at += size
        self._left -= size
        self._budget -= size
        if not self._left and self._budget:
            self._begin(self._next[self._group])
