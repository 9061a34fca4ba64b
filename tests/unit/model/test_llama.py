"""The forward pass against transformers' LlamaForCausalLM, in float32 and bfloat16, tiny and bundled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    LLAMA3_ROPE,
    TINY,
    assert_same_logits,
    load_llama,
    position_errors,
    random_ids,
    reference_from,
    reference_logits,
    tiny_checkpoint,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from tsqp.bench.monolithic import Monolithic
from tsqp.errors import InputError
from tsqp.model.architecture import read_config
from tsqp.model.layers import rope_frequencies
from tsqp.model.tokenizer import read_tokenizer

LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
TOKENS = 64

CASES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "one-layer": {"num_hidden_layers": 1},
    "head-size-above-D/N": {"head_dim": 14},
    "head-size-below-D/N": {"head_dim": 6},
    "head-size-2": {"head_dim": 2},
    "other-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "linear-rope": {"rope_parameters": LINEAR_ROPE},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE, "head_dim": 16},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "all-biases-tied-mqa": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
    },
    "large-eps": {"rms_norm_eps": 0.1},
    "many-files": {"max_shard_size": "20KB"},
    "old-config": {"old_config": True},
    "old-config-theta": {"old_config": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "old-config-linear": {"old_config": True, "rope_parameters": LINEAR_ROPE},
    "old-config-llama3": {"old_config": True, "rope_parameters": LLAMA3_ROPE, "head_dim": 16},
    "stored-bfloat16": {"stored": torch.bfloat16},
    "stored-float16": {"stored": torch.float16, "tie_word_embeddings": True},
    "stored-float64": {"stored": torch.float64},
}


@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in CASES.items()])
def test_tiny_models_equal_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    directory = tiny_checkpoint(tmp_path, **options)
    if "max_shard_size" in options:
        assert len(list(directory.glob("*.safetensors"))) > 2
    ids = random_ids(3, TOKENS)
    reference = reference_logits(reference_from(directory), ids)

    model = load_llama(directory)
    every = model.prefill(ids, all_logits=True)
    assert_same_logits(every, reference)
    assert_same_logits(model.prefill(ids), every[:, -1])
    for parts in (2, 7):
        assert_same_logits(model.prefill(ids, all_logits=True, parts=parts), reference)
        assert_same_logits(model.prefill(ids, parts=parts), every[:, -1])
    assert_same_logits(load_llama(directory, offload_attention=True).prefill(ids, all_logits=True), reference)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_attention_of_transformers_is_the_same(tmp_path: Path, attention: str) -> None:
    directory = tiny_checkpoint(tmp_path)
    ids = random_ids(2, TOKENS)
    reference = reference_logits(reference_from(directory, attn_implementation=attention), ids)
    assert_same_logits(load_llama(directory).prefill(ids, all_logits=True), reference)


def test_the_tiny_llama3_rope_hits_all_three_branches(tmp_path: Path) -> None:
    stretched = rope_frequencies(read_config(tiny_checkpoint(tmp_path / "a", head_dim=16, rope_parameters=LLAMA3_ROPE)))
    default = {"rope_type": "default", "rope_theta": LLAMA3_ROPE["rope_theta"]}
    plain = rope_frequencies(read_config(tiny_checkpoint(tmp_path / "b", head_dim=16, rope_parameters=default)))
    divisors = (plain / stretched).tolist()
    assert divisors[0] == 1
    assert divisors[-1] == LLAMA3_ROPE["factor"]
    assert any(1.01 < divisor < LLAMA3_ROPE["factor"] - 0.01 for divisor in divisors)


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_prompts_of_any_length_in_any_order(tmp_path: Path, tokens: int) -> None:
    """The rotary table grows with the longest prompt; a shorter one after it must use the table's start."""
    directory = tiny_checkpoint(tmp_path)
    model, reference = load_llama(directory), reference_from(directory)
    for length in (tokens, 90, tokens):
        ids = random_ids(1, length, seed=length)
        assert_same_logits(model.prefill(ids, all_logits=True), reference_logits(reference, ids))


def test_batch_rows_do_not_mix(tmp_path: Path) -> None:
    model = load_llama(tiny_checkpoint(tmp_path))
    ids = random_ids(4, 20)
    together = model.prefill(ids, all_logits=True)
    for row in range(4):
        assert_same_logits(model.prefill(ids[row : row + 1], all_logits=True), together[row : row + 1])


def test_later_tokens_do_not_change_earlier_logits(tmp_path: Path) -> None:
    model = load_llama(tiny_checkpoint(tmp_path))
    ids = random_ids(1, 30)
    other = ids.clone()
    other[:, 20:] = (ids[:, 20:] + 1) % TINY["vocab_size"]
    first, second = model.prefill(ids, all_logits=True), model.prefill(other, all_logits=True)
    assert_same_logits(first[:, :20], second[:, :20])
    assert (position_errors(first, second)[:, 20:] > 1e-3).all()


def test_prefill_twice_is_the_same(tmp_path: Path) -> None:
    """In-place steps must not touch weights, the input or anything kept between calls."""
    model = load_llama(tiny_checkpoint(tmp_path, tie_word_embeddings=True))
    ids = random_ids(2, 10)
    before = ids.clone()
    assert torch.equal(model.prefill(ids), model.prefill(ids))
    assert torch.equal(ids, before)


@pytest.mark.parametrize("tokens", [0, 9])
def test_prompt_must_fit_the_context(tmp_path: Path, tokens: int) -> None:
    model = load_llama(tiny_checkpoint(tmp_path, max_position_embeddings=8))
    assert model.prefill(random_ids(1, 8)).shape == (1, TINY["vocab_size"])
    with pytest.raises(InputError, match=f"{tokens} tokens.*1 to 8"):
        model.prefill(random_ids(1, tokens))


@pytest.mark.parametrize("parts", [1, 3])
def test_a_batch_has_a_prompt(tmp_path: Path, parts: int) -> None:
    model = load_llama(tiny_checkpoint(tmp_path))
    with pytest.raises(InputError, match="the batch has no prompts; it takes at least 1"):
        model.prefill(torch.zeros(0, 5, dtype=torch.int64), parts=parts)


@pytest.mark.parametrize("token", [-1, TINY["vocab_size"]])
def test_token_outside_the_vocabulary(tmp_path: Path, token: int) -> None:
    with pytest.raises(InputError, match="vocabulary"):
        load_llama(tiny_checkpoint(tmp_path)).prefill(torch.tensor([[1, token]]))


def test_monolithic_baseline_gives_the_same_last_logits(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path)
    ids = random_ids(2, 20)
    assert_same_logits(Monolithic(directory, torch.float32)(ids), load_llama(directory).prefill(ids))


# bfloat16 ------------------------------------------------------------------------------------------------------------
#
# bfloat16 keeps 8 significant bits, so rounding to nearest errs by at most u = 2^-8 relative. A linear layer here
# rounds its weights, its input and its output (products are summed in float32): three independent errors, sqrt(3) u
# in norm. A branch (attention or FFN) passes through two linear layers one after the other: sqrt(6) u. Attention also
# errs in its weights: scores of size s are off by sqrt(6) s u, from q and k, and softmax turns that into as large a
# relative error. With s about 1 the two branches of a layer add 6 + 6 + 6 = 18 u^2. The residual stream stays float32,
# and taking every branch as large as the stream bounds its part in it; independent errors then grow as a random walk
# over L layers. The embedding is rounded once, the head three times: sqrt(18 L + 4) u in all. Rows of the head meet
# the error of the hidden state as they meet the state itself, so the same holds for max |difference| / max |logit|.


def bfloat16_tolerance(layers: int) -> float:
    return math.sqrt(18 * layers + 4) * 2.0**-8


def assert_bfloat16_close(ours: Tensor, reference: Tensor, layers: int) -> None:
    """Fail unless every position is within the tolerance and equal in argmax where the two best are further apart."""
    tolerance = bfloat16_tolerance(layers)
    assert position_errors(ours, reference).max().item() <= tolerance
    best = reference.topk(2).values
    decided = best[..., 0] - best[..., 1] > tolerance * reference.abs().amax(-1)
    assert decided.sum() >= 20, "too few positions are decided for this test to mean anything"
    assert torch.equal(ours.argmax(-1)[decided], reference.argmax(-1)[decided])


def rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


@pytest.mark.parametrize("options", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biases"])
def test_bfloat16_linears_of_a_tiny_model(tmp_path: Path, options: dict[str, Any]) -> None:
    directory = tiny_checkpoint(tmp_path, gain=1.0, **options)
    ids = random_ids(2, TOKENS)
    reference = reference_logits(reference_from(directory), ids)
    ours = load_llama(directory, torch.bfloat16).prefill(ids, all_logits=True)
    assert_bfloat16_close(ours, reference, TINY["num_hidden_layers"])
    assert rms(ours - reference) > 1e-4, "bfloat16 was not used"


# The bundled model ---------------------------------------------------------------------------------------------------

TEXT = """The harbour of the old town lies behind a long wall of grey stone. In 1847 the wall was raised by 2.5 metres,
because the winter storms had carried away three fishing boats and the roof of the market hall. Since then
nobody has seen the sea from the square, but everyone can hear it. On quiet evenings the sound is like
breathing; when the wind turns west, it is like a crowd that cannot agree about anything.

Maria worked in the small office above the chandlery, where she kept the books of four companies and one church.
"Numbers are honest," she used to say, "but they only answer the question you asked." Her neighbour, a retired
physicist, liked to contradict her. Energy, he said, is conserved; money is not; and the patience of a bookkeeper lies
somewhere in between. He wrote programs for his own amusement:

    def total(rows):
        return sum(row.price * row.count for row in rows if row.count > 0)

and sent her the results by post, although they lived on the same floor. Every letter ended with the same remark:
please check my arithmetic, because I trust the machine as far as I can throw it."""


@pytest.fixture(scope="module")
def bundled_ids(bundled_directory: Path) -> Tensor:
    return torch.tensor([read_tokenizer(bundled_directory).encode(TEXT)])


@pytest.fixture(scope="module")
def bundled_reference(bundled_gguf: Path, bundled_ids: Tensor) -> Tensor:
    """Logits of transformers, which reads the GGUF file by its own route."""
    model = AutoModelForCausalLM.from_pretrained(
        bundled_gguf.parent, gguf_file=bundled_gguf.name, dtype=torch.float32, local_files_only=True
    ).eval()
    return reference_logits(model, bundled_ids)


def test_bundled_model_equals_transformers(
    bundled_directory: Path, bundled_ids: Tensor, bundled_reference: Tensor
) -> None:
    assert bundled_ids.shape[1] >= 200
    assert_same_logits(load_llama(bundled_directory).prefill(bundled_ids, all_logits=True), bundled_reference)


def test_bundled_model_with_bfloat16_linears(
    bundled_directory: Path, bundled_ids: Tensor, bundled_reference: Tensor
) -> None:
    ours = load_llama(bundled_directory, torch.bfloat16).prefill(bundled_ids, all_logits=True)
    assert_bfloat16_close(ours, bundled_reference, read_config(bundled_directory).layers)
    # Transformers rounds more often: its residual stream, norms and attention are bfloat16 too.
    theirs = reference_logits(reference_from(bundled_directory, dtype=torch.bfloat16), bundled_ids)
    assert rms(ours - bundled_reference) < rms(theirs - bundled_reference)
