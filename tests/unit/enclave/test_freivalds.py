"""Checking products: inner products mod 2^61 - 1 against Python integers, and every kind of wrong row."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsqp.arith import ring
from tsqp.enclave import freivalds
from tsqp.enclave.freivalds import Checker, FieldVector, Q
from tsqp.errors import ExactnessError, IntegrityError

PEERS = ("worker.example:50051", "dealer.example:50052")


def seeded(seed: int) -> freivalds.RandomBytes:
    return random.Random(seed).randbytes


def dot(row: Sequence[int], values: Sequence[int]) -> int:
    return sum(map(int.__mul__, row, values)) % Q


@settings(deadline=None)
@given(st.data(), st.integers(1, 30))
def test_inner_products_are_those_of_integers(data: st.DataObject, length: int) -> None:
    words = st.integers(-(1 << 31), (1 << 31) - 1) | st.sampled_from((-(1 << 31), (1 << 31) - 1))
    values = data.draw(st.lists(st.integers(0, Q - 1) | st.just(Q - 1), min_size=length, max_size=length))
    rows = data.draw(st.lists(st.lists(words, min_size=length, max_size=length), min_size=1, max_size=4))
    vector = FieldVector(torch.tensor(values, dtype=torch.int64))
    assert vector.dot(torch.tensor(rows, dtype=torch.int32), 31).tolist() == [dot(row, values) for row in rows]


@pytest.mark.parametrize("word", [-(1 << 31), (1 << 31) - 1])
@pytest.mark.parametrize("length", [1 << 10, (1 << 10) + 1, 128256])
def test_the_largest_sums_stay_exact(word: int, length: int) -> None:
    vector = FieldVector(torch.full((length,), Q - 1, dtype=torch.int64))
    row = torch.full((1, length), word, dtype=torch.int32)
    assert vector.dot(row, 31).tolist() == [word * (Q - 1) * length % Q]


def test_rows_too_long_to_sum_are_refused() -> None:
    with pytest.raises(ExactnessError, match="cannot be summed exactly"):
        FieldVector(torch.zeros(4, dtype=torch.int64)).dot(torch.zeros(1, 4), 51)


def test_draws_cover_the_field_and_skip_q() -> None:
    words = [Q, (1 << 64) - 1, 5, (1 << 61) | 7, Q - 1]
    stream = iter(words + words)

    def scripted(size: int) -> bytes:
        return b"".join(next(stream).to_bytes(8, "little") for _ in range(size // 8))

    assert freivalds.draw(3, scripted)._values_N.tolist()[:1] == [5]
    assert freivalds.draw(0, scripted)._values_N.tolist() == []
    drawn = freivalds.draw(1000)._values_N
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < Q
    assert float(drawn.double().mean() / Q) == pytest.approx(0.5, abs=0.1)
    assert len(set(drawn.tolist())) == 1000


@pytest.fixture
def product() -> tuple[Checker, Tensor, Tensor, Tensor]:
    """A checker, xq, the codes, and the true product, all within the centred range."""
    generator = torch.Generator().manual_seed(4)
    codes_NK = torch.randint(-127, 128, (48, 40), generator=generator).to(torch.int8)
    xq_MK = torch.randint(-10000, 10000, (7, 40), generator=generator).to(torch.int32)
    return Checker("layers.3.down", codes_NK, seeded(5)), xq_MK, codes_NK, ring.multiply(xq_MK, codes_NK)


def test_true_products_pass(product: tuple[Checker, Tensor, Tensor, Tensor]) -> None:
    checker, xq_MK, _, y_MN = product
    checker.check(y_MN, xq_MK, PEERS)
    checker.check(y_MN[:1], xq_MK[:1], PEERS)
    checker.check(y_MN[:0], xq_MK[:0], PEERS)


@pytest.mark.parametrize("delta", [1, -1, 2, 1 << 16, -(1 << 31), (1 << 31) - 1, (1 << 32) - 1 - (1 << 32)])
@pytest.mark.parametrize("where", [(0, 0), (6, 47), (3, 20)])
def test_one_wrong_word_is_found(
    product: tuple[Checker, Tensor, Tensor, Tensor], delta: int, where: tuple[int, int]
) -> None:
    checker, xq_MK, _, y_MN = product
    y_MN[where] += delta
    with pytest.raises(IntegrityError, match=r"layers\.3\.down: 1 of 7 rows.*worker\.example:50051, dealer\.example"):
        checker.check(y_MN, xq_MK, PEERS)


def test_errors_that_cancel_between_rows_are_found(product: tuple[Checker, Tensor, Tensor, Tensor]) -> None:
    checker, xq_MK, _, y_MN = product
    y_MN[0, 5] += 9
    y_MN[1, 5] -= 9
    with pytest.raises(IntegrityError, match="2 of 7 rows"):
        checker.check(y_MN, xq_MK, PEERS)


def test_swapped_rows_and_other_codes_are_found(product: tuple[Checker, Tensor, Tensor, Tensor]) -> None:
    checker, xq_MK, codes_NK, y_MN = product
    with pytest.raises(IntegrityError):
        checker.check(y_MN.flip(0), xq_MK, PEERS)
    codes_NK[11, 13] += 1 if codes_NK[11, 13] < 127 else -1
    with pytest.raises(IntegrityError):
        checker.check(ring.multiply(xq_MK, codes_NK), xq_MK, PEERS)


def test_the_secret_is_not_shown(product: tuple[Checker, Tensor, Tensor, Tensor]) -> None:
    checker = product[0]
    shown = repr(checker) + repr(checker._s)
    assert not any(str(value) in shown for value in checker._s._values_N.tolist())


def test_large_codes_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    codes_NK = torch.randint(-127, 128, (9, 50), generator=torch.Generator().manual_seed(6)).to(torch.int8)
    whole = Checker("head", codes_NK, seeded(7))
    monkeypatch.setattr(freivalds, "_WIDENED", 64)
    assert torch.equal(Checker("head", codes_NK, seeded(7))._c._values_N, whole._c._values_N)
    assert whole._c._values_N.tolist() == [dot(column, whole._s._values_N.tolist()) for column in codes_NK.T.tolist()]
