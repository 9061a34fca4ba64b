"""Converts GGUF files of the llama architecture to a Hugging Face directory, once, shard by shard.

llama.cpp stores the rows of q and k in another order (pairs of rotary dimensions side by side); ``_hf_row_order``
puts them back. Quantised blocks are dequantised by the ``gguf`` package; F16 and BF16 stay as they are.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tsqp.errors import SetupError, UnsupportedModelError, WeightsError
from tsqp.model.architecture import parse_config, weight_shapes
from tsqp.model.gguf_layout import check_layout
from tsqp.model.layers import rope_frequencies
from tsqp.model.weights import INDEX_NAME

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

QUANTISATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.([0-9]{1,8})\.(\w+)\.(weight|bias)")
_TOP_TENSOR = re.compile(r"(\w+)\.(weight|bias)")
_SHARED_SHARD = 0


def convert(source: Path, target: Path, on_progress: Callable[[float], None]) -> None:
    """Write the Hugging Face directory ``target`` from the GGUF file ``source``.

    At most one layer's tensors are held in memory at a time.

    Args:
        source: a GGUF file.
        target: an existing empty directory.
        on_progress: called with the fraction done.

    Raises:
        SetupError: the packages that read GGUF are not installed.
        WeightsError: the file is damaged or incomplete.
        UnsupportedModelError: another architecture, quantisation or RoPE scaling.
    """
    reader = _open(source)
    config = _config(reader, source)
    shapes = weight_shapes(parse_config(config, str(source)))
    shards = _shards(reader, source)
    _require({name: tensor for shard in shards.values() for name, tensor in shard.items()}, shapes, source)
    weight_map: dict[str, str] = {}
    for done, (shard, tensors) in enumerate(sorted(shards.items())):
        file = f"model-{shard + 1:05d}-of-{len(shards):05d}.safetensors"
        converted = {name: _convert_tensor(name, tensor, config, source) for name, tensor in tensors.items()}
        save_file(converted, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(converted, file)
        on_progress((done + 1) / len(shards))
    (target / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _convert_tokenizer(reader, source, target)


def _open(source: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader  # noqa: PLC0415  needed for conversion only
    except ImportError as error:
        raise SetupError("reading GGUF needs the package gguf: pip install 'tsqp[gguf]'.") from error
    check_layout(source)
    try:
        return GGUFReader(source)
    except (ValueError, KeyError, IndexError, OSError, TypeError, OverflowError, UnicodeDecodeError) as error:
        raise WeightsError(f"{source} is not a complete GGUF file ({error}).") from error


def _field(reader: GGUFReader, key: str) -> Any:  # noqa: ANN401  GGUF values have many types
    field = reader.get_field(key)
    try:
        return None if field is None else field.contents()
    except UnicodeDecodeError as error:
        raise WeightsError(f"the GGUF file's field {key} is not text ({error}).") from error


def _config(reader: GGUFReader, source: Path) -> dict[str, Any]:
    """Build the content of config.json from the GGUF metadata."""
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise UnsupportedModelError(
            f"{source}: the model is of architecture {architecture!r}; TSQP runs 'llama' models."
        )
    names = {tensor.name for tensor in reader.tensors}
    embedding = next((tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None:
        raise WeightsError(f"{source} has no tensor 'token_embd.weight': the file is incomplete.")
    if len(embedding.shape) != 2:  # noqa: PLR2004  a matrix
        raise WeightsError(f"{source}: tensor 'token_embd.weight' has {len(embedding.shape)} dimensions, not 2.")
    heads = _field(reader, "llama.attention.head_count")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv") or heads,
        "vocab_size": int(embedding.shape[1]),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": _field(reader, "llama.attention.layer_norm_rms_epsilon"),
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }
    if (head_size := _field(reader, "llama.attention.key_length")) is not None:
        config["head_dim"] = head_size
    config["rope_parameters"] = _rope(reader, source, config)
    rotary = _field(reader, "llama.rope.dimension_count")
    if rotary not in (None, parse_config(config, str(source)).head_size):
        raise UnsupportedModelError(f"{source}: only {rotary} dimensions of each head are rotary; TSQP rotates all.")
    return config


def _rope(reader: GGUFReader, source: Path, config: dict[str, Any]) -> dict[str, Any]:
    theta = _field(reader, "llama.rope.freq_base") or 10000.0  # whether it is a number, parse_config checks
    kind = _field(reader, "llama.rope.scaling.type")
    factors = next((tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is not None:
        return _llama3_from_factors(np.asarray(factors.data, dtype=np.float32), theta, source, config)
    if kind in (None, "none"):
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": kind, "rope_theta": theta, "factor": _field(reader, "llama.rope.scaling.factor")}


def _llama3_from_factors(factors: np.ndarray, theta: float, source: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Recover llama3 scaling from its divisors, which is all that GGUF keeps of it.

    The published models use low 1, high 4 and an original context of 8192; the divisors are recomputed from these and
    compared, so that anything else is refused instead of guessed.
    """
    scaling = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max(initial=0.0)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    parsed = parse_config({**config, "rope_parameters": scaling}, str(source))
    plain = parse_config({**config, "rope_parameters": {"rope_theta": theta}}, str(source))
    implied = rope_frequencies(plain) / rope_frequencies(parsed)
    if implied.shape != factors.shape or not np.allclose(implied.numpy(), factors, rtol=1e-3):
        raise UnsupportedModelError(f"{source}: rope_freqs.weight is not the llama3 scaling of a published model.")
    return scaling


def _shards(reader: GGUFReader, source: Path) -> dict[int, dict[str, ReaderTensor]]:
    """Group tensors by output file: one for what layers share, one per layer; name them as Hugging Face does."""
    shards: dict[int, dict[str, ReaderTensor]] = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        if match := _LAYER_TENSOR.fullmatch(tensor.name):
            layer, part, suffix = match.groups()
            name = _LAYER_NAMES.get(part)
            shard, full = int(layer) + 1, f"model.layers.{layer}.{name}.{suffix}"
        else:
            match = _TOP_TENSOR.fullmatch(tensor.name)
            name = _TOP_NAMES.get(match[1]) if match else None
            shard, full = _SHARED_SHARD, f"{name}.{match[2]}" if match else ""
        if name is None:
            raise UnsupportedModelError(f"{source}: tensor {tensor.name!r} does not belong to a plain llama model.")
        shards.setdefault(shard, {})[full] = tensor
    return shards


def _require(tensors: Mapping[str, ReaderTensor], shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Check before anything is written that the file holds the model's tensors, in their shapes, and no others."""
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise WeightsError(f"{source} has no tensor for {missing[0]!r}: the file is incomplete.")
    for name, tensor in tensors.items():
        if name not in shapes:
            raise UnsupportedModelError(f"{source}: tensor {tensor.name!r} does not belong to a plain llama model.")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if shape != shapes[name]:
            raise WeightsError(
                f"{source}: tensor {tensor.name!r} has shape {list(shape)}, the metadata imply {list(shapes[name])}."
            )


def _convert_tensor(name: str, tensor: ReaderTensor, config: dict[str, Any], source: Path) -> Tensor:
    from gguf import quants  # noqa: PLC0415  needed for conversion only

    kind = tensor.tensor_type.name
    if kind not in QUANTISATIONS:
        raise UnsupportedModelError(
            f"{source}: tensor {tensor.name!r} is quantised as {kind}; supported: {', '.join(QUANTISATIONS)}."
        )
    array = tensor.data if kind == "F16" else quants.dequantize(tensor.data, tensor.tensor_type)
    value = torch.from_numpy(np.array(array)).reshape([int(size) for size in reversed(tensor.shape)])
    if kind == "BF16":
        value = value.to(torch.bfloat16)
    if ".q_proj." in name:
        value = _hf_row_order(value, config["num_attention_heads"])
    elif ".k_proj." in name:
        value = _hf_row_order(value, config["num_key_value_heads"])
    return value.contiguous()


def _hf_row_order(value: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of q and k rows: (N, H/2, 2, ...) becomes (N, 2, H/2, ...)."""
    pairs = value.view(heads, -1, 2, *value.shape[1:])
    return pairs.transpose(1, 2).reshape(value.shape)


def _convert_tokenizer(reader: GGUFReader, source: Path, target: Path) -> None:
    if reader.get_field("tokenizer.ggml.tokens") is None:
        return
    try:
        from transformers import AutoTokenizer  # noqa: PLC0415  needed for conversion only
    except ImportError as error:
        raise SetupError("reading a GGUF tokenizer needs transformers: pip install 'tsqp[gguf]'.") from error
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(target)


def convert_atomically(source: Path, target: Path, on_progress: Callable[[float], None]) -> None:
    """Convert into a directory beside ``target`` and rename it, so that ``target`` is complete or absent.

    Raises:
        SetupError: the disk is full or cannot be written; the partial result is removed.
    """
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
        convert(source, partial, on_progress)
        if not target.exists():
            partial.rename(target)
    except OSError as error:
        raise SetupError(f"cannot write the converted model to {target.parent}: {error.strerror or error}.") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
