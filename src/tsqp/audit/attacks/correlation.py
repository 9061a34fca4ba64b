"""Do the words depend on the plaintext? Correlates each word, and each of its bits, with the true activation.

Unlike the other attacks this one is told the plaintext: it measures what any attacker could at best find by such means.

Shapes: M words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.audit.attacks.uniformity import BITS, correlation, normal_p_value


@dataclass(frozen=True, slots=True)
class Correlation:
    """The strongest correlation found.

    Attributes:
        largest: absolute value of Pearson's r.
        where: between what.
        p_value: of it, times the number of correlations looked at (Bonferroni).
        limit: 5 / sqrt(n), beyond which independent samples go once in two million.
    """

    largest: float
    where: str
    p_value: float
    limit: float


def strongest(words: Tensor, plain: Tensor) -> Correlation:
    """Correlate words with the activations that they carry.

    Args:
        words: int32, as observed.
        plain: the activations at the same places, scaled per row by any factor.

    Returns:
        The strongest of 33 correlations: of the centred word, and of each bit.
    """
    words_M, plain_M = words.flatten(), _unit_rows(plain).flatten()
    found = {"the word": correlation(words_M, plain_M)}
    for bit in range(BITS):
        found[f"bit {bit}"] = correlation((words_M >> bit) & 1, plain_M)
    where = max(found, key=lambda name: abs(found[name]))
    largest, root = abs(found[where]), math.sqrt(len(words_M))
    return Correlation(largest, where, min(1.0, len(found) * normal_p_value(largest * root)), 5 / root)


def _unit_rows(plain: Tensor) -> Tensor:
    plain = plain.double()
    norm: Tensor = torch.linalg.vector_norm(plain, dim=-1, keepdim=True)
    return plain / norm.clamp_min(torch.finfo(torch.float64).tiny)
