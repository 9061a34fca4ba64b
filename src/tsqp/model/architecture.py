"""What a LLaMA-family checkpoint is: its shape, and the linear groups it is computed in."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tsqp.errors import UnsupportedModelError, WeightsError
from tsqp.model.reading import reading

EMBEDDING_MODULE = "model.embed_tokens"
HEAD_MODULE = "lm_head"

RopeType = Literal["default", "linear", "llama3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeParameters:
    """Rotary position embedding: base and, where the checkpoint stretches its context, how.

    References:
        Su et al. 2021 (RoPE); Llama 3.1 model card for ``llama3``.
    """

    theta: float = 10000.0
    kind: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Shape of a LLaMA: D hidden, F FFN, N heads of size H (N_kv of them for keys and values), V vocabulary."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope: RopeParameters
    attention_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False

    def canonical(self) -> str:
        """Return one text per architecture, for the model digest."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linear modules that read the same input and are computed in one call: their weights, stacked by rows.

    ``members`` are checkpoint module paths; member i gives ``out_features[i]`` of the N output columns.
    """

    name: str
    members: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    bias: bool

    @property
    def rows(self) -> int:
        """Output columns N of the whole group."""
        return sum(self.out_features)


def linear_groups(config: LlamaConfig) -> tuple[LinearGroup, ...]:
    """List a model's linear groups in the order the forward pass uses them: four per layer, then the head."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.heads * config.head_size, config.kv_heads * config.head_size
    groups = []
    for index in range(config.layers):
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        qkv = (f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj")
        gate_up = (f"{mlp}gate_proj", f"{mlp}up_proj")
        groups += [
            LinearGroup(f"layers.{index}.qkv", qkv, d, (q, kv, kv), config.attention_bias),
            LinearGroup(f"layers.{index}.o", (f"{attention}o_proj",), q, (d,), config.attention_bias),
            LinearGroup(f"layers.{index}.gate_up", gate_up, d, (f, f), config.mlp_bias),
            LinearGroup(f"layers.{index}.down", (f"{mlp}down_proj",), f, (d,), config.mlp_bias),
        ]
    return (*groups, LinearGroup("head", (HEAD_MODULE,), d, (config.vocab_size,), bias=False))


def norm_before(group: str) -> str | None:
    """Return which norm's result a linear group reads, by checkpoint name; None if it reads something else."""
    layer, _, kind = group.rpartition(".")
    if kind == "head":
        return "model.norm.weight"
    norm = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}.get(kind)
    return f"model.{layer}.{norm}.weight" if norm else None


def chains(config: LlamaConfig) -> list[tuple[str, ...]]:
    """Name the groups between two layers' attention: o, gate_up, down, and the next qkv or the head; by layer."""
    names = [group.name for group in linear_groups(config)]
    return [tuple(names[first : first + 4]) for first in range(1, len(names), 4)]


def chain_name(groups: Sequence[str]) -> str:
    """Return what groups that are computed for one request are called (``model/chains.py``)."""
    return f"{groups[0]} to {groups[-1]}"


def module_count(groups: Iterable[LinearGroup]) -> int:
    """Count Linear and Embedding modules, as the published system did (a tied head counts)."""
    return 1 + sum(len(group.members) for group in groups)


def norm_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name every non-linear parameter (norm weights) with its shape."""
    names = ["model.norm.weight"]
    for index in range(config.layers):
        names += [f"model.layers.{index}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
    return dict.fromkeys(names, (config.hidden_size,))


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name every tensor the model uses with its shape. A tied head has none of its own."""
    shapes = {f"{EMBEDDING_MODULE}.weight": (config.vocab_size, config.hidden_size), **norm_shapes(config)}
    for group in linear_groups(config):
        if group.name == "head" and config.tied_head:
            continue
        for member, rows in zip(group.members, group.out_features, strict=True):
            shapes[f"{member}.weight"] = (rows, group.in_features)
            if group.bias:
                shapes[f"{member}.bias"] = (rows,)
    return shapes


def read_config(directory: Path) -> LlamaConfig:
    """Read ``config.json`` of a Hugging Face directory.

    Raises:
        WeightsError: the file is missing or malformed.
        UnsupportedModelError: another architecture, or an option TSQP does not compute.
    """
    path = directory / "config.json"
    with reading(path):
        if not path.exists():
            raise WeightsError(
                f"{directory} has no config.json: expected a Hugging Face model directory or a .gguf file."
            )
        content = path.read_bytes()
    try:
        raw = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise WeightsError(f"{path}: expected a JSON object.")
    return parse_config(raw, str(path))


def parse_config(raw: Mapping[str, Any], origin: str) -> LlamaConfig:
    """Turn the content of a ``config.json`` into a LlamaConfig.

    Args:
        raw: the JSON object.
        origin: its name in messages.

    Raises:
        WeightsError: a size is missing or impossible.
        UnsupportedModelError: another architecture, or an option TSQP does not compute.
    """
    kind = raw.get("model_type")
    if kind != "llama":
        raise UnsupportedModelError(f"{origin}: the model is of type {kind!r}; TSQP runs 'llama' models.")
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UnsupportedModelError(
            f"{origin}: weights quantised as {method!r} are not supported; use the original ones."
        )
    if (activation := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise UnsupportedModelError(f"{origin}: hidden_act is {activation!r}; TSQP computes 'silu'.")
    d, n = _size(raw, "hidden_size", origin), _size(raw, "num_attention_heads", origin)
    kv = _size(raw, "num_key_value_heads", origin, default=n)
    h = _size(raw, "head_dim", origin, default=d // n)
    if n % kv:
        raise WeightsError(f"{origin}: {n} attention heads do not divide into {kv} key-value heads.")
    if h % 2:
        raise WeightsError(f"{origin}: head size {h} is odd; rotary embedding needs pairs.")
    return LlamaConfig(
        hidden_size=d,
        intermediate_size=_size(raw, "intermediate_size", origin),
        layers=_size(raw, "num_hidden_layers", origin, largest=_MAX_LAYERS),
        heads=n,
        kv_heads=kv,
        head_size=h,
        vocab_size=_size(raw, "vocab_size", origin),
        context_length=_size(raw, "max_position_embeddings", origin, default=2048),
        rms_norm_eps=_positive(raw, "rms_norm_eps", origin, default=1e-6),
        rope=_rope(raw, origin),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        tied_head=bool(raw.get("tie_word_embeddings", False)),
    )


def _rope(raw: Mapping[str, Any], origin: str) -> RopeParameters:
    """Read RoPE settings, in the form of transformers 5 (``rope_parameters``) or before (``rope_scaling``)."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise WeightsError(f"{origin}: rope_scaling is not an object.")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = _positive(scaling, "rope_theta", origin, default=_positive(raw, "rope_theta", origin, default=10000.0))
    for name in ("partial_rotary_factor", "attention_factor"):
        if (scaling.get(name) or raw.get(name) or 1.0) != 1.0:
            raise UnsupportedModelError(f"{origin}: {name} other than 1 is not supported.")
    if kind == "default":
        return RopeParameters(theta=theta)
    factor = _positive(scaling, "factor", origin)
    if kind == "linear":
        return RopeParameters(theta=theta, kind="linear", factor=factor)
    if kind == "llama3":
        low, high = _positive(scaling, "low_freq_factor", origin), _positive(scaling, "high_freq_factor", origin)
        if low >= high:
            raise WeightsError(f"{origin}: low_freq_factor {low} is not below high_freq_factor {high}.")
        return RopeParameters(
            theta=theta,
            kind="llama3",
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_context_length=_size(scaling, "original_max_position_embeddings", origin),
        )
    raise UnsupportedModelError(f"{origin}: RoPE scaling {kind!r} is not supported; known: default, linear, llama3.")


_MAX_SIZE = 1 << 24
# What is listed for each layer would otherwise take all memory. The largest LLaMA has 126.
_MAX_LAYERS = 1024


def _size(raw: Mapping[str, Any], key: str, origin: str, default: int | None = None, largest: int = _MAX_SIZE) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= largest:
        raise WeightsError(f"{origin}: {key} is {value!r}; expected a whole number from 1 to {largest}.")
    return value


def _positive(raw: Mapping[str, Any], key: str, origin: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise WeightsError(f"{origin}: {key} is {value!r}; expected a positive number.")
    return float(value)
