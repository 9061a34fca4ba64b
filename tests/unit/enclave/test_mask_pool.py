"""The pool: right products for every row, each row once, within its memory, refilled while nothing runs."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tsqp.arith import ring
from tsqp.enclave.mask_pool import MaskPool, check_pool_fits, largest_pool, peak_bytes, pool_bytes, pool_rows
from tsqp.enclave.mask_refill import IdleRefill
from tsqp.enclave.mask_sources import EnclaveMasks, SummedMasks
from tsqp.enclave.masks import Mask, MaskLedger
from tsqp.errors import (
    ConfigError,
    IntegrityError,
    InternalError,
    MaskReuseError,
    ProtocolError,
    TransportClosedError,
)
from tsqp.meter import Meter
from tsqp.model.architecture import LinearGroup

GROUPS = (
    LinearGroup("layers.0.qkv", ("q",), 12, (20,), bias=False),
    LinearGroup("layers.0.o", ("o",), 20, (12,), bias=False),
    LinearGroup("head", ("lm_head",), 12, (33,), bias=False),
)
CODES = {
    group.name: torch.randint(
        -127, 128, (group.rows, group.in_features), generator=torch.Generator().manual_seed(index)
    ).to(torch.int8)
    for index, group in enumerate(GROUPS)
}
LIMIT = 1 << 20


class Spy:
    """A mask source that notes which rows it was asked for, and may belong to dealers."""

    def __init__(self, peers: tuple[str, ...] = ()) -> None:
        self.peers = peers
        self.started: list[tuple[str, int, int]] = []
        self.error: Exception | None = None
        self._source = EnclaveMasks(GROUPS, {name: ring.lay_out(codes_NK) for name, codes_NK in CODES.items()}, 1)

    def rows(self, group: str, first: int, count: int) -> Tensor:
        return self._source.rows(group, first, count)

    def start(self, group: str, first: int, count: int) -> Callable[[], Tensor]:
        if self.error:
            raise self.error
        self.started.append((group, first, count))
        return self._source.start(group, first, count)


def make(rows: int = 0, source: Spy | None = None, limit: int = LIMIT) -> tuple[MaskPool, Spy, Meter]:
    source, meter = source or Spy(), Meter()
    return MaskPool(GROUPS, source, MaskLedger(), rows, limit, meter), source, meter


def fill(pool: MaskPool) -> None:
    while not pool.is_full:
        pool.fill_step()


def assert_hides(mask: Mask, group: str) -> None:
    """Mask, multiply as a worker would, unmask: the product of the hidden integers must come out."""
    codes_NK = CODES[group]
    xq_MK = torch.randint(-1000, 1000, (mask.count, codes_NK.shape[1])).int()
    xm_MK = mask.add(xq_MK)
    assert not torch.equal(xm_MK, xq_MK)
    codes = ring.lay_out(codes_NK)
    y_MN = ring.multiply(xm_MK, codes) - torch.cat(mask.products())
    assert torch.equal(y_MN, ring.multiply(xq_MK, codes))


@pytest.mark.parametrize("rows", [0, 5, 40])
@pytest.mark.parametrize("peers", [(), ("dealer a",)])
def test_masks_from_pool_and_from_need_hide_and_reveal(rows: int, peers: tuple[str, ...]) -> None:
    pool, _, meter = make(rows, Spy(peers))
    fill(pool)
    for count in (1, 7, 33, 2):
        for group in GROUPS:
            assert_hides(pool.take(group.name, count), group.name)
    assert meter.mask_rows == 3 * (1 + 7 + 33 + 2)


def test_no_row_is_given_twice_whatever_is_asked_for() -> None:
    pool, source, _ = make(6)
    masks = []
    for count in (3, 10, 1, 6, 2, 25):
        pool.fill_step()
        masks += [pool.take("layers.0.qkv", count)]
        fill(pool)
    rows = [row for mask in masks for part in mask._rows for row in range(part.first, part.first + len(part.u_MN))]
    assert len(rows) == len(set(rows)) == 47
    asked = [
        row for name, first, count in source.started if name == "layers.0.qkv" for row in range(first, first + count)
    ]
    assert sorted(asked) == list(range(len(asked)))


def test_concurrent_requests_get_different_rows() -> None:
    pool, _, _ = make(16)
    taken: list[int] = []
    lock = threading.Lock()

    def request(count: int) -> None:
        mask = pool.take("layers.0.o", count)
        pool.fill_step()
        with lock:
            taken.extend(row for part in mask._rows for row in range(part.first, part.first + len(part.u_MN)))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(request, [1, 2, 3, 5] * 50))
    assert len(taken) == len(set(taken)) == 11 * 50


def test_a_full_pool_holds_what_was_asked_for_and_waits_for_nothing() -> None:
    pool, source, meter = make(32)
    fill(pool)
    assert pool_rows(GROUPS, 32) == {"layers.0.qkv": 32, "layers.0.o": 32, "head": 2}
    assert pool.held == pool.wanted == 66
    before = list(source.started)
    pool.take("layers.0.qkv", 32)
    pool.take("head", 2)
    assert source.started == before
    assert meter.mask_wait_ns == 0
    pool.take("head", 1)
    assert meter.mask_wait_ns > 0


def test_a_pool_for_generation_keeps_a_row_of_the_head_for_each_token() -> None:
    room = peak_bytes(GROUPS, 32, 32)
    pool, source, meter = make(32, limit=room)
    with pytest.raises(ConfigError, match="a mask pool of 32 rows with 33 of the head takes"):
        pool.resize(32, 33, room)
    fill(pool)
    pool.resize(32, 32, room)
    assert not pool.is_full
    fill(pool)
    assert pool.held == pool.wanted == 96
    before = list(source.started)
    pool.take("head", 32)
    assert source.started == before
    assert meter.mask_wait_ns == 0


def test_a_pool_that_shrinks_throws_away_what_it_may_not_hold_and_never_uses_it() -> None:
    pool, source, _ = make(32)
    fill(pool)
    pool.resize(8, 3, peak_bytes(GROUPS, 8, 3))
    assert pool.held == 8 + 8 + 2  # it held two of the head, and makes one more
    held = sum(part.u_MN.untyped_storage().nbytes() for parts in pool._ready.values() for part in parts)
    assert held <= peak_bytes(GROUPS, 8, 3)
    fill(pool)
    assert pool.held == pool.wanted == 19
    before = list(source.started)
    first = [part.first for part in pool.take("layers.0.qkv", 8)._rows]
    assert first == [0]
    assert source.started == before
    pool.take("layers.0.qkv", 1)
    assert source.started[-1] == ("layers.0.qkv", 32, 1)


def test_dealers_are_asked_ahead_for_the_forward_pass_but_not_for_the_head() -> None:
    pool, source, _ = make(0, Spy(("dealer a",)))
    pool.take("layers.0.qkv", 9)
    assert source.started == [("layers.0.qkv", 0, 9), ("layers.0.o", 0, 9)]
    pool.take("layers.0.o", 9)
    assert source.started[2:] == []


def test_the_memory_a_pool_takes_is_bounded() -> None:
    rows = 100
    needed = peak_bytes(GROUPS, rows)
    assert needed == 4 * (150 * 20 + 150 * 12 + 10 * 33)
    pool, _, _ = make(rows, limit=needed)
    fill(pool)
    held = sum(part.u_MN.nbytes for parts in pool._ready.values() for part in parts)
    assert held == pool_bytes(GROUPS, rows) == 4 * (100 * 20 + 100 * 12 + 7 * 33)
    with pytest.raises(
        ConfigError, match=r"a mask pool of 100 rows takes 0.0 MB.*Lower --mask-pool or raise --mask-memory"
    ):
        make(rows, limit=needed - 1)
    with pytest.raises(ConfigError, match=r"about [45][0-9] rows"):
        check_pool_fits(GROUPS, rows, peak_bytes(GROUPS, rows) // 2 + 8)


@pytest.mark.parametrize("count", [1, 3, 40, 100])
def test_a_pool_in_use_stays_within_its_peak(count: int) -> None:
    pool, _, _ = make(200, limit=LIMIT * 4)
    for _ in range(60):
        fill(pool)
        stored = {
            part.u_MN.untyped_storage().data_ptr(): part.u_MN.untyped_storage().nbytes()
            for parts in pool._ready.values()
            for part in parts
        }
        assert sum(stored.values()) <= peak_bytes(GROUPS, 200)
        for group in GROUPS[:2]:
            pool.take(group.name, count)


def test_a_pool_cannot_be_stored() -> None:
    pool, _, _ = make(4)
    for store in (pickle.dumps, copy.deepcopy):
        with pytest.raises(MaskReuseError, match="lives in memory only"):
            store(pool)


def _take_in_a_fork(pool: MaskPool, writer: int) -> None:
    try:
        pool.take("head", 1)
        os.write(writer, b"taken")
    except MaskReuseError as error:
        os.write(writer, str(error).encode())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_cannot_use_what_its_parent_has_ready() -> None:
    pool, _, _ = make(32)
    fill(pool)
    reader, writer = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=_take_in_a_fork, args=(pool, writer))
    child.start()
    child.join()
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert b"fork of the one that holds the mask ledger" in pipe.read()


def test_what_a_liar_contributed_to_is_thrown_away() -> None:
    pool, _, _ = make(8)
    fill(pool)
    pool.distrust("the worker lied")
    assert pool.held == 0
    assert_hides(pool.take("head", 2), "head")


def test_dealers_that_may_have_lied_are_asked_for_nothing_more() -> None:
    pool, source, _ = make(8, Spy(("dealer a",)))
    fill(pool)
    pool.distrust("a row was wrong")
    before = list(source.started)
    for use in (pool.fill_step, lambda: pool.take("head", 1), pool.check_trusted):
        with pytest.raises(IntegrityError, match="out of use since a wrong product: a row was wrong"):
            use()
    assert source.started == before
    assert pool.held == 0


def test_masks_of_several_dealers_add_up() -> None:
    source = SummedMasks([Spy(("dealer a",)), Spy(("dealer b",))])
    assert source.peers == ("dealer a", "dealer b")
    pool = MaskPool(GROUPS, source, MaskLedger(), 0, LIMIT, Meter())
    assert_hides(pool.take("layers.0.o", 4), "layers.0.o")
    parts = [part.rows("head", 0, 1) for part in source._sources]
    assert torch.equal(source.rows("head", 0, 1), parts[0] + parts[1])
    assert not torch.equal(*parts)


@pytest.fixture
def refilled() -> object:
    pool, source, meter = make(64)
    refill = IdleRefill(pool, 1, meter)
    yield pool, source, refill, meter
    refill.close()


def test_the_pool_refills_when_nothing_runs_and_not_before(refilled: tuple[MaskPool, Spy, IdleRefill, Meter]) -> None:
    pool, source, refill, meter = refilled
    progress: list[float] = []
    refill.wait_until_full(progress.append)
    assert progress[-1] == 1.0
    assert pool.is_full
    assert meter.mask_fill_ns > 0
    with refill.paused(), refill.paused():
        pool.take("layers.0.qkv", 64)
        started = len(source.started)
        assert not pool.is_full
    refill.wait_until_full()
    assert pool.is_full
    assert len(source.started) > started


def test_nothing_is_filled_while_a_request_runs() -> None:
    pool, source, meter = make(64)
    refill = IdleRefill(pool, 1, meter)
    refill.wait_until_full()
    with refill.paused():
        pool.take("layers.0.qkv", 64)
        before = len(source.started)
        with refill._changed:
            refill._changed.notify_all()
        threading.Event().wait(0.2)
        assert len(source.started) == before
    refill.close()
    assert not refill._thread.is_alive()


def test_filling_goes_on_after_a_link_has_failed() -> None:
    pool, source, meter = make(64)
    source.error = TransportClosedError("the dealer is gone")
    refill = IdleRefill(pool, 1, meter)
    with pytest.raises(TransportClosedError):
        refill.wait_until_full()
    source.error = None
    refill.wait_until_full()
    assert pool.is_full
    refill.close()


def test_filling_goes_on_after_a_step_although_nobody_waited_for_the_pool() -> None:
    """An engine never waits for a full pool: a link that failed once must not leave it empty for ever."""
    pool, source, meter = make(64)
    source.error = TransportClosedError("the dealer is gone")
    refill = IdleRefill(pool, 1, meter)
    _until(lambda: refill._failure is not None)
    source.error = None
    with refill.paused():
        assert pool.held == 0
    _until(lambda: pool.is_full)
    refill.close()


def test_what_a_dealer_must_not_send_while_the_pool_is_filled_ends_the_next_step() -> None:
    pool, source, meter = make(64)
    source.error = ProtocolError("no message")
    refill = IdleRefill(pool, 1, meter)
    _until(lambda: refill._failure is not None)
    for _ in range(2):
        with pytest.raises(ProtocolError, match="no message"), refill.paused():
            raise AssertionError("a step was computed with masks of a dealer that lied")
    refill.close()


def _until(holds: Callable[[], bool]) -> None:
    for _ in range(6000):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to be in time")


def test_the_largest_pool_fits_and_one_much_larger_does_not() -> None:
    for limit in (0, 1000, 100_000, 12_345_678):
        rows = largest_pool(GROUPS, limit)
        assert peak_bytes(GROUPS, rows) <= limit
        assert peak_bytes(GROUPS, rows + rows // 16 + 2) > limit


@pytest.mark.parametrize(
    ("error", "kind"),
    [(TransportClosedError("the dealer is gone"), TransportClosedError), (ValueError("a bug"), InternalError)],
)
def test_a_failure_while_filling_reaches_who_waits(error: Exception, kind: type[Exception]) -> None:
    pool, source, meter = make(64)
    source.error = error
    refill = IdleRefill(pool, 1, meter)
    with pytest.raises(kind):
        refill.wait_until_full()
    refill.close()
