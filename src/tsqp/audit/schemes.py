"""BROKEN: obfuscations that people publish, written down so that the audit can break them. Nothing else uses them.

Each hides layer inputs X (T, K) from a worker that multiplies by public weights W, and lets the enclave undo it: a
``Blinded`` carries what is sent and how the enclave gets X W back. docs/audit.md says how each is broken.

Shapes: T tokens, S shield rows, M = T + S rows sent, K inputs, N outputs or heads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SHIELD_FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class Blinded:
    """What a scheme sends, and the function that turns the worker's product of it, (M, N), into X W, (T, N)."""

    sent: Tensor
    undo: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class RankOneSecrets:
    """BROKEN. M = D + a b', kept for a whole run: M X is sent, the enclave inverts M by Sherman and Morrison (1950).

    Attributes:
        diagonal_T: D's entries.
        a_T: left vector.
        b_T: right vector.
    """

    diagonal_T: Tensor
    a_T: Tensor
    b_T: Tensor

    def blind(self, x_TK: Tensor) -> Blinded:
        """Send (D + a b') X, float32."""
        sent = self.diagonal_T[:, None] * x_TK + self.a_T[:, None] * (self.b_T @ x_TK)
        return Blinded(sent, self._unblind)

    def _unblind(self, y_TN: Tensor) -> Tensor:
        scaled_TN = y_TN / self.diagonal_T[:, None]
        a_T = self.a_T / self.diagonal_T
        return scaled_TN - a_T[:, None] * (self.b_T @ scaled_TN) / (1 + self.b_T @ a_T)


def rank_one_secrets(tokens: int, generator: torch.Generator) -> RankOneSecrets:
    """Draw D in [0.5, 2] with random signs, and Gaussian a and b."""
    sign_T = torch.randint(2, (tokens,), generator=generator) * 2.0 - 1
    diagonal_T = sign_T * (0.5 + 1.5 * torch.rand(tokens, generator=generator))
    a_T, b_T = (torch.randn(tokens, generator=generator) for _ in range(2))
    return RankOneSecrets(diagonal_T, a_T, b_T)


def left_mixing(x_TK: Tensor, generator: torch.Generator, shield: float = SHIELD_FRACTION) -> Blinded:
    """BROKEN. Send A [X; S]: Gaussian shield rows of the activations' scale, mixed by a Gaussian A, all drawn afresh.

    Args:
        x_TK: float32 activations.
        generator: randomness.
        shield: shield rows as a part of T, rounded up.
    """
    tokens = len(x_TK)
    shields = math.ceil(shield * tokens)
    s_SK = torch.randn(shields, x_TK.shape[1], generator=generator) * x_TK.std()
    mixer_MM = torch.randn(tokens + shields, tokens + shields, generator=generator)

    def undo(y_MN: Tensor) -> Tensor:
        unmixed_MN: Tensor = torch.linalg.solve(mixer_MM.double(), y_MN.double())
        return unmixed_MN[:tokens].float()

    return Blinded(mixer_MM @ torch.cat((x_TK, s_SK)), undo)


def permutation(x_TK: Tensor, generator: torch.Generator) -> Blinded:
    """BROKEN. Send the rows in a random order, drawn afresh."""
    order_T = torch.randperm(len(x_TK), generator=generator)
    return Blinded(x_TK[order_T], lambda y_TN: y_TN[order_T.argsort()])


@dataclass(frozen=True, slots=True)
class ReusedMask:
    """BROKEN. X + R with Gaussian R, used for more than one prompt because R W is costly.

    Attributes:
        mask_TK: R.
    """

    mask_TK: Tensor

    def blind(self, x_TK: Tensor, weight_NK: Tensor) -> Blinded:
        """Send X + R; the enclave subtracts R W^T, computed once."""
        product_TN = self.mask_TK @ weight_NK.T
        return Blinded(x_TK + self.mask_TK, lambda y_TN: y_TN - product_TN)


def gaussian_mask(x_TK: Tensor, scale: float, generator: torch.Generator) -> ReusedMask:
    """Draw R for activations of a shape, with a standard deviation of ``scale``."""
    return ReusedMask(scale * torch.randn(x_TK.shape, generator=generator))


def qk_scaling(q_TNH: Tensor, k_TNH: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BROKEN. Send q D and k D^-1, D diagonal per head with random signs, drawn afresh: q k^T comes out right.

    Args:
        q_TNH: queries.
        k_TNH: keys, repeated for every query head.
        generator: randomness.
    """
    shape = q_TNH.shape[1:]
    sign_NH = torch.randint(2, shape, generator=generator) * 2.0 - 1
    scale_NH = sign_NH * torch.randn(shape, generator=generator).exp()
    return q_TNH * scale_NH, k_TNH / scale_NH
