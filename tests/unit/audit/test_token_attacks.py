"""Attacks that name tokens: each succeeds on what it is for, and is at chance on uniform words."""

from __future__ import annotations

import pytest
import torch
from audit_cases import Case, generator
from torch import Tensor

from tsqp.audit import schemes
from tsqp.audit.attacks import permutation, qk_scaling, rank_one, regression, reused_masks, row_space
from tsqp.audit.attacks.nearest import nearest_tokens
from tsqp.audit.findings import chance_limit
from tsqp.audit.public import FIRST_GROUP
from tsqp.audit.scheme_checks import recorded_qk
from tsqp.audit.simulate import uniform_words


def hits(guessed_T: Tensor, case: Case) -> int:
    return int((guessed_T == case.ids_T).sum())


def limit(case: Case) -> int:
    """How many of the tokens independent guesses find: at most this, but for once in a million."""
    return chance_limit(len(case.ids_T), 1 / len(case.public.table))


def words(case: Case, seed: int = 0) -> Tensor:
    return uniform_words(case.x_TK, generator(seed))


def distinct(case: Case) -> set[int]:
    return set(case.ids_T.tolist())


@pytest.mark.parametrize("seed", range(3))
def test_nearest_neighbour_needs_no_scale(tiny: Case, seed: int) -> None:
    scale_T1 = torch.rand(len(tiny.ids_T), 1, generator=generator(seed)) + 0.1
    guess = nearest_tokens(tiny.x_TK * scale_T1, tiny.public.table)
    assert torch.equal(guess.ids_T, tiny.ids_T)
    assert (guess.margin_T > 0).all()
    assert torch.equal(nearest_tokens(tiny.verified.first(FIRST_GROUP), tiny.public.table).ids_T, tiny.ids_T)


@pytest.mark.parametrize("seed", range(3))
def test_nearest_neighbour_finds_nothing_in_uniform_words(tiny: Case, seed: int) -> None:
    assert hits(nearest_tokens(words(tiny, seed), tiny.public.table).ids_T, tiny) <= limit(tiny)
    run = tiny.masked(seed)
    assert hits(nearest_tokens(run.worker.first(FIRST_GROUP), tiny.public.table).ids_T, tiny) <= limit(tiny)


@pytest.mark.parametrize("seed", range(3))
def test_row_space_gives_all_tokens_of_a_mixture_and_no_other(tiny: Case, seed: int) -> None:
    sent = schemes.left_mixing(tiny.x_TK, generator(seed)).sent
    assert set(row_space.member_tokens(sent, tiny.public.table).tolist()) == distinct(tiny)


@pytest.mark.parametrize("seed", range(3))
def test_row_space_of_uniform_words_holds_no_token(tiny: Case, seed: int) -> None:
    assert not len(row_space.member_tokens(words(tiny, seed), tiny.public.table))


def test_a_space_that_is_everything_says_nothing(tiny: Case) -> None:
    sent = schemes.left_mixing(tiny.x_TK, generator(0), shield=2.0).sent
    assert len(sent) > sent.shape[1]
    assert not len(row_space.member_tokens(sent, tiny.public.table))


@pytest.mark.parametrize("seed", range(5))
def test_rank_one_blinding_is_undone_in_order(tiny: Case, seed: int) -> None:
    secrets = schemes.rank_one_secrets(len(tiny.ids_T), generator(seed))
    guessed_T = rank_one.tokens_in_order(secrets.blind(tiny.x_TK).sent, tiny.public.table)
    assert torch.equal(guessed_T, tiny.ids_T)


@pytest.mark.parametrize("seed", range(3))
def test_rank_one_attack_finds_nothing_in_uniform_words(tiny: Case, seed: int) -> None:
    assert (rank_one.tokens_in_order(words(tiny, seed), tiny.public.table) == -1).all()


@pytest.mark.parametrize("seed", range(3))
def test_permuted_rows_are_put_in_order(tiny: Case, seed: int) -> None:
    drawn = generator(seed)
    x_TK = schemes.permutation(tiny.x_TK, drawn).sent
    attended_TK = schemes.permutation(tiny.opened.first("layers.0.o"), drawn).sent
    assert not torch.equal(permutation.tokens_in_any_order(x_TK, tiny.public), tiny.ids_T)
    assert torch.equal(permutation.tokens_in_order(x_TK, attended_TK, tiny.public), tiny.ids_T)


def test_without_attention_rows_the_order_stays_unknown(tiny: Case) -> None:
    x_TK = schemes.permutation(tiny.x_TK, generator(0)).sent
    noise_TK = torch.randn(tiny.opened.first("layers.0.o").shape, generator=generator(1))
    guessed_T = permutation.tokens_in_order(x_TK, noise_TK, tiny.public)
    assert sorted(guessed_T.tolist()) == sorted(tiny.ids_T.tolist())
    assert hits(guessed_T, tiny) < len(tiny.ids_T) // 2


def two_messages(case: Case, *, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Send the prompt and another one under Gaussian masks: the same, or fresh ones."""
    drawn = generator(3)
    other_T = torch.randint(len(case.public.table), case.ids_T.shape, generator=drawn)
    other_TK = case.public.table.vectors_VD[other_T]
    first = schemes.gaussian_mask(case.x_TK, 10.0, drawn)
    second = schemes.gaussian_mask(case.x_TK, 10.0, drawn) if fresh else first
    w_NK = case.public.first_layer.q_weight
    return first.blind(case.x_TK, w_NK).sent, second.blind(other_TK, w_NK).sent, other_T


def test_a_mask_used_twice_gives_both_prompts_away(tiny: Case) -> None:
    ours, theirs, other_T = two_messages(tiny, fresh=False)
    assert torch.equal(reused_masks.with_known_prompt(ours, theirs, other_T, tiny.public.table), tiny.ids_T)
    first_T, second_T = reused_masks.token_pairs(ours, theirs, tiny.public.table)
    differ = tiny.ids_T != other_T
    assert torch.equal(first_T[differ], tiny.ids_T[differ])
    assert torch.equal(second_T[differ], other_T[differ])
    assert (first_T[~differ] == -1).all()


def test_fresh_masks_give_nothing_away(tiny: Case) -> None:
    ours, theirs, other_T = two_messages(tiny, fresh=True)
    assert hits(reused_masks.with_known_prompt(ours, theirs, other_T, tiny.public.table), tiny) <= limit(tiny)
    assert hits(reused_masks.token_pairs(ours, theirs, tiny.public.table)[0], tiny) <= limit(tiny)


@pytest.mark.parametrize("seed", range(3))
def test_scaled_queries_and_keys_name_their_tokens(tiny: Case, seed: int) -> None:
    q_TNH, k_TNH = recorded_qk(tiny.evidence())
    q_TNH, k_TNH = schemes.qk_scaling(q_TNH, k_TNH, generator(seed))
    assert torch.equal(qk_scaling.tokens_in_order(q_TNH, k_TNH, tiny.public), tiny.ids_T)


def test_queries_and_keys_of_noise_name_nothing(tiny: Case) -> None:
    q_TNH, k_TNH = recorded_qk(tiny.evidence())
    drawn = generator(0)
    noise = (torch.randn(q_TNH.shape, generator=drawn), torch.randn(k_TNH.shape, generator=drawn))
    assert hits(qk_scaling.tokens_in_order(*noise, tiny.public), tiny) <= limit(tiny)


def test_regression_reads_deeper_layers_and_not_uniform_words(tiny: Case) -> None:
    attacker = tiny.attacker()
    attacker.train(("layers.1.qkv",))
    ridge, table = attacker.maps["layers.1.qkv"], tiny.public.table
    seen_TK = tiny.opened.first("layers.1.qkv")
    assert hits(regression.recover_tokens(seen_TK, ridge, table).ids_T, tiny) > 2 * limit(tiny)
    noise_TK = uniform_words(seen_TK, generator(0))
    assert hits(regression.recover_tokens(noise_TK, ridge, table).ids_T, tiny) <= limit(tiny)
