"""Choosing tokens, against transformers' logits processors and against plain definitions."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, RepetitionPenaltyLogitsProcessor

from tsqp.engine import sampling as under_test
from tsqp.engine.api import LogitsError, Sampling, TokenLogprobs
from tsqp.engine.sampling import Chosen, Sampler, kept_tokens, prompt_logprobs
from tsqp.errors import InternalError

VOCAB = 1000


def random_logits(seed: int, *shape: int, spread: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


# Against transformers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    shape = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    return LlamaForCausalLM(shape)


def theirs(model: Any, sampling: Sampling, history: list[int], logits_V: Tensor) -> Tensor:
    """What transformers' ``generate`` makes of logits, its own order of processors included; float64."""
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        repetition_penalty=sampling.repetition_penalty,
    )
    processors = model._get_logits_processor(config, input_ids_seq_length=len(history), device="cpu")
    scores_V: Tensor = processors(torch.tensor([history]), logits_V[None].double().clone())[0]
    return scores_V.softmax(-1)


def some_sampling(rng: random.Random) -> Sampling:
    return Sampling(
        temperature=rng.choice([0.3, 0.7, 1.0, 1.7]),
        top_k=rng.choice([0, 1, 5, 50, 400, 5000]),
        top_p=rng.choice([0.01, 0.3, 0.9, 0.99, 0.9999, 1.0]),
        min_p=rng.choice([0.0, 0.0, 0.001, 0.05, 0.5, 1.0]),
        repetition_penalty=rng.choice([1.0, 0.6, 1.3]),
    )


@pytest.mark.parametrize("seed", range(80))
def test_probabilities_equal_transformers(model: Any, seed: int) -> None:
    rng = random.Random(seed)
    sampling = some_sampling(rng)
    logits_V = random_logits(seed, VOCAB, spread=rng.choice([0.5, 2.0, 6.0]))
    history = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 20, 500]))]
    expected_V = theirs(model, sampling, history, logits_V)
    sampler = Sampler(sampling, history, VOCAB)
    scores_V = logits_V.numpy() if sampler._seen_V is None else sampler._penalised(logits_V.numpy(), sampler._seen_V)
    ids, weights = kept_tokens(scores_V, float(scores_V.max()), sampler._filters)
    ids = np.arange(VOCAB) if ids is None else ids
    assert ids.tolist() == expected_V.nonzero().flatten().tolist()
    np.testing.assert_allclose(weights / weights.sum(dtype=np.float64), expected_V[ids].numpy(), rtol=2e-5, atol=1e-30)
    assert sampler.choose(logits_V).token in set(ids.tolist())


@pytest.mark.parametrize("penalty", [0.5, 1.01, 1.3, 10.0])
def test_penalty_counts_the_answer_too(penalty: float) -> None:
    """Greedy with a penalty equals transformers' processor and argmax, step by step."""
    prompt = [3, 3, 17, VOCAB + 5]
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=penalty), prompt, VOCAB)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    history = list(prompt)
    logits_V = random_logits(5, VOCAB)
    for step in range(60):
        expected = int(processor(torch.tensor([history]), logits_V[None].clone())[0].argmax())
        assert sampler.choose(logits_V).token == expected
        history.append(expected)
        logits_V = logits_V + random_logits(step, VOCAB, spread=0.1)
    assert len(set(history) - set(prompt)) > 1 or penalty < 1


# Against definitions -------------------------------------------------------------------------------------------------


@given(
    scores=st.lists(st.integers(-12, 12), min_size=1, max_size=300),
    p=st.floats(1e-6, 1, exclude_max=True),
    scale=st.sampled_from([0.05, 0.5, 1.0]),
)
def test_nucleus_equals_sorting_all(scores: list[int], p: float, scale: float) -> None:
    """Many ties: those of the lowest ids are kept."""
    scores_V = (np.asarray(scores, dtype=np.float32) - max(scores)) * np.float32(scale)
    weights = np.exp(scores_V)
    order = np.argsort(-scores_V, kind="stable")
    above = np.concatenate([[0.0], weights[order].cumsum(dtype=np.float64)[:-1]])
    kept = order[(above < p * weights.sum(dtype=np.float64)) | (above == 0)]
    assert under_test._nucleus(scores_V, np.exp, p).tolist() == sorted(kept.tolist())


def test_nucleus_of_a_large_vocabulary_sorts_little(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def spy(values: Any) -> Any:
        sizes.append(len(values))
        return np.sort(values)

    class Spied:
        sort = staticmethod(spy)

        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

    scores_V = random_logits(0, 49152, spread=3).numpy()
    scores_V -= scores_V.max()
    scores_V[:20] = 0.0
    monkeypatch.setattr(under_test, "np", Spied())
    kept = under_test._nucleus(scores_V, np.exp, 0.5)
    assert len(kept)
    assert len(sizes) == 1
    assert sizes[0] < 49152 // 8


@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-30, 0.25, 0.3, 1.0]), max_size=1200),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_draw_inverts_the_distribution(weights: list[float], uniform: float) -> None:
    row = np.asarray([*weights, 0.5, 0.0], dtype=np.float32)
    running = row.cumsum(dtype=np.float64)
    position = under_test._position(row, uniform)
    assert row[position] > 0
    target, rounding = uniform * running[-1], 1e-12 * running[-1]
    assert running[position] >= target - rounding
    assert position == 0 or running[position - 1] <= target + rounding


def test_draw_between_two_roundings() -> None:
    """Summed one by one the small weights vanish beside 1, in a block's sum they do not; no token of weight 0 comes."""
    row = np.full(258, 1e-17, dtype=np.float32)
    row[[0, 257]] = 1.0
    row[250:257] = 0.0
    assert under_test._position(row, (1 + 1e-15) / (2 + 2.4e-15)) in (249, 257)


def test_draws_follow_the_probabilities() -> None:
    logits_V = torch.tensor([1.0, 0.0, -1.0, 2.0, -30.0])
    draws = 20_000
    sampler = Sampler(Sampling(seed=7), [0], 5)
    counts = Counter(sampler.choose(logits_V).token for _ in range(draws))
    for token, p in enumerate(logits_V.softmax(-1).tolist()):
        assert abs(counts[token] - draws * p) <= 5 * math.sqrt(draws * p * (1 - p)) + 1e-3


@pytest.mark.parametrize("size", [5, 49152])
def test_greedy_takes_the_lowest_of_equals(size: int) -> None:
    sampler = Sampler(Sampling(temperature=0, logprobs=3), [0], size)
    logits_V = torch.zeros(size)
    logits_V[[1, 3, size - 1]] = 2.0
    chosen = sampler.choose(logits_V)
    assert chosen.token == 1
    assert chosen.logprobs is not None
    assert [token for token, _ in chosen.logprobs.top] == [1, 3, size - 1]
    assert Sampler(Sampling(temperature=0), [0], size).choose(torch.zeros(size)).token == 0


def test_the_lowest_of_many_equals_are_reported() -> None:
    likelier = [13, 200, 340, 999]
    logits_V = torch.zeros(VOCAB)
    logits_V[likelier] = 1.0
    (found,) = prompt_logprobs(logits_V[None], [0], 20)
    assert [token for token, _ in found.top] == [*likelier, *(token for token in range(17) if token not in likelier)]


@pytest.mark.parametrize(
    "settings_of",
    [
        {"top_k": 1},
        {"top_p": 1e-9},
        {"min_p": 1.0},
        {"temperature": 5e-324},
        {"temperature": 1e-30, "top_p": 0.5},
        {"repetition_penalty": 5e-324, "temperature": 5e-324},
        {"repetition_penalty": 1e-40, "top_p": 1e-9},
    ],
    ids=str,
)
def test_extreme_settings_take_the_likeliest(settings_of: dict[str, float]) -> None:
    logits_V = random_logits(3, VOCAB)
    best = int(logits_V.argmax())
    sampler = Sampler(Sampling(**settings_of), [best], VOCAB)  # type: ignore[arg-type]
    assert [sampler.choose(logits_V).token for _ in range(20)] == [best] * 20


def test_impossible_tokens_are_never_drawn() -> None:
    logits_V = torch.full((VOCAB,), -math.inf)
    logits_V[[10, 600]] = torch.tensor([1.0, 1.5])
    for sampling in (Sampling(seed=1), Sampling(seed=1, top_p=0.999), Sampling(seed=1, top_k=50, min_p=0.1)):
        sampler = Sampler(sampling, [1], VOCAB)
        assert {sampler.choose(logits_V).token for _ in range(100)} == {10, 600}


# A request alone -----------------------------------------------------------------------------------------------------

SAMPLINGS = [
    Sampling(temperature=0, logprobs=4),
    Sampling(seed=1, logprobs=0),
    Sampling(seed=2, top_p=0.8, temperature=0.6),
    Sampling(seed=3, top_k=40, repetition_penalty=1.2, logprobs=20),
    Sampling(seed=4, min_p=0.02, top_p=0.99),
]


def answer(sampling: Sampling, number: int, steps: int = 12) -> list[Chosen]:
    """Generate alone, from logits that follow from the request's number and step."""
    sampler = Sampler(sampling, [number], VOCAB)
    return [sampler.choose(random_logits(100 * number + step, VOCAB)) for step in range(steps)]


def test_others_change_nothing() -> None:
    """All requests together, as rows of one tensor, with other requests beside them and the global seed disturbed."""
    alone = [answer(sampling, number) for number, sampling in enumerate(SAMPLINGS)]
    samplers = [Sampler(sampling, [number], VOCAB) for number, sampling in enumerate(SAMPLINGS)]
    for step in range(12):
        torch.manual_seed(step)
        Sampler(Sampling(seed=99), [0], VOCAB).choose(random_logits(step, VOCAB))
        together_BV = torch.stack(
            [torch.zeros(VOCAB), *(random_logits(100 * number + step, VOCAB) for number in range(len(SAMPLINGS)))]
        )
        for number in reversed(range(len(SAMPLINGS))):
            assert samplers[number].choose(together_BV[number + 1]) == alone[number][step]


def test_layout_changes_nothing() -> None:
    """A row may be a view into anything."""
    logits_V = random_logits(8, VOCAB)
    wide_V2 = torch.stack([logits_V, torch.zeros(VOCAB)], dim=1)
    shifted_V = torch.cat([torch.zeros(3), logits_V])[3:]
    for sampling in SAMPLINGS:
        expected = Sampler(sampling, [1], VOCAB).choose(logits_V)
        assert Sampler(sampling, [1], VOCAB).choose(wide_V2[:, 0]) == expected
        assert Sampler(sampling, [1], VOCAB).choose(shifted_V) == expected


def test_seeds() -> None:
    sampling = Sampling(seed=5)
    tokens = [chosen.token for chosen in answer(sampling, 1)]
    assert tokens == [chosen.token for chosen in answer(sampling, 1)]
    assert tokens != [chosen.token for chosen in answer(replace(sampling, seed=6), 1)]


def test_without_a_seed_each_request_draws_its_own() -> None:
    torch.manual_seed(0)
    first = [chosen.token for chosen in answer(Sampling(), 1)]
    torch.manual_seed(0)
    assert first != [chosen.token for chosen in answer(Sampling(), 1)]


def test_logits_are_left_as_they_are() -> None:
    logits_V = random_logits(1, VOCAB)
    before_V = logits_V.clone()
    Sampler(Sampling(repetition_penalty=2.0, top_k=5, top_p=0.5, min_p=0.1, logprobs=3), [1, 2], VOCAB).choose(logits_V)
    assert torch.equal(logits_V, before_V)


# Log-probabilities ---------------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits() -> None:
    logits_V = random_logits(2, VOCAB)
    sampling = Sampling(temperature=0.3, top_k=4, repetition_penalty=1.5, seed=0, logprobs=5)
    chosen = Sampler(sampling, list(range(50)), VOCAB).choose(logits_V)
    expected_V = logits_V.log_softmax(-1)
    assert chosen.logprobs is not None
    assert chosen.logprobs.logprob == expected_V[chosen.token].item()
    values, ids = expected_V.topk(5)
    assert chosen.logprobs.top == tuple(zip(ids.tolist(), values.tolist(), strict=True))


def test_none_unless_asked_for() -> None:
    assert Sampler(Sampling(), [0], VOCAB).choose(random_logits(2, VOCAB)).logprobs is None
    none_of_the_top = Sampler(Sampling(logprobs=0), [0], VOCAB).choose(random_logits(2, VOCAB)).logprobs
    assert none_of_the_top is not None
    assert none_of_the_top.top == ()


@settings(max_examples=20)
@given(rows=st.integers(0, 9), rows_at_a_time=st.integers(1, 4), top=st.sampled_from([0, 1, 7, 20]))
def test_prompt_logprobs_in_blocks(rows: int, rows_at_a_time: int, top: int) -> None:
    """Whatever the block, a row's values are those of that row alone, and no block is larger than stated."""
    logits_TV = random_logits(rows, rows, VOCAB)
    ids = [(7 * row) % VOCAB for row in range(rows)]
    alone = tuple(prompt_logprobs(logits_TV[row, None], [ids[row]], top)[0] for row in range(rows))
    sizes = []

    def spy(part_TV: Tensor, dim: int) -> Tensor:
        sizes.append(part_TV.numel())
        return part_TV.log_softmax(dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(under_test, "_BLOCK_ELEMENTS", rows_at_a_time * VOCAB + 1)
        patch.setattr(torch, "log_softmax", spy)
        assert prompt_logprobs(logits_TV, ids, top) == alone
    assert all(size <= rows_at_a_time * VOCAB for size in sizes)
    expected_TV = logits_TV.log_softmax(-1)
    assert [found.logprob for found in alone] == [expected_TV[row, token].item() for row, token in enumerate(ids)]
    assert all(len(found.top) == top for found in alone)


def test_more_likeliest_tokens_than_tokens() -> None:
    (found,) = prompt_logprobs(torch.zeros(1, 3), [2], 20)
    assert found == TokenLogprobs(found.logprob, tuple((token, found.logprob) for token in range(3)))  # type: ignore[misc]


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf"])
def test_logits_that_are_not_numbers(sampling: Sampling, bad: str) -> None:
    logits_V = random_logits(1, VOCAB) if bad != "all -inf" else torch.full((VOCAB,), -math.inf)
    if bad != "all -inf":
        logits_V[777] = float(bad)
    with pytest.raises(LogitsError, match=r"infinite or not numbers.*float32"):
        Sampler(sampling, [1], VOCAB).choose(logits_V)
    with pytest.raises(LogitsError, match="not numbers"):
        prompt_logprobs(torch.stack([random_logits(1, VOCAB), logits_V]), [1, 2])


@pytest.mark.parametrize("logits", [torch.zeros(4), torch.zeros(1, 5), torch.zeros(5, dtype=torch.float64)], ids=str)
def test_logits_of_another_kind(logits: Tensor) -> None:
    with pytest.raises(InternalError, match=r"expected float32 \[5\]"):
        Sampler(Sampling(), [0], 5).choose(logits)


def test_one_token_per_row() -> None:
    with pytest.raises(InternalError, match="2 rows of logits and 3 tokens"):
        prompt_logprobs(torch.zeros(2, 5), [1, 2, 3])
