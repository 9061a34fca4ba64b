"""Mask keys, a ledger that never gives a row twice, and masks that hide one input."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tsqp.enclave.masks import Mask, MaskKey, MaskLedger, MaskRows
from tsqp.errors import ExactnessError, MaskReuseError


def test_other_keys_give_other_rows() -> None:
    first, second = MaskKey(), MaskKey()
    assert not torch.equal(first.rows(0, 0, 1, 64), second.rows(0, 0, 1, 64))
    assert torch.equal(first.rows(0, 0, 1, 64), first.rows(0, 0, 1, 64))


def test_bits_are_balanced() -> None:
    words = MaskKey().rows(1, 0, 64, 1024)
    for bit in range(32):
        assert float(((words >> bit) & 1).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_a_key_is_neither_shown_nor_pickled() -> None:
    key = MaskKey()
    assert repr(key) == "MaskKey(not shown)"
    with pytest.raises(MaskReuseError, match="must not leave its process"):
        pickle.dumps(key)


def test_rows_are_burnt_upwards_per_group() -> None:
    ledger = MaskLedger()
    assert [ledger.take(0, 3), ledger.take(1, 2), ledger.take(0, 4), ledger.take(0, 0), ledger.take(0, 1)] == [
        0,
        0,
        3,
        7,
        7,
    ]


def test_concurrent_requests_never_share_a_row() -> None:
    ledger = MaskLedger()
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda count: (ledger.take(0, count), count), [1, 2, 3, 5] * 500))
    rows = [row for first, count in taken for row in range(first, first + count)]
    assert sorted(rows) == list(range(sum(count for _, count in taken)))


def test_a_ledger_refuses_rather_than_start_again() -> None:
    ledger = MaskLedger()
    ledger.take(0, (1 << 62) - 2)
    assert ledger.take(0, 1) == (1 << 62) - 2
    with pytest.raises(MaskReuseError, match="used up"):
        ledger.take(0, 2)
    with pytest.raises(MaskReuseError, match="-1 mask rows"):
        ledger.take(0, -1)


def _take_in_a_fork(ledger: MaskLedger, writer: int) -> None:
    try:
        ledger.take(0, 1)
        os.write(writer, b"taken")
    except MaskReuseError as error:
        os.write(writer, str(error).encode())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_cannot_use_its_parents_rows() -> None:
    ledger = MaskLedger()
    reader, writer = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=_take_in_a_fork, args=(ledger, writer))
    child.start()
    child.join()
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert b"fork of the one that holds the mask ledger" in pipe.read()
    assert ledger.take(0, 1) == 0


def mask(rows: tuple[int, ...] = (2, 3)) -> Mask:
    """A mask over parts that are not consecutive; its words are the row numbers, its products minus one."""
    parts, first = [], 0
    for count in rows:
        parts.append(MaskRows(first, torch.full((count, 2), -1, dtype=torch.int32)))
        first += 10 * count
    return Mask(parts, lambda at, count: torch.arange(at, at + count, dtype=torch.int32)[:, None].expand(count, 4))


def test_a_mask_adds_each_parts_words_and_gives_each_parts_products() -> None:
    used = mask()
    hidden = used.add(torch.full((5, 4), (1 << 31) - 1, dtype=torch.int32))
    low = -(1 << 31)
    assert hidden[:, 0].tolist() == [(1 << 31) - 1, low, low + 19, low + 20, low + 21]
    assert torch.equal(torch.cat(used.products()), torch.full((5, 2), -1, dtype=torch.int32))


def test_a_mask_is_taken_off_once_and_only_after_it_was_put_on() -> None:
    used = mask()
    with pytest.raises(MaskReuseError, match="hides nothing"):
        used.products()
    used.add(torch.zeros(5, 4, dtype=torch.int32))
    used.products()
    with pytest.raises(MaskReuseError, match="a second time"):
        used.products()


def test_a_mask_hides_one_input() -> None:
    used = mask()
    used.add(torch.zeros(5, 4, dtype=torch.int32))
    with pytest.raises(MaskReuseError, match="a second input"):
        used.add(torch.zeros(5, 4, dtype=torch.int32))


def test_a_mask_of_another_size_hides_nothing_and_is_burnt() -> None:
    used = mask()
    with pytest.raises(ExactnessError, match="5 rows cannot hide 4"):
        used.add(torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(MaskReuseError):
        used.add(torch.zeros(5, 4, dtype=torch.int32))


@pytest.mark.parametrize("secret", [mask(), MaskRows(0, torch.zeros(1, 1, dtype=torch.int32))])
def test_masks_and_their_products_do_not_leave(secret: object) -> None:
    with pytest.raises(MaskReuseError, match="must not leave"):
        pickle.dumps(secret)
    with pytest.raises(MaskReuseError):
        copy.deepcopy(secret)
    assert "tensor" not in repr(secret)
