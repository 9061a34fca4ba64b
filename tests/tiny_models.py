"""Makes tiny random LLaMA checkpoints, and the reference that tests compare TSQP's model with: transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as PlainTokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tsqp.model.architecture import read_config, weight_shapes
from tsqp.model.linears import Linears
from tsqp.model.llama import Llama
from tsqp.model.ops import LocalOps, read_state
from tsqp.model.weights import INDEX_NAME, Checkpoint

TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

# 8 rotary pairs of wavelengths 6.3 to 6.1e5 positions. Against an original context of 512 their turns are 81 to
# 8e-4: above 4 (kept), from 1 to 4 (interpolated; about 3.06 for the third) and below 1 (divided by the factor).
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def tiny_reference(seed: int = 0, gain: float = 1.5, **options: Any) -> LlamaForCausalLM:
    """Build transformers' model with random weights; nothing in it is zero or one by default.

    Args:
        seed: of the weights.
        gain: what matrices multiply the scale of their input by; attention scores have the size of its square.
        options: of transformers' LlamaConfig, over ``TINY``.
    """
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**{**TINY, **options})).eval()
    randomise(model, seed, gain)
    return model


def randomise(model: nn.Module, seed: int, gain: float = 1.5) -> None:
    """Draw every parameter: matrices of a given gain, biases, and norm weights around one.

    A gain of 1.5 makes attention prefer some tokens, so that a wrong mask or rotation shows.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.5 * drawn)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * drawn)
            else:
                scale = 1.0 if "embed_tokens" in name else gain / parameter.shape[1] ** 0.5
                parameter.copy_(scale * drawn)


def tiny_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    gain: float = 1.5,
    stored: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    old_config: bool = False,
    **options: Any,
) -> Path:
    """Save a tiny random model as transformers does.

    Args:
        directory: where to; made if need be.
        seed: of the weights.
        gain: as ``tiny_reference`` takes it.
        stored: dtype of the tensors in the files.
        max_shard_size: in transformers' notation; "20KB" gives several files.
        old_config: write config.json as transformers 4 did (``rope_theta`` and ``rope_scaling``).
        options: of transformers' LlamaConfig, over ``TINY``.

    Returns:
        The directory.
    """
    model: Any = tiny_reference(seed, gain, **options)
    model.to(stored).save_pretrained(directory, max_shard_size=max_shard_size)
    if old_config:
        edit_json(directory / "config.json", _as_transformers_4)
    return directory


def tiny_checkpoint_with_words(directory: Path, **options: Any) -> Path:
    """Save one with a tokenizer whose tokens are the words w0 to w100; see ``tiny_checkpoint``."""
    directory = tiny_checkpoint(directory, **options)
    plain = PlainTokenizer(WordLevel({f"w{index}": index for index in range(101)}, unk_token="w0"))  # noqa: S106
    plain.save(str(directory / "tokenizer.json"))
    return directory


def large_checkpoint_of(config: dict[str, Any], directory: Path) -> Path:
    """Write constant float32 weights for a config.json: one file for what layers share and one per layer."""
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    files: dict[str, dict[str, Tensor]] = {}
    for name, shape in weight_shapes(read_config(directory)).items():
        part = name.split(".")[2] if ".layers." in name else "shared"
        files.setdefault(f"{part}.safetensors", {})[name] = torch.full(shape, 0.5)
    for file, tensors in files.items():
        save_file(tensors, directory / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return directory


def _as_transformers_4(config: dict[str, Any]) -> None:
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    config["rope_scaling"] = None if scaling == {"type": "default"} else scaling
    config["torch_dtype"] = config.pop("dtype")


def edit_json(path: Path, edit: Any) -> None:
    """Load a JSON file, let ``edit`` change the object in place, and write it back."""
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def load_linears(directory: Path, dtype: torch.dtype = torch.float32) -> Linears:
    """Load a checkpoint's linear modules on the CPU."""
    return Linears(read_config(directory), Checkpoint(directory), dtype, torch.device("cpu"))


def load_llama(directory: Path, dtype: torch.dtype = torch.float32, *, offload_attention: bool = False) -> Llama:
    """Load TSQP's model over ``LocalOps``."""
    linears = load_linears(directory, dtype)
    ops = LocalOps(linears, read_state(linears, Checkpoint(directory)))
    return Llama(linears.config, ops, offload_attention=offload_attention)


@torch.inference_mode()
def reference_logits(model: Any, ids_BT: Tensor) -> Tensor:
    """Return transformers' float32 logits at every position, shape (B, T, V)."""
    logits_BTV: Tensor = model(ids_BT, use_cache=False).logits
    return logits_BTV.float()


def reference_from(directory: Path, **options: Any) -> LlamaForCausalLM:
    """Load a directory with transformers, in float32 unless told otherwise."""
    settings = {"dtype": torch.float32, "local_files_only": True, **options}
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(directory, **settings).eval()
    return model


def random_ids(batch: int, tokens: int, vocab_size: int = TINY["vocab_size"], seed: int = 1) -> Tensor:
    """Draw token ids, shape (B, T)."""
    return torch.randint(vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def position_errors(ours_BTV: Tensor, reference_BTV: Tensor) -> Tensor:
    """Return max |difference| / max |logit| of every position, shape (B, T)."""
    return (ours_BTV - reference_BTV).abs().amax(-1) / reference_BTV.abs().amax(-1)


def assert_same_logits(ours: Tensor, reference: Tensor, tolerance: float = 1e-4) -> None:
    """Fail unless every position agrees within ``tolerance`` and chooses the same token."""
    assert ours.shape == reference.shape
    assert ours.dtype == torch.float32
    worst = position_errors(ours, reference).max().item()
    assert worst <= tolerance, f"logits differ by {worst:.2e} of the largest, allowed {tolerance:.0e}"
    assert torch.equal(ours.argmax(-1), reference.argmax(-1))
