"""Which of the requests that wait are multiplied next: those for one group's weights become one product.

The request that has waited longest is always in the next product, with the others for its group, oldest first. So none
waits for more products than there are older requests. A request that stands alone (``rows`` is None) is a product of
its own, in its turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from torch import Tensor

from tsqp.transport.base import Incoming
from tsqp.wire.messages import AnyRequest

# A product of this many rows takes as long per row as one of many more, on the CPUs and GPUs we know of: weights are
# read once for all of them. More rows would only make the first wait for the last (docs/performance.md).
MAX_BATCH_ROWS = 512
# What is taken in before it can be computed: enough to fill a product of short prompts from one client each.
MAX_WAITING = 64
MAX_WAITING_BYTES = 256 << 20


class Rows(Struct, frozen=True):
    """What a request is multiplied by, a group's name or a chain's, and how many rows it brings."""

    name: str
    count: int


class Waiting(Struct, eq=False):
    """A request for a product: decoded, checked, not computed yet.

    Attributes:
        header: of the request.
        tensors: that came with it; over shared memory they are the client's, and valid until the reply.
        rows: None where it cannot be multiplied together with others.
        incoming: the message; it takes the reply.
        size_bytes: what it holds while it waits.
    """

    header: AnyRequest
    tensors: Sequence[Tensor]
    rows: Rows | None
    incoming: Incoming
    size_bytes: int


class Queue:
    """Requests that wait, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: list[Waiting] = []
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def size_bytes(self) -> int:
        """What the requests hold while they wait."""
        return self._bytes

    @property
    def has_room(self) -> bool:
        """Whether another message may be taken in; the transport keeps the rest."""
        return len(self._waiting) < MAX_WAITING and self._bytes < MAX_WAITING_BYTES

    def add(self, request: Waiting) -> None:
        """Put a request at the end."""
        self._waiting.append(request)
        self._bytes += request.size_bytes

    def take(self) -> list[Waiting]:
        """Remove and return the oldest request and those that are multiplied together with it; nothing if none wait.

        Together they have at most ``MAX_BATCH_ROWS`` rows, if the oldest alone has not more.
        """
        if len(self._waiting) < 2:  # noqa: PLR2004
            taken, self._waiting, self._bytes = self._waiting, [], 0
            return taken
        oldest = self._waiting[0]
        taken, kept = [oldest], []
        room = MAX_BATCH_ROWS - (oldest.rows.count if oldest.rows else 0)
        for request in self._waiting[1:]:
            if oldest.rows and request.rows and request.rows.name == oldest.rows.name and request.rows.count <= room:
                taken.append(request)
                room -= request.rows.count
            else:
                kept.append(request)
        self._waiting = kept
        self._bytes -= sum(request.size_bytes for request in taken)
        return taken
