"""Writes tiny GGUF files of the llama architecture as llama.cpp's converter does, to test ours against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, quants
from torch import Tensor
from transformers import LlamaForCausalLM

Array = npt.NDArray[np.generic]
Weights = dict[str, tuple[Array, Kind]]

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_K_BLOCK = 256


def gguf_name(name: str) -> str:
    """Translate a Hugging Face tensor name into GGUF's."""
    module, _, suffix = name.rpartition(".")
    if module in _TOP_NAMES:
        return f"{_TOP_NAMES[module]}.{suffix}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.{suffix}"


def llama_cpp_rows(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """Return which Hugging Face row each q or k row of a GGUF file holds: both halves of a rotary pair side by side."""
    half = rows // heads // 2
    return np.array(
        [head * 2 * half + side * half + i for head in range(heads) for i in range(half) for side in (0, 1)]
    )


def heads_of(name: str, model: LlamaForCausalLM) -> int | None:
    """Return how many heads the rows of a tensor are reordered by; None if they are not."""
    config: Any = model.config
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else None


def quantised(model: LlamaForCausalLM, kind: Kind, seed: int = 0) -> Weights:
    """Return a model's tensors as GGUF stores them: by GGUF name, rows reordered, matrices in ``kind``, others F32.

    K-quants cannot be made by the package: their blocks are random, with scales that give weights of ordinary size.
    """
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    for name, value in stored_parameters(model).items():
        array = value.numpy()
        if heads := heads_of(name, model):
            array = array[llama_cpp_rows(len(array), heads)]
        if array.ndim == 1:
            weights[gguf_name(name)] = array, Kind.F32
        elif kind in _RANDOM_BLOCKS:
            weights[gguf_name(name)] = _random_rows(rng, kind, array.shape), kind
        else:
            weights[gguf_name(name)] = quants.quantize(array, kind), kind
    return weights


def stored_parameters(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Return the parameters that a checkpoint stores: a tied head is left out."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load_dequantised(model: LlamaForCausalLM, weights: Weights) -> None:
    """Put the values that GGUF tensors stand for into the model, rows back in Hugging Face's order."""
    with torch.no_grad():
        for name, parameter in stored_parameters(model).items():
            array, kind = weights[gguf_name(name)]
            value = quants.dequantize(array, kind)
            if heads := heads_of(name, model):
                restored = np.empty_like(value)
                restored[llama_cpp_rows(len(value), heads)] = value
                value = restored
            parameter.copy_(torch.from_numpy(value))


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    weights: Weights,
    *,
    architecture: str = "llama",
    edit: Callable[[GGUFWriter], None] = lambda _writer: None,
) -> Path:
    """Write a GGUF file.

    Args:
        path: of the file.
        model: gives the sizes.
        weights: as ``quantised`` returns them, perhaps changed.
        architecture: as the metadata call it.
        edit: adds further metadata.

    Returns:
        The path.
    """
    config: Any = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    edit(writer)
    for name, (array, kind) in weights.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _random_rows(rng: np.random.Generator, kind: Kind, shape: tuple[int, ...]) -> Array:
    rows, columns = shape
    blocks = [_RANDOM_BLOCKS[kind](rng) for _ in range(rows * columns // _K_BLOCK)]
    return np.frombuffer(b"".join(blocks), dtype=np.uint8).reshape(rows, -1)


def _q4_k_block(rng: np.random.Generator) -> bytes:
    """Two float16 scales (of 6-bit scales and minima), 12 bytes that pack these, 128 bytes of 4-bit codes."""
    scales = np.array([rng.uniform(5e-5, 1.5e-4), rng.uniform(4e-4, 1.1e-3)], dtype=np.float16)
    return scales.tobytes() + rng.bytes(12) + rng.bytes(128)


def _q6_k_block(rng: np.random.Generator) -> bytes:
    """128 + 64 bytes of 6-bit codes, 16 signed scales, then their float16 scale."""
    return rng.bytes(128) + rng.bytes(64) + rng.bytes(16) + np.array([rng.uniform(2e-5, 7e-5)], np.float16).tobytes()


_RANDOM_BLOCKS: dict[Kind, Callable[[np.random.Generator], bytes]] = {Kind.Q4_K: _q4_k_block, Kind.Q6_K: _q6_k_block}
