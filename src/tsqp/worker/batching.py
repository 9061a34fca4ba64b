"""Which of the requests that wait are multiplied next: those for one group's weights become one product.

The oldest request of the client that was charged least leads the next product, and those for its group join it,
whoever sent them. While a client waits each other one leads at most ``MAX_LEAD_ROWS / LEAST_ROWS + 1`` products
(clients.py), so a client's oldest request waits for at most as many times the number of the others. A request that
stands alone (``rows`` is None) is a product of its own, in its turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from torch import Tensor

from tsqp.transport.base import Incoming
from tsqp.wire.messages import AnyRequest
from tsqp.worker.clients import Account, Shares

# A product of this many rows takes as long per row as one of many more, on the CPUs and GPUs we know of: weights are
# read once for all of them. More rows would only make the first wait for the last (docs/performance.md).
MAX_BATCH_ROWS = 512
# What is taken in before it can be computed, of all clients together: several requests of many clients.
MAX_WAITING = 512
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
        size_bytes: of its frames.
        account: of the client that sent it.
        held_bytes: of its frames and its reply.
    """

    header: AnyRequest
    tensors: Sequence[Tensor]
    rows: Rows | None
    incoming: Incoming
    size_bytes: int
    account: Account
    held_bytes: int

    def charged_rows(self) -> int:
        """Return what its client was charged so far."""
        return self.account.charged_rows


class Queue:
    """Requests that wait, in order of arrival.

    Attributes:
        size_bytes: what the requests hold while they wait.
    """

    def __init__(self) -> None:
        self._waiting: list[Waiting] = []
        self._shares = Shares()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def has_room(self) -> bool:
        """Whether another message may be taken in; the transport keeps the rest."""
        return len(self._waiting) < MAX_WAITING and self.size_bytes < MAX_WAITING_BYTES

    def add(self, request: Waiting) -> None:
        """Put a request at the end."""
        self._shares.enter(request.account)
        self._waiting.append(request)
        self.size_bytes += request.size_bytes

    def take(self) -> list[Waiting]:
        """Remove and return the requests of the next product, the one that leads it first; nothing if none wait.

        Together they have at most ``MAX_BATCH_ROWS`` rows, if the first alone has not more. If not all that could join
        have room, those of clients that were charged least do.
        """
        if not self._waiting:
            return []
        leader = min(self._waiting, key=Waiting.charged_rows) if len(self._waiting) > 1 else self._waiting[0]
        self._shares.lead(leader.account)
        self._served(leader)
        taken = [leader, *self._joining(leader)]
        if len(taken) == len(self._waiting):
            self._waiting = []
        else:
            gone = set(map(id, taken))
            self._waiting = [request for request in self._waiting if id(request) not in gone]
        return taken

    def _served(self, request: Waiting) -> None:
        self._shares.charge(request.account, request.rows.count if request.rows else 0)
        self.size_bytes -= request.size_bytes

    def _joining(self, leader: Waiting) -> list[Waiting]:
        """Return the requests that are multiplied together with another; they are charged."""
        if len(self._waiting) == 1 or not leader.rows:
            return []
        name, room = leader.rows.name, MAX_BATCH_ROWS - leader.rows.count
        others = [each for each in self._waiting if each.rows and each.rows.name == name and each is not leader]
        if sum([each.rows.count for each in others if each.rows]) > room:
            others.sort(key=Waiting.charged_rows)
        joining = []
        for each in others:
            if each.rows and each.rows.count <= room:
                joining.append(each)
                room -= each.rows.count
                self._served(each)
        return joining
