"""GGUF conversion against gguf's own dequantisation and transformers' model of the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter, RopeScalingType
from tiny_gguf import Weights, load_dequantised, quantised, stored_parameters, write_gguf
from tiny_models import LLAMA3_ROPE, assert_same_logits, load_llama, random_ids, reference_logits, tiny_reference

from tsqp.errors import SetupError, TsqpError, UnsupportedModelError, WeightsError
from tsqp.model import gguf
from tsqp.model.architecture import read_config
from tsqp.model.layers import rope_frequencies
from tsqp.model.locate import locate
from tsqp.model.weights import Checkpoint

# Rows of matrices are whole blocks of every quantisation: 64 for the small ones, 256 for K-quants.
SMALL: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WIDE = {**SMALL, "hidden_size": 256, "intermediate_size": 512}
LLAMA3 = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
TOKENS = 48


def ignore(_done: float) -> None:
    """Take progress and do nothing."""


def llama3_divisors(writer: GGUFWriter, head_size: int) -> None:
    """Add ``rope_freqs.weight`` as llama.cpp computes it from Llama 3.1's config."""
    factor, low, high, context = LLAMA3["factor"], 1.0, 4.0, 8192
    divisors = []
    for i in range(0, head_size, 2):
        wavelength = 2 * np.pi * LLAMA3["rope_theta"] ** (i / head_size)
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))


def linear_scaling(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


CASES = [
    *[pytest.param(kind, SMALL, None, id=kind.name) for kind in (Kind.F32, Kind.F16, Kind.BF16)],
    *[pytest.param(kind, SMALL, None, id=kind.name) for kind in (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1)],
    *[pytest.param(kind, WIDE, None, id=kind.name) for kind in (Kind.Q4_K, Kind.Q6_K)],
    pytest.param(Kind.Q8_0, {**SMALL, "tie_word_embeddings": True}, None, id="tied"),
    pytest.param(Kind.F32, {**SMALL, "attention_bias": True}, None, id="attention-bias"),
    pytest.param(Kind.F16, {**SMALL, "attention_bias": True, "mlp_bias": True}, None, id="all-biases"),
    pytest.param(Kind.F32, {**SMALL, "head_dim": 32}, None, id="own-head-size"),
    pytest.param(Kind.F32, {**SMALL, "num_key_value_heads": 4}, None, id="multi-head"),
    pytest.param(
        Kind.F32,
        {**SMALL, "rope_parameters": LLAMA3, "max_position_embeddings": 10000},
        lambda writer: llama3_divisors(writer, 16),
        id="llama3",
    ),
    pytest.param(
        Kind.F32,
        {**SMALL, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}},
        linear_scaling,
        id="linear",
    ),
]


@pytest.mark.parametrize(("kind", "options", "edit"), CASES)
def test_weights_and_logits_are_those_of_the_file(
    tmp_path: Path, kind: Kind, options: dict[str, Any], edit: Callable[[GGUFWriter], None] | None
) -> None:
    model = tiny_reference(**options)
    weights = quantised(model, kind)
    directory = locate(str(write_gguf(tmp_path / "tiny.gguf", model, weights, edit=edit or (lambda _writer: None))))
    load_dequantised(model, weights)

    checkpoint = Checkpoint(directory)
    expected = stored_parameters(model)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(checkpoint.read(name).float(), value), name

    ids = random_ids(2, TOKENS, SMALL["vocab_size"])
    assert_same_logits(load_llama(directory).prefill(ids, all_logits=True), reference_logits(model, ids))


def test_all_branches_of_llama3_are_hit(tmp_path: Path) -> None:
    options = {**SMALL, "rope_parameters": LLAMA3, "max_position_embeddings": 10000}
    model = tiny_reference(**options)
    file = write_gguf(
        tmp_path / "a.gguf", model, quantised(model, Kind.F32), edit=lambda writer: llama3_divisors(writer, 16)
    )
    config = read_config(locate(str(file)))
    assert config.rope.kind == "llama3"
    assert torch.allclose(rope_frequencies(config), model.model.rotary_emb.inv_freq, rtol=1e-6)
    divisors = next(tensor.data for tensor in GGUFReader(file).tensors if tensor.name == "rope_freqs.weight")
    assert divisors.min() == 1.0
    assert divisors.max() == LLAMA3["factor"]
    assert ((divisors > 1.01) & (divisors < LLAMA3["factor"] - 0.01)).any()


def test_half_precision_stays_as_it_is_stored(tmp_path: Path) -> None:
    model = tiny_reference(**SMALL)
    for kind, stored in ((Kind.F16, "F16"), (Kind.BF16, "BF16"), (Kind.Q4_0, "F32")):
        file = write_gguf(tmp_path / f"{stored}.gguf", model, quantised(model, kind))
        checkpoint = Checkpoint(locate(str(file)))
        assert checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].dtype == stored
        assert checkpoint.tensors["model.norm.weight"].dtype == "F32"


def test_progress_ends_at_one_and_each_layer_has_its_file(tmp_path: Path) -> None:
    model = tiny_reference(**SMALL)
    file = write_gguf(tmp_path / "a.gguf", model, quantised(model, Kind.F32))
    steps: list[float] = []
    gguf.convert_atomically(file, tmp_path / "out", steps.append)
    assert steps == sorted(steps)
    assert steps[-1] == 1.0
    assert len(Checkpoint(tmp_path / "out").files) == 1 + SMALL["num_hidden_layers"]


# Files that must be refused ------------------------------------------------------------------------------------------


def refused(tmp_path: Path, file: Path, error: type[TsqpError], message: str) -> None:
    """Fail unless conversion raises this and leaves nothing behind."""
    target = tmp_path / "out" / "model"
    with pytest.raises(error, match=message):
        gguf.convert_atomically(file, target, ignore)
    assert list(target.parent.iterdir()) == []


def changed(tmp_path: Path, change: Callable[[Weights], None], **options: Any) -> Path:
    """Write a file whose tensors were changed after they were made."""
    model = tiny_reference(**{**SMALL, **options})
    weights = quantised(model, Kind.F32)
    change(weights)
    return write_gguf(tmp_path / "bad.gguf", model, weights)


def zeros(rows: int, columns: int) -> tuple[np.ndarray[Any, Any], Kind]:
    return np.zeros((rows, columns), dtype=np.float32), Kind.F32


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.02, 0.3, 0.99], ids=lambda kept: f"{kept:.1%}")
def test_truncated_file(tmp_path: Path, kept: float) -> None:
    content = changed(tmp_path, lambda _weights: None).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(kept * len(content))])
    refused(tmp_path, tmp_path / "cut.gguf", WeightsError, "cut.gguf")


def test_random_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for size in (1, 7, 100, 10_000):
        (tmp_path / "noise.gguf").write_bytes(rng.bytes(size))
        refused(tmp_path, tmp_path / "noise.gguf", WeightsError, "noise.gguf")


def test_noise_behind_a_valid_start(tmp_path: Path) -> None:
    content = changed(tmp_path, lambda _weights: None).read_bytes()
    noise = np.random.default_rng(1).bytes(4000)
    for cut in (8, 16, 24):
        (tmp_path / "noise.gguf").write_bytes(content[:cut] + noise)
        refused(tmp_path, tmp_path / "noise.gguf", WeightsError, "noise.gguf")


def test_another_architecture_is_named(tmp_path: Path) -> None:
    model = tiny_reference(**SMALL)
    file = write_gguf(tmp_path / "a.gguf", model, quantised(model, Kind.F32), architecture="qwen2")
    refused(tmp_path, file, UnsupportedModelError, "'qwen2'")


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        pytest.param("token_embd.weight", "token_embd.weight", id="embedding"),
        pytest.param("output_norm.weight", "model.norm.weight", id="norm"),
        pytest.param("blk.1.attn_k.weight", "model.layers.1.self_attn.k_proj.weight", id="projection"),
        pytest.param("blk.1.attn_q.bias", "model.layers.1.self_attn.q_proj.bias", id="bias"),
    ],
)
def test_missing_tensor_is_named(tmp_path: Path, missing: str, named: str) -> None:
    file = changed(tmp_path, lambda weights: weights.__delitem__(missing), attention_bias=True)
    refused(tmp_path, file, WeightsError, named)


def test_shape_that_contradicts_the_metadata(tmp_path: Path) -> None:
    file = changed(tmp_path, lambda weights: weights.update({"blk.0.attn_q.weight": zeros(62, 64)}))
    refused(tmp_path, file, WeightsError, r"blk.0.attn_q.weight.*\[62, 64\].*\[64, 64\]")


@pytest.mark.parametrize(
    "name",
    ["blk.0.ffn_gate_exps.weight", "blk.7.attn_q.weight", "blk.0.attn_norm.bias", "mm.0.weight", "output.bias"],
)
def test_unknown_tensor_is_named(tmp_path: Path, name: str) -> None:
    file = changed(tmp_path, lambda weights: weights.update({name: zeros(64, 64)}))
    refused(tmp_path, file, UnsupportedModelError, name)


def test_unsupported_quantisation_is_named(tmp_path: Path) -> None:
    model = tiny_reference(**SMALL)
    file = write_gguf(tmp_path / "a.gguf", model, quantised(model, Kind.Q5_0))
    refused(tmp_path, file, UnsupportedModelError, "Q5_0")


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32))

    model = tiny_reference(**SMALL)
    file = write_gguf(tmp_path / "a.gguf", model, quantised(model, Kind.F32), edit=edit)
    refused(tmp_path, file, UnsupportedModelError, "rope_freqs.weight")


def test_unsupported_rope_scaling_is_named(tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)

    model = tiny_reference(**SMALL)
    file = write_gguf(tmp_path / "a.gguf", model, quantised(model, Kind.F32), edit=edit)
    refused(tmp_path, file, UnsupportedModelError, "'yarn'")


def test_partial_rotation_is_refused(tmp_path: Path) -> None:
    model = tiny_reference(**SMALL)
    weights = quantised(model, Kind.F32)
    model.config.head_dim = 8  # written as the rotary dimension; the projections keep 16 rows per head
    file = write_gguf(
        tmp_path / "a.gguf",
        model,
        weights,
        edit=lambda writer: writer.kv_data[0].__delitem__("llama.attention.key_length"),
    )
    refused(tmp_path, file, UnsupportedModelError, "rotary")


def test_full_disk_is_a_setup_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "save_file", full)
    refused(tmp_path, changed(tmp_path, lambda _weights: None), SetupError, "No space left")


def test_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: float) -> None:
        if done > 0.5:
            raise KeyboardInterrupt

    target = tmp_path / "out" / "model"
    with pytest.raises(KeyboardInterrupt):
        gguf.convert_atomically(changed(tmp_path, lambda _weights: None), target, interrupt)
    assert list(target.parent.iterdir()) == []


def test_a_finished_conversion_wins_over_a_later_one(tmp_path: Path) -> None:
    file, target = changed(tmp_path, lambda _weights: None), tmp_path / "out"
    gguf.convert_atomically(file, target, ignore)
    marker = json.loads((target / "config.json").read_text(encoding="utf-8"))
    gguf.convert_atomically(file, target, ignore)
    assert json.loads((target / "config.json").read_text(encoding="utf-8")) == marker
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
