"""The broken schemes are what they are said to be: the enclave gets the product back."""

from __future__ import annotations

import pytest
import torch
from audit_cases import generator

from tsqp.audit import schemes
from tsqp.audit.schemes import Blinded

X_TK = torch.randn(20, 48, generator=generator(1))
W_NK = torch.randn(30, 48, generator=generator(2))


@pytest.mark.parametrize(
    "blinded",
    [
        schemes.rank_one_secrets(20, generator(0)).blind(X_TK),
        schemes.left_mixing(X_TK, generator(0)),
        schemes.permutation(X_TK, generator(0)),
        schemes.gaussian_mask(X_TK, 10.0, generator(0)).blind(X_TK, W_NK),
    ],
    ids=["rank-one", "left-mixing", "permutation", "reused-masks"],
)
def test_the_enclave_gets_its_product_back(blinded: Blinded) -> None:
    wanted_TN = X_TK @ W_NK.T
    error = (blinded.undo(blinded.sent @ W_NK.T) - wanted_TN).abs().max() / wanted_TN.abs().max()
    # float32 rounding, 6e-8, times the condition of what is undone, some 1e3 for the random matrices here.
    assert error < 1e-3
    assert not torch.equal(blinded.sent[:20], X_TK)


def test_left_mixing_adds_a_tenth_of_shield_rows() -> None:
    assert len(schemes.left_mixing(X_TK, generator(0)).sent) == 22


def test_scaled_queries_and_keys_give_the_same_scores() -> None:
    q_TNH, k_TNH = (torch.randn(7, 3, 8, generator=generator(seed)) for seed in (3, 4))
    q2_TNH, k2_TNH = schemes.qk_scaling(q_TNH, k_TNH, generator(0))
    scores = torch.einsum("tnh,snh->nts", q_TNH, k_TNH)
    again = torch.einsum("tnh,snh->nts", q2_TNH, k2_TNH)
    assert torch.allclose(scores, again, atol=1e-4)
    assert not torch.allclose(q_TNH, q2_TNH, atol=0.1)
