"""Who a worker serves: what each client may make it hold, and how clients share it.

A client is a connection. What it holds is the requests that it has no reply to, with their replies, and the replies
that it has not read. At a limit its messages are left unread where the transport can do that for one client (shared
memory), else refused with a failure that asks it to send them again (docs/decisions/0018).

Clients share the worker by rows. A client is charged the rows that are multiplied for it, and the one that was charged
least is next. No request counts as less than ``LEAST_ROWS`` rows, and no client is charged more than ``MAX_LEAD_ROWS``
beyond the one that is served. So while a client waits each other one leads at most ``MAX_LEAD_ROWS / LEAST_ROWS + 1``
products, however many requests it has and however long they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec import Struct

from tsqp.errors import BusyError
from tsqp.transport.base import Client

# One row's product takes as long as reading the weights does; so many rows take twice that (docs/performance.md).
LEAST_ROWS = 16
MAX_LEAD_ROWS = 512
# A client that said nothing for so long and holds nothing gives its place to one that comes.
IDLE_S = 60.0


class Limits(Struct, frozen=True):
    """What a worker's clients may make it hold.

    Attributes:
        clients: how many there may be.
        requests: of one client that have no reply.
        size_bytes: of one client's requests and their replies, until it has read them. One more request than fits is
            taken, so that none is too large.
    """

    clients: int = 256
    requests: int = 64
    size_bytes: int = 256 << 20


class Account:
    """What one client holds, and what it has been charged.

    Attributes:
        client: whose it is.
        requests: that have no reply.
        size_bytes: of those, with their replies.
        charged_rows: what it has been charged, on a scale that all clients share.
        heard: when it last sent something, in seconds.
    """

    __slots__ = ("_limits", "charged_rows", "client", "heard", "requests", "size_bytes")

    def __init__(self, client: Client, limits: Limits) -> None:
        self.client = client
        self._limits = limits
        self.requests = self.size_bytes = self.charged_rows = 0
        self.heard = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether it holds nothing."""
        return not (self.requests or self.client.unread_bytes)

    def check_room(self) -> None:
        """Refuse a request of a client that holds what it may.

        Raises:
            BusyError: it does.
        """
        held = self.size_bytes + self.client.unread_bytes
        if self.requests >= self._limits.requests or held >= self._limits.size_bytes:
            raise BusyError(
                f"this client has {self.requests} requests and {held} bytes at the worker; "
                f"{self._limits.requests} requests (--max-client-requests) and {self._limits.size_bytes} bytes "
                "(--max-client-bytes) are allowed. Collect results before sending more."
            )

    def add(self, size_bytes: int) -> None:
        """Take a request in, with its reply of so many bytes together."""
        self._count(1, size_bytes)

    def remove(self, size_bytes: int) -> None:
        """Let go of a request whose reply is about to leave."""
        self._count(-1, -size_bytes)

    def _count(self, requests: int, size_bytes: int) -> None:
        self.requests += requests
        self.size_bytes += size_bytes
        self.client.is_full = self.requests >= self._limits.requests or self.size_bytes >= self._limits.size_bytes


class Clients:
    """All clients of a worker.

    Args:
        limits: what they may make it hold.
        clock: in seconds.

    Attributes:
        refused: how many requests were, at a limit.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._accounts: dict[Client, Account] = {}
        self.refused = 0

    def __len__(self) -> int:
        """Return how many are connected. Any thread may ask, so nothing is changed."""
        return sum(not client.is_gone for client in list(self._accounts))

    def account(self, client: Client) -> Account:
        """Return a client's account; open one for a client that is new.

        Raises:
            BusyError: there are as many clients as there may be.
        """
        account = self._accounts.get(client)
        if account is None:
            self._make_room()
            account = self._accounts[client] = Account(client, self._limits)
        account.heard = self._clock()
        return account

    def _make_room(self) -> None:
        if len(self._accounts) < self._limits.clients:
            return
        self._forget_gone()
        if len(self._accounts) < self._limits.clients:
            return
        quiet = min(
            (each for each in self._accounts.values() if each.is_idle), key=lambda each: each.heard, default=None
        )
        if quiet is None or self._clock() - quiet.heard < IDLE_S:
            raise BusyError(
                f"the worker has {self._limits.clients} clients, as many as it takes (--max-clients): "
                "end another one, or start another worker."
            )
        del self._accounts[quiet.client]

    def _forget_gone(self) -> None:
        for client in [client for client, account in self._accounts.items() if not account.requests and client.is_gone]:
            del self._accounts[client]


class Shares:
    """Who is next: the client that was charged least."""

    def __init__(self) -> None:
        # What the client that was served last had been charged before. No client that waits has been charged less.
        self._level = 0

    def enter(self, account: Account) -> None:
        """Note that a client waits. Time in which it did not is not made up for."""
        account.charged_rows = max(account.charged_rows, self._level)

    def lead(self, account: Account) -> None:
        """Note whose request is served next: the one charged least of all that wait."""
        self._level = max(self._level, account.charged_rows)

    def charge(self, account: Account, rows: int) -> None:
        """Charge a client for rows in a product after ``lead``."""
        charged = account.charged_rows + max(rows, LEAST_ROWS)
        account.charged_rows = min(charged, self._level + MAX_LEAD_ROWS)
