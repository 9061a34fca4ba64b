"""Token recovery from deeper layers: ridge regression back to layer 0's input, then nearest neighbour.

The attacker runs the public model on token sequences of its own choice, fits a linear map from what a group reads to
what layer 0 read at the same position, and applies it to what it observed (Hoerl and Kennard 1970).

Shapes: M training rows, T positions, K a group's inputs, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.audit.attacks.nearest import Guess, nearest_tokens
from tsqp.audit.public import TokenTable

# Of the mean squared singular value of the training rows.
_RIDGE = 1e-2


@dataclass(frozen=True, slots=True)
class Ridge:
    """A fitted map from rows of unit root mean square to layer-0 vectors: means (K,), (D,) and slope (K, D)."""

    mean_K: Tensor
    mean_D: Tensor
    slope_KD: Tensor

    def apply(self, seen_TK: Tensor) -> Tensor:
        """Map observed rows, of any positive scale each, to estimates of layer-0 vectors, float32 (T, D)."""
        return ((_unit_rows(seen_TK) - self.mean_K) @ self.slope_KD + self.mean_D).float()


def fit(train_MK: Tensor, targets_MD: Tensor, ridge: float = _RIDGE) -> Ridge:
    """Fit a map by ridge regression.

    Args:
        train_MK: a group's inputs for texts of the attacker's.
        targets_MD: layer 0's inputs at the same positions.
        ridge: penalty, as a part of the mean squared singular value.
    """
    x_MK = _unit_rows(train_MK)
    mean_K, mean_D = x_MK.mean(0), targets_MD.double().mean(0)
    x_MK = x_MK - mean_K
    gram_KK = x_MK.T @ x_MK
    penalty = ridge * float(gram_KK.diagonal().mean()) + torch.finfo(torch.float64).tiny
    gram_KK.diagonal().add_(penalty)
    slope_KD = torch.linalg.solve(gram_KK, x_MK.T @ (targets_MD.double() - mean_D))
    return Ridge(mean_K, mean_D, slope_KD)


def recover_tokens(seen_TK: Tensor, ridge: Ridge, table: TokenTable) -> Guess:
    """Return the nearest token of each row's estimate."""
    return nearest_tokens(ridge.apply(seen_TK), table)


def _unit_rows(x_MK: Tensor) -> Tensor:
    """Scale rows to unit root mean square: the levels scale each token by a factor that they keep."""
    x_MK = x_MK.double()
    size_M1 = x_MK.square().mean(dim=1, keepdim=True).sqrt()
    return x_MK / size_M1.clamp_min(torch.finfo(torch.float64).tiny)
