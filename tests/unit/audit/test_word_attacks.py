"""Tests of words: keystream passes, and every kind of defect is found by the test that is for it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from audit_cases import Case, generator
from torch import Tensor

from tsqp.arith.keystream import keystream_rows
from tsqp.audit.attacks import collusion, correlation, mask_reuse, uniformity
from tsqp.audit.attacks.nearest import nearest_tokens
from tsqp.audit.findings import SIGNIFICANCE
from tsqp.audit.public import FIRST_GROUP
from tsqp.audit.recorder import Dealt, Recording
from tsqp.errors import InputError

N = 1 << 16
KEY = bytes(range(32))


def keystream(first: int = 0) -> Tensor:
    return keystream_rows(KEY, 0, first, N // 256, 256).flatten().clone()


def combined(words_M: Tensor, family: str) -> float:
    return uniformity.bonferroni([test.p_value for test in uniformity.word_tests(words_M) if test.family == family])


def test_keystream_passes_every_test() -> None:
    tests = uniformity.word_tests(keystream())
    assert len(tests) == 4 + 32 + 32 + 1
    assert uniformity.bonferroni([test.p_value for test in tests]) > SIGNIFICANCE
    for family in ("byte", "monobit", "runs"):
        assert uniformity.kolmogorov_smirnov([t.p_value for t in tests if t.family == family]) > SIGNIFICANCE


def with_ones(words_M: Tensor) -> Tensor:
    """Set bit 9 of every twentieth word: 52.5 % ones."""
    words_M[::20] |= 1 << 9
    return words_M


def with_echo(words_M: Tensor) -> Tensor:
    """Let bit 30 copy its predecessor in every tenth word: ones stay balanced."""
    bit = (words_M >> 30) & 1
    bit[10::10] = bit[9:-1:10]
    return (words_M & ~(1 << 30)) | (bit << 30)


def with_drift(words_M: Tensor) -> Tensor:
    """Repeat the top byte of every tenth word in the next."""
    top = -(1 << 24)
    words_M[1::10] = (words_M[1::10] & ~top) | (words_M[0:-1:10] & top)
    return words_M


def without_a_byte(words_M: Tensor) -> Tensor:
    """Replace the value 7 of the lowest byte by 8: balanced nearly everywhere, but one bin is empty."""
    words_M[(words_M & 0xFF) == 7] += 1
    return words_M


@pytest.mark.parametrize(
    ("family", "spoil"),
    [("byte", without_a_byte), ("monobit", with_ones), ("runs", with_echo), ("serial", with_drift)],
)
def test_each_defect_is_found(family: str, spoil: Callable[[Tensor], Tensor]) -> None:
    assert combined(keystream(), family) > SIGNIFICANCE
    assert combined(spoil(keystream()), family) < SIGNIFICANCE


def test_monobit_agrees_with_the_published_example() -> None:
    """NIST SP 800-22 rev. 1a, section 2.1.8: the first 100 binary digits of pi."""
    pi = "11001001000011111101101010100010001000010110100011000010001101001100010011000110011000101000101110" + "00"
    assert uniformity.monobit_p_value(torch.tensor([int(bit) for bit in pi])) == pytest.approx(0.109599, abs=1e-6)


def test_chi_square_agrees_with_its_table() -> None:
    """Two bins of 256 are off by 193, or by 194: the 5 % point of 255 degrees of freedom, 293.25, lies between."""
    counts = torch.full((256,), 256)
    p_values = []
    for extra in (193, 194):
        counts[0], counts[1] = 256 + extra, 256 - extra
        words = torch.repeat_interleave(torch.arange(256, dtype=torch.int32), counts)
        p_values.append(uniformity.byte_p_value(words, 0))
        # Wilson and Hilferty 1931: right to some 1e-4 here.
        z = ((2 * extra**2 / 256 / 255) ** (1 / 3) - (1 - 2 / (9 * 255))) / math.sqrt(2 / (9 * 255))
        assert p_values[-1] == pytest.approx(math.erfc(z / math.sqrt(2)) / 2, abs=5e-4)
    assert p_values[0] > 0.05 > p_values[1]


def test_p_values_that_are_not_uniform_are_found() -> None:
    even = [(i + 0.5) / 100 for i in range(100)]
    assert uniformity.kolmogorov_smirnov(even) == pytest.approx(1.0)
    assert uniformity.kolmogorov_smirnov([p**3 for p in even]) < SIGNIFICANCE
    # D = 0.136 of 100 values lies beyond the 5 % point, 0.134, and within the 4 % point, 0.137.
    assert 0.04 < uniformity.kolmogorov_smirnov([p * (1 - 0.131) for p in even]) < 0.06


def test_a_single_leaking_bit_is_found() -> None:
    plain_MK = torch.randn(N // 256, 256, generator=generator(0))
    clean = correlation.strongest(keystream(), plain_MK)
    assert clean.p_value > SIGNIFICANCE
    assert clean.largest < clean.limit
    leaking = keystream().view_as(plain_MK)
    leaking = torch.where((torch.arange(256) % 20 == 0), leaking & ~4 | (plain_MK > 0).int() * 4, leaking)
    found = correlation.strongest(leaking, plain_MK)
    assert (found.where, found.p_value < SIGNIFICANCE, found.largest > found.limit) == ("bit 2", True, True)


def test_reuse_of_masks_is_found(tiny: Case) -> None:
    run = tiny.masked(0)
    first, second = run.worker.tensors(FIRST_GROUP)
    assert mask_reuse.repeated_rows(first, second) == 0
    assert mask_reuse.repeated_rows(first, first[3:5]) == 2
    other = tiny.masked(0, repeats=1).worker.first(FIRST_GROUP)
    assert torch.equal(first, other), "one seed, one mask: what must never happen"
    x_TK = tiny.verified.first(FIRST_GROUP)
    shifted = first - x_TK + x_TK.flip(0)  # the same mask rows over another prompt
    assert mask_reuse.difference_p_value(first, second) > SIGNIFICANCE
    assert mask_reuse.difference_p_value(first, shifted) < SIGNIFICANCE


def test_worker_and_all_dealers_unmask_and_fewer_do_not(tiny: Case) -> None:
    run = tiny.masked(5, dealers=3)
    seen = torch.cat(run.worker.tensors(FIRST_GROUP))
    clear = collusion.unmask(seen, FIRST_GROUP, 0, run.dealers)
    x_TK = tiny.verified.first(FIRST_GROUP)
    assert torch.equal(clear, torch.cat((x_TK, x_TK)))
    for missing in range(3):
        parties = [dealer for index, dealer in enumerate(run.dealers) if index != missing]
        partly = collusion.unmask(seen, FIRST_GROUP, 0, parties)[: len(x_TK)]
        assert int((nearest_tokens(partly, tiny.public.table).ids_T == tiny.ids_T).sum()) <= 5
        assert uniformity.byte_p_value(partly.flatten(), 3) > SIGNIFICANCE


def test_colluders_find_their_place_in_a_pool(tiny: Case) -> None:
    """A pool filled ahead, in pieces and out of order, of which the run used rows 7 and on."""
    x_TK = tiny.verified.first(FIRST_GROUP)
    pool = keystream_rows(KEY, 0, 0, 40, x_TK.shape[1])
    orders = (Dealt(FIRST_GROUP, KEY, 30, 10), Dealt(FIRST_GROUP, KEY, 0, 30), Dealt("head", KEY, 0, 5))
    clear = collusion.unmask(x_TK + pool[7 : 7 + len(x_TK)], FIRST_GROUP, 0, [Recording("dealer 1", (), orders)])
    assert torch.equal(clear, x_TK)


def test_colluders_without_enough_rows_are_told(tiny: Case) -> None:
    few = Recording("dealer 1", (), (Dealt(FIRST_GROUP, KEY, 0, 3),))
    with pytest.raises(InputError, match="asked for 3 mask rows"):
        collusion.unmask(tiny.verified.first(FIRST_GROUP), FIRST_GROUP, 0, [few])
