"""What clients may make a worker hold, and how they share it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.errors import BusyError
from tsqp.transport.base import Client
from tsqp.worker.clients import IDLE_S, LEAST_ROWS, MAX_LEAD_ROWS, Account, Clients, Limits, Shares


class Reader(Client):
    """A client that has not read so much."""

    def __init__(self) -> None:
        super().__init__()
        self.unread = 0

    @property
    def unread_bytes(self) -> int:
        return self.unread


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_accounts_need_no_torch() -> None:
    program = "import sys, tsqp.worker.clients; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_requests_beyond_the_limit_are_refused_until_one_is_answered() -> None:
    account = Clients(Limits(requests=2)).account(Client())
    for _ in range(2):
        account.check_room()
        account.add(10)
    assert account.client.is_full
    with pytest.raises(BusyError, match=r"has 2 requests and 20 bytes .* 2 requests \(--max-client-requests\)"):
        account.check_room()
    account.remove(10)
    assert not account.client.is_full
    account.check_room()


def test_bytes_are_bounded_and_one_request_of_any_size_is_taken() -> None:
    account = Clients(Limits(size_bytes=100)).account(Client())
    account.check_room()
    account.add(99)
    account.check_room()
    account.add(1 << 40)
    assert account.client.is_full
    with pytest.raises(BusyError, match="--max-client-bytes"):
        account.check_room()
    account.remove(1 << 40)
    assert not account.client.is_full
    account.check_room()


def test_replies_that_are_not_read_count() -> None:
    reader = Reader()
    account = Clients(Limits(size_bytes=100)).account(reader)
    account.add(50)
    reader.unread = 50
    with pytest.raises(BusyError):
        account.check_room()
    reader.unread = 49
    account.check_room()


def test_there_are_at_most_so_many_clients() -> None:
    clients = Clients(Limits(clients=2), Clock())
    first, second = Client(), Client()
    for client in (first, second, first):
        clients.account(client)
    with pytest.raises(BusyError, match=r"has 2 clients, as many as it takes \(--max-clients\)"):
        clients.account(Client())
    assert len(clients) == 2


def test_a_client_that_is_gone_leaves_its_place_once_its_requests_are_done() -> None:
    clients, client = Clients(Limits(clients=1), Clock()), Client()
    account = clients.account(client)
    account.add(1)
    client.end()
    with pytest.raises(BusyError):
        clients.account(Client())
    account.remove(1)
    assert len(clients) == 0
    clients.account(Client())


def test_to_ask_how_many_there_are_changes_nothing() -> None:
    """Prometheus asks on a thread of its own, while the worker's loop goes through the same accounts."""
    clients = Clients(Limits(clients=2))
    gone, here = Client(), Client()
    for client in (gone, here):
        clients.account(client)
    gone.end()
    under_way = iter(clients._accounts)
    assert next(under_way) is gone
    assert len(clients) == 1
    assert next(under_way) is here


@pytest.mark.parametrize("holds", ["nothing", "request", "reply"])
def test_the_quietest_client_that_holds_nothing_gives_its_place_up(holds: str) -> None:
    clock = Clock()
    clients, quiet = Clients(Limits(clients=2), clock), Reader()
    account = clients.account(quiet)
    account.add(holds == "request")
    if holds != "request":
        account.remove(0)
    quiet.unread = int(holds == "reply")
    clock.now = 1.0
    clients.account(Client())
    clock.now = IDLE_S
    if holds != "nothing":
        with pytest.raises(BusyError):
            clients.account(Client())
        return
    clients.account(Client())
    with pytest.raises(BusyError):
        clients.account(Client())
    assert len(clients) == 2


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4000)), max_size=100))
def test_nobody_is_charged_more_than_a_bound_beyond_the_others(served: list[tuple[int, int]]) -> None:
    """Clients that always wait are charged as much as each other, but for one request's rows, up to the bound."""
    shares, accounts = Shares(), [Account(Client(), Limits()) for _ in range(4)]
    for joins, rows in served:
        for account in accounts:
            shares.enter(account)
        leader = min(accounts, key=lambda account: account.charged_rows)
        before = leader.charged_rows
        shares.lead(leader)
        shares.charge(leader, rows)
        assert leader.charged_rows == before + min(max(rows, LEAST_ROWS), MAX_LEAD_ROWS)
        shares.charge(accounts[joins], rows)
        charged = [account.charged_rows for account in accounts]
        assert max(charged) - min(charged) <= MAX_LEAD_ROWS


def test_time_in_which_a_client_did_not_wait_is_not_made_up_for() -> None:
    shares, busy, late = Shares(), Account(Client(), Limits()), Account(Client(), Limits())
    for _ in range(100):
        shares.enter(busy)
        shares.lead(busy)
        shares.charge(busy, 100)
    shares.enter(late)
    assert busy.charged_rows - late.charged_rows == 100
