"""Reading config.json: sizes, groups, every refusal, and that nothing but our errors comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import LLAMA3_ROPE, tiny_checkpoint, tiny_reference
from transformers import LlamaConfig as ReferenceConfig

from tsqp.errors import TsqpError, UnsupportedModelError, WeightsError
from tsqp.model.architecture import (
    LlamaConfig,
    RopeParameters,
    linear_groups,
    module_count,
    parse_config,
    read_config,
    weight_shapes,
)

PLAIN: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
NO_SIZES: list[Any] = [0, -1, 1.5, "64", True, 1 << 25, []]


def parse(**changes: Any) -> LlamaConfig:
    return parse_config({**PLAIN, **changes}, "here/config.json")


def test_plain() -> None:
    assert parse() == LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        layers=3,
        heads=6,
        kv_heads=2,
        head_size=8,
        vocab_size=101,
        context_length=256,
        rms_norm_eps=1e-5,
        rope=RopeParameters(theta=10000.0),
    )


def test_defaults_are_those_of_transformers() -> None:
    required = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
    ours = parse_config({key: value for key, value in PLAIN.items() if key in {"model_type", *required}}, "x")
    theirs: Any = ReferenceConfig(**{key: value for key, value in PLAIN.items() if key in required})
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_size == theirs.head_dim
    assert ours.context_length == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope == RopeParameters(theta=theirs.rope_parameters["rope_theta"])
    assert (ours.attention_bias, ours.mlp_bias) == (theirs.attention_bias, theirs.mlp_bias)
    assert ours.tied_head == theirs.tie_word_embeddings


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "max_position_embeddings", "rope_scaling"])
def test_null_means_default(key: str) -> None:
    assert parse(**{key: None}) == parse_config({k: v for k, v in PLAIN.items() if k != key}, "x")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"rope_theta": 5e5}, RopeParameters(theta=5e5), id="theta"),
        pytest.param(
            {"rope_scaling": {"type": "linear", "factor": 4}},
            RopeParameters(theta=1e4, kind="linear", factor=4),
            id="old-linear",
        ),
        pytest.param(
            {"rope_parameters": {**LINEAR, "rope_theta": 5e5}},
            RopeParameters(theta=5e5, kind="linear", factor=4),
            id="new-linear",
        ),
        pytest.param(
            {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}},
            RopeParameters(theta=5e5, kind="llama3", factor=8, original_context_length=512),
            id="old-llama3",
        ),
        pytest.param(
            {"rope_parameters": LLAMA3_ROPE},
            RopeParameters(theta=5e5, kind="llama3", factor=8, original_context_length=512),
            id="new-llama3",
        ),
    ],
)
def test_rope_in_either_form(changes: dict[str, Any], expected: RopeParameters) -> None:
    assert parse(**changes).rope == expected


@pytest.mark.parametrize("options", [{}, {"rope_parameters": LLAMA3_ROPE}], ids=["default", "llama3"])
def test_old_and_new_files_read_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    new = tiny_checkpoint(tmp_path / "new", **options)
    old = tiny_checkpoint(tmp_path / "old", old_config=True, **options)
    assert "rope_parameters" not in json.loads((old / "config.json").read_text(encoding="utf-8"))
    assert read_config(new) == read_config(old)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gemma", "llama4_text", None, 7])
def test_other_architectures_are_named(kind: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f"here/config.json.*{kind!r}"):
        parse(model_type=kind)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        pytest.param({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'", id="yarn"),
        pytest.param({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'", id="dynamic"),
        pytest.param({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "'longrope'", id="longrope"),
        pytest.param({"quantization_config": {"quant_method": "gptq"}}, "'gptq'", id="gptq"),
        pytest.param({"quantization_config": "odd"}, "'unknown'", id="odd-quantisation"),
        pytest.param({"hidden_act": "gelu"}, "'gelu'", id="gelu"),
        pytest.param({"partial_rotary_factor": 0.5}, "partial_rotary_factor", id="partial-rotary"),
        pytest.param(
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
            id="partial-rotary-new",
        ),
        pytest.param({"rope_scaling": {**LINEAR, "attention_factor": 1.2}}, "attention_factor", id="attention-factor"),
    ],
)
def test_unsupported_options_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        parse(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *[
            pytest.param({key: value}, key, id=f"{key}={value}")
            for key in ("hidden_size", "num_hidden_layers", "vocab_size", "num_key_value_heads", "head_dim")
            for value in NO_SIZES
        ],
        pytest.param({"intermediate_size": None}, "intermediate_size", id="missing"),
        pytest.param({"num_attention_heads": 49, "num_key_value_heads": 49}, "head_dim", id="more-heads-than-D"),
        pytest.param({"num_key_value_heads": 4}, "6 attention heads do not divide into 4", id="uneven-groups"),
        pytest.param({"head_dim": 7}, "head size 7 is odd", id="odd-head"),
        *[pytest.param({"rms_norm_eps": value}, "rms_norm_eps", id=f"eps={value}") for value in (0, -1e-5, "1e-5")],
        pytest.param({"rms_norm_eps": float("nan")}, "rms_norm_eps", id="eps=nan"),
        pytest.param({"rope_theta": float("inf")}, "rope_theta", id="theta=inf"),
        pytest.param({"rope_theta": 10**400}, "rope_theta", id="theta-beyond-float"),
        pytest.param({"rope_scaling": "linear"}, "rope_scaling", id="scaling-is-text"),
        pytest.param({"rope_scaling": {"type": "linear"}}, "factor", id="no-factor"),
        pytest.param({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor", id="no-low-factor"),
        pytest.param(
            {"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 4.0}}, "low_freq_factor 4.0", id="low-not-below-high"
        ),
        pytest.param(
            {"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": None}},
            "original_max_position_embeddings",
            id="no-original-context",
        ),
    ],
)
def test_impossible_sizes_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(WeightsError, match=f"here/config.json.*{named}"):
        parse(**changes)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "list", "null", "not-utf8", "deep", "long-number"],
)
def test_malformed_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=r"config\.json"):
        read_config(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no config\.json"):
        read_config(tmp_path)


SCALARS = st.none() | st.booleans() | st.integers() | st.integers(1, 64) | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
ROPE_KEYS = sorted({*LLAMA3_ROPE, "type", "partial_rotary_factor", "attention_factor"})
ROPE_KINDS = st.sampled_from(["default", "linear", "llama3", "yarn"])
ROPE = st.dictionaries(st.sampled_from(ROPE_KEYS), SCALARS | ROPE_KINDS | st.just(10**400))
KEYS = st.sampled_from([*PLAIN, "head_dim", "hidden_act", "quantization_config", "attention_bias", "rope_scaling"])


@given(st.dictionaries(st.text(max_size=8) | KEYS, JSON))
def test_any_object_is_a_config_or_our_error(raw: dict[str, Any]) -> None:
    config_or_error({**raw, "model_type": "llama"})
    config_or_error(raw)


@given(st.dictionaries(KEYS, JSON, max_size=3), ROPE)
def test_any_change_of_a_config_is_a_config_or_our_error(changes: dict[str, Any], rope: dict[str, Any]) -> None:
    config_or_error({**PLAIN, **changes})
    config_or_error({**PLAIN, "rope_parameters": rope})
    config_or_error({**PLAIN, "rope_scaling": rope})


def config_or_error(raw: dict[str, Any]) -> None:
    """Fail on any other exception, and on a config the rest of the program cannot use."""
    try:
        config = parse_config(raw, "x")
    except TsqpError:
        return
    assert config.heads % config.kv_heads == 0
    assert config.head_size % 2 == 0
    assert config.canonical() == parse_config(raw, "x").canonical()


# What a config implies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"tie_word_embeddings": True},
        {"head_dim": 14, "num_key_value_heads": 1},
    ],
    ids=["plain", "attention-bias", "mlp-bias", "tied", "own-head-size"],
)
def test_weight_shapes_are_those_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    config = read_config(tiny_checkpoint(tmp_path, **options))
    parameters = tiny_reference(**options).named_parameters()
    assert weight_shapes(config) == {name: tuple(value.shape) for name, value in parameters}


def test_groups_follow_the_forward_pass() -> None:
    config = parse(num_hidden_layers=2, attention_bias=True)
    groups = linear_groups(config)
    parts = ["qkv", "o", "gate_up", "down"]
    assert [group.name for group in groups] == [f"layers.{i}.{part}" for i in range(2) for part in parts] + ["head"]
    assert [(group.in_features, group.rows, group.bias) for group in groups[:4]] == [
        (48, 48 + 16 + 16, True),
        (48, 48, True),
        (48, 160, False),
        (80, 48, False),
    ]
    assert groups[0].out_features == (48, 16, 16)
    assert groups[-1].members == ("lm_head",)


def test_module_count_is_the_published_one() -> None:
    """Seven projections a layer, the embedding and the head."""
    for config in (parse(), parse(tie_word_embeddings=True)):
        assert module_count(linear_groups(config)) == 7 * 3 + 2


def test_canonical_text_tells_every_field_apart() -> None:
    variants = [
        parse(),
        parse(rms_norm_eps=1e-6),
        parse(rope_theta=1e5),
        parse(rope_scaling=LINEAR),
        parse(max_position_embeddings=512),
        parse(tie_word_embeddings=True),
    ]
    assert len({variant.canonical() for variant in variants}) == len(variants)
