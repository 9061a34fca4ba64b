"""Are the words uniform? Classical tests with p-values; uniform words fail one in as many runs as its level says.

Sums are exact integers; p-values come from the chi-square and normal limits, right to well below the levels used here
once a sample has some ten thousand words. Knuth, The Art of Computer Programming 2, section 3.3; NIST SP 800-22.

Shapes: M words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BITS = 32
_BINS = 256


@dataclass(frozen=True, slots=True)
class Test:
    """One test's p-value: how often uniform words are at least this far from what is expected.

    ``family`` groups tests of one kind, which are independent of each other on uniform words.
    """

    family: str
    name: str
    p_value: float


def word_tests(words: Tensor) -> list[Test]:
    """Run every test on one sample of words.

    Args:
        words: int32, any shape.

    Returns:
        4 chi-square tests (each byte against 256 equal bins), 32 monobit and 32 runs tests (each bit position), and
        one of serial correlation.
    """
    words_M = words.flatten()
    tests = [Test("byte", f"chi-square of byte {byte}", byte_p_value(words_M, byte)) for byte in range(4)]
    for bit in range(BITS):
        bits_M = (words_M >> bit) & 1
        tests.append(Test("monobit", f"ones in bit {bit}", monobit_p_value(bits_M)))
        tests.append(Test("runs", f"runs of bit {bit}", runs_p_value(bits_M)))
    return [*tests, Test("serial", "correlation of neighbours", serial_p_value(words_M))]


def byte_p_value(words_M: Tensor, byte: int) -> float:
    """Chi-square test of one byte of each word (3 is the top one) against 256 equal bins."""
    counts = torch.bincount(((words_M >> (8 * byte)) & 0xFF).long(), minlength=_BINS).double()
    expected = len(words_M) / _BINS
    statistic = ((counts - expected) ** 2).sum() / expected
    half_freedom = torch.tensor((_BINS - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, statistic / 2))


def monobit_p_value(bits_M: Tensor) -> float:
    """Two-sided normal test that half of the bits are ones."""
    n = len(bits_M)
    return normal_p_value((2 * int(bits_M.sum()) - n) / math.sqrt(n))


def runs_p_value(bits_M: Tensor) -> float:
    """Two-sided normal test that neighbouring bits differ half of the time."""
    changes = int((bits_M[1:] != bits_M[:-1]).sum())
    n = len(bits_M) - 1
    return normal_p_value((2 * changes - n) / math.sqrt(n))


def serial_p_value(words_M: Tensor) -> float:
    """Two-sided normal test of the correlation between each word and the next, as centred integers."""
    x_M = words_M.double()
    r = correlation(x_M[:-1], x_M[1:])
    return normal_p_value(r * math.sqrt(len(x_M) - 1))


def correlation(x_M: Tensor, y_M: Tensor) -> float:
    """Pearson's correlation in float64; 0 where one of the two is constant."""
    x_M, y_M = x_M.double() - x_M.double().mean(), y_M.double() - y_M.double().mean()
    size = float(torch.linalg.vector_norm(x_M) * torch.linalg.vector_norm(y_M))
    return float(x_M @ y_M) / size if size else 0.0


def normal_p_value(z: float) -> float:
    """Two-sided p-value of a standard normal deviate."""
    return math.erfc(abs(z) / math.sqrt(2))


def bonferroni(p_values: Sequence[float]) -> float:
    """Combine p-values into one: the smallest times their number, at most 1. Right under any dependence."""
    return min(1.0, min(p_values) * len(p_values))


def kolmogorov_smirnov(p_values: Sequence[float]) -> float:
    """Test that independent p-values are themselves uniform, by Kolmogorov's limit with Stephens' correction (1970)."""
    ordered = sorted(p_values)
    n = len(ordered)
    distance = max(max((i + 1) / n - p, p - i / n) for i, p in enumerate(ordered))
    scaled = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    if scaled < 0.2:  # noqa: PLR2004  the series converges slowly there, and its value is 1 to 12 digits
        return 1.0
    series = math.fsum((-1.0) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * series))
