"""Checking products: inner products mod 2^61 - 1 against Python integers, and every kind of wrong row."""

from __future__ import annotations

import mmap
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsqp.arith import native, ring
from tsqp.arith.native import Scaling
from tsqp.arith.quantize import dequantize
from tsqp.enclave import freivalds
from tsqp.enclave.freivalds import Checker, FieldVector, Q
from tsqp.errors import ExactnessError, IntegrityError
from tsqp.wire.codec import Claim

PEERS = ("worker.example:50051", "dealer.example:50052")


def seeded(seed: int) -> freivalds.RandomBytes:
    return random.Random(seed).randbytes


def dot(row: Sequence[int], values: Sequence[int]) -> int:
    return sum(map(int.__mul__, row, values)) % Q


@pytest.fixture(params=[*native.available(), "twin"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> native.Kernels | None:
    """Run every test with every instruction set of this processor and with the twin."""
    chosen = None if request.param == "twin" else native.Kernels(request.param)
    monkeypatch.setattr(native, "kernels", lambda: chosen)
    return chosen


def residues(vector: FieldVector, rows_MN: Tensor) -> list[int]:
    values: list[int] = vector.dot_words(rows_MN).tolist()
    return values


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.integers(1, 30))
def test_inner_products_are_those_of_integers(data: st.DataObject, length: int) -> None:
    words = st.integers(-(1 << 31), (1 << 31) - 1) | st.sampled_from((-(1 << 31), (1 << 31) - 1))
    values = data.draw(st.lists(st.integers(0, Q - 1) | st.just(Q - 1), min_size=length, max_size=length))
    rows = data.draw(st.lists(st.lists(words, min_size=length, max_size=length), min_size=1, max_size=4))
    codes = data.draw(st.lists(st.lists(st.integers(-128, 127), min_size=length, max_size=length), min_size=1))
    vector = FieldVector(torch.tensor(values, dtype=torch.int64))
    assert residues(vector, torch.tensor(rows, dtype=torch.int32)) == [dot(row, values) for row in rows]
    assert vector.dot_codes(torch.tensor(codes, dtype=torch.int8)).tolist() == [dot(row, values) for row in codes]


@pytest.mark.parametrize("word", [-(1 << 31), (1 << 31) - 1, 0x7F7F7F7F, 0x7F7F7F80, -0x7F7F7F81])
@pytest.mark.parametrize("value", [Q - 1, Q // 2, Q // 2 + 1, 0x7F7F7F7F7F7F7F7F % Q])
@pytest.mark.parametrize("length", [1 << 10, 128256, 262143])
def test_the_largest_sums_stay_exact(word: int, value: int, length: int) -> None:
    vector = FieldVector(torch.full((length,), value, dtype=torch.int64))
    assert residues(vector, torch.full((1, length), word, dtype=torch.int32)) == [word * value * length % Q]


def test_halves_stay_far_below_overflow_at_the_longest_row() -> None:
    longest = 32 * ring.INT8_MAX_K // 4
    vector = FieldVector(torch.full((longest,), Q // 2, dtype=torch.int64))
    halves = vector._halves(torch.full((1, longest), (1 << 31) - 1, dtype=torch.int32))
    assert int(halves.abs().max()) < 1 << 62
    assert residues(vector, torch.full((1, longest), -(1 << 31), dtype=torch.int32)) == [
        -(1 << 31) * (Q // 2) * longest % Q
    ]
    with pytest.raises(ExactnessError, match="cannot be summed exactly"):
        FieldVector(torch.zeros(longest + 1, dtype=torch.int64))


def test_sums_are_the_same_without_an_int8_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randint(-(1 << 31), (1 << 31) - 1, (5, 300), generator=torch.Generator().manual_seed(3)).int()
    fast = FieldVector(freivalds.draw(300, seeded(1))._values_N)._halves(rows)
    monkeypatch.setattr(ring, "_int8_products_are_exact", lambda: False)
    assert torch.equal(FieldVector(freivalds.draw(300, seeded(1))._values_N)._halves(rows), fast)


@pytest.mark.parametrize("length", [1, 7, 16, 33, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 9])
def test_masks_are_taken_off_in_parts(rows: int, length: int) -> None:
    generator = torch.Generator().manual_seed(rows * length)
    words_MN, u_MN = torch.randint(-(1 << 31), 1 << 31, (2, rows, length), generator=generator).int()
    vector, out_MN = freivalds.draw(length, seeded(2)), torch.empty(rows, length, dtype=torch.int32)
    before = words_MN.clone()
    for u in ((), (u_MN,), (u_MN[:2], u_MN[2:])):
        found_M = vector.unmasking(u, out_MN)(words_MN)
        assert torch.equal(out_MN, words_MN - u_MN if u else words_MN)
        assert found_M.tolist() == [dot(row, vector._values_N.tolist()) for row in out_MN.tolist()]
    assert torch.equal(words_MN, before)
    if rows:
        with pytest.raises(ExactnessError, match="rows to check, and masks of"):
            vector.unmasking((u_MN[1:],), out_MN)


@pytest.mark.parametrize("rows", [1, 4, 5, 9])
@pytest.mark.parametrize("biased", [False, True])
def test_what_is_checked_is_scaled_back(rows: int, biased: bool) -> None:  # noqa: FBT001
    generator = torch.Generator().manual_seed(rows)
    words_MN, u_MN = torch.randint(-(1 << 31), 1 << 31, (2, rows, 1030), generator=generator).int()
    scale_N, bias_N = torch.rand(2, 1030, generator=generator)
    scaling = Scaling(torch.rand(rows, 1, dtype=torch.float64), scale_N, bias_N if biased else None)
    vector = freivalds.draw(1030, seeded(2))
    for u in ((u_MN,), (u_MN[:1], u_MN[1:])):
        plain_MN, out_MN = torch.empty(2, rows, 1030, dtype=torch.int32)
        residues_M = vector.unmasking(u, plain_MN)(words_MN)
        assert torch.equal(vector.unmasking(u, out_MN, scaling)(words_MN), residues_M)
        real_MN = dequantize(plain_MN, scaling)
        assert torch.equal(out_MN, real_MN.view(torch.int32))  # the same bits


FLIPPER = """
import mmap, sys
def flip(path, at):
    with open(path, "r+b") as file:
        words = memoryview(mmap.mmap(file.fileno(), 0)).cast("I")
    true, other = words[at], words[at] ^ 1 << 30
    print(flush=True)
    while True:
        words[at] = other
        words[at] = true
flip(sys.argv[1], int(sys.argv[2]))
"""


@contextmanager
def flipped(words_MN: Tensor, at: int, directory: Path) -> Iterator[Tensor]:
    """Yield words in memory in which another process changes one, there and back, all the time."""
    path = directory / "words"
    path.write_bytes(words_MN.numpy().tobytes())
    with path.open("r+b") as file:
        shared = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.int32).view_as(words_MN)
    with subprocess.Popen([sys.executable, "-c", FLIPPER, path, str(at)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"\n"
            yield shared
        finally:
            process.kill()


@pytest.mark.parametrize("scaled", ["integers", "scaled"])
@pytest.mark.parametrize("masks", [(), (7,), (2, 5)])
def test_what_was_checked_is_what_is_returned(masks: tuple[int, ...], scaled: str, tmp_path: Path) -> None:
    """A peer that changes shared words all the time gets an error or a product that is right, and no third thing."""
    generator = torch.Generator().manual_seed(4)
    codes_NK = torch.randint(-127, 128, (1030, 40), generator=generator).to(torch.int8)
    xq_MK = torch.randint(-10000, 10000, (7, 40), generator=generator).to(torch.int32)
    true_MN = ring.multiply(xq_MK, ring.lay_out(codes_NK))
    u = torch.randint(-(1 << 31), 1 << 31, true_MN.shape, generator=generator).int().split(masks) if masks else ()
    scaling = Scaling(torch.rand(7, 1, dtype=torch.float64), torch.rand(1030), None) if scaled == "scaled" else None
    expected_MN = true_MN if scaling is None else dequantize(true_MN, scaling)
    accepted = refused = 0
    with flipped(true_MN + torch.cat(u) if u else true_MN, 3 * 1030 + 5, tmp_path) as shared_MN:
        while min(accepted, refused) < 10:
            checker = checker_of(codes_NK, seed=accepted + refused)
            expectation = checker.expect(xq_MK, u, scaling)
            try:
                y_MN = checker.verified(Claim(shared_MN, ""), expectation, PEERS)
            except IntegrityError:
                refused += 1
            else:
                assert torch.equal(y_MN, expected_MN)
                accepted += 1


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


def checker_of(codes_NK: Tensor, name: str = "layers.3.down", seed: int = 5) -> Checker:
    outputs, inputs = codes_NK.shape
    checker = Checker(name, outputs, inputs, seeded(seed))
    checker.absorb(codes_NK)
    return checker


class Product:
    """A checker, xq, the codes, and the true product, all within the centred range."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.codes_NK = torch.randint(-127, 128, (48, 40), generator=generator).to(torch.int8)
        self.xq_MK = torch.randint(-10000, 10000, (7, 40), generator=generator).to(torch.int32)
        self.y_MN = ring.multiply(self.xq_MK, ring.lay_out(self.codes_NK))
        self.checker = checker_of(self.codes_NK)

    def check(self, rows: slice = slice(None)) -> Tensor:
        claim = Claim(self.y_MN[rows], "a test")
        return self.checker.verified(claim, self.checker.expect(self.xq_MK[rows]), PEERS)


@pytest.fixture
def product() -> Product:
    return Product()


def test_true_products_pass(product: Product) -> None:
    for rows in (slice(None), slice(1), slice(0)):
        assert torch.equal(product.check(rows), product.y_MN[rows])


@pytest.mark.parametrize("delta", [1, -1, 2, 1 << 16, -(1 << 31), (1 << 31) - 1, (1 << 32) - 1 - (1 << 32)])
@pytest.mark.parametrize("where", [(0, 0), (6, 47), (3, 20)])
def test_one_wrong_word_is_found(product: Product, delta: int, where: tuple[int, int]) -> None:
    product.y_MN[where] += delta
    with pytest.raises(IntegrityError, match=r"layers\.3\.down: 1 of 7 rows.*worker\.example:50051, dealer\.example"):
        product.check()


def test_errors_that_cancel_between_rows_are_found(product: Product) -> None:
    product.y_MN[0, 5] += 9
    product.y_MN[1, 5] -= 9
    with pytest.raises(IntegrityError, match="2 of 7 rows"):
        product.check()


def test_swapped_rows_are_found(product: Product) -> None:
    product.y_MN = product.y_MN.flip(0)
    with pytest.raises(IntegrityError):
        product.check()


def test_products_with_other_codes_are_found(product: Product) -> None:
    product.codes_NK[11, 13] += 1 if product.codes_NK[11, 13] < 127 else -1
    product.y_MN = ring.multiply(product.xq_MK, ring.lay_out(product.codes_NK))
    with pytest.raises(IntegrityError):
        product.check()


def test_after_a_failure_nothing_is_accepted(product: Product) -> None:
    true = product.y_MN.clone()
    product.y_MN[2, 2] += 1
    with pytest.raises(IntegrityError):
        product.check()
    product.y_MN = true
    with pytest.raises(IntegrityError, match="a wrong product came before"):
        product.check()


def test_the_secret_is_not_shown_and_does_not_leave(product: Product) -> None:
    shown = repr(product.checker) + repr(product.checker._s)
    assert not any(str(value) in shown for value in product.checker._s._values_N.tolist())
    expectation = product.checker.expect(product.xq_MK)
    assert repr(expectation) == "Expectation(7 rows, not shown)"
    for secret in (product.checker, product.checker._s, expectation):
        with pytest.raises(ExactnessError, match="must not leave"):
            pickle.dumps(secret)


def test_rows_that_were_not_expected_are_refused(product: Product) -> None:
    """One row's expectation must not serve for several."""
    expectation = product.checker.expect(product.xq_MK[:1])
    with pytest.raises(ExactnessError, match=r"a claim of shape \[7, \d+\] to check: expected one, of \[1, "):
        product.checker.verified(Claim(product.y_MN, ""), expectation, PEERS)


def test_masks_come_off_before_the_check(product: Product) -> None:
    u_MN = torch.randint(-(1 << 31), 1 << 31, product.y_MN.shape).int()
    claim = Claim(product.y_MN + u_MN, "")
    expectation = product.checker.expect(product.xq_MK, (u_MN[:3], u_MN[3:]))
    verified = product.checker.verified(claim, expectation, PEERS)
    assert torch.equal(verified, product.y_MN)
    with pytest.raises(IntegrityError, match="7 of 7 rows"):
        product.checker.verified(claim, product.checker.expect(product.xq_MK), PEERS)


def test_an_expectation_serves_once(product: Product) -> None:
    """A second claim would overwrite what the first was found to be, after it was given out."""
    expectation = product.checker.expect(product.xq_MK)
    first = product.checker.verified(Claim(product.y_MN, ""), expectation, PEERS)
    with pytest.raises(ExactnessError, match="expected one"):
        product.checker.verified(Claim(product.y_MN + 1, ""), expectation, PEERS)
    assert torch.equal(first, product.y_MN)


def test_codes_are_absorbed_in_parts_and_completely() -> None:
    codes_NK = torch.randint(-128, 128, (9, 50), generator=torch.Generator().manual_seed(6)).to(torch.int8)
    whole, parts = checker_of(codes_NK, seed=7), Checker("head", 9, 50, seeded(7))
    for rows in codes_NK.split(4):
        with pytest.raises(ExactnessError, match="of 9 rows of codes absorbed"):
            parts.expect(torch.zeros(1, 50, dtype=torch.int32))
        parts.absorb(rows)
    assert torch.equal(parts._c._values_N, whole._c._values_N)
    assert whole._c._values_N.tolist() == [dot(column, whole._s._values_N.tolist()) for column in codes_NK.T.tolist()]
    with pytest.raises(ExactnessError, match="has 9 rows of codes; 10 came"):
        parts.absorb(codes_NK[:1])
