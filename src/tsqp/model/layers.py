"""The non-linear parts that stay in the enclave: RMSNorm, rotary embedding, SwiGLU.

Shapes: B batch, T tokens, D hidden, F FFN, E = 2F gate and up, N heads, H head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tsqp.model.architecture import LlamaConfig


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Scale each token to unit root mean square, then by ``weight_D`` (Zhang and Sennrich 2019)."""
    return functional.rms_norm(x_BTD, (x_BTD.shape[-1],), weight_D, eps)


def swiglu(gate_up_BTE: Tensor) -> Tensor:
    """Return SiLU(gate) * up for the two halves of the last dimension (Shazeer 2020). Overwrites the input."""
    gate_BTF, up_BTF = gate_up_BTE.chunk(2, dim=-1)
    return functional.silu(gate_BTF, inplace=True) * up_BTF


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Return the angle per position of each of the H/2 rotary pairs, float32.

    References:
        Su et al. 2021; ``linear``: Chen et al. 2023; ``llama3``: as in Meta's published Llama 3.1 code, where
        wavelengths above the original context are divided by ``factor``, short ones kept, those between interpolated.
    """
    rope = config.rope
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.int64).float() / config.head_size
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_context_length / wavelengths
    smooth = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


class RotaryTable:
    """Cosines and signed sines of every position computed so far, grown when a longer prompt comes."""

    def __init__(self, config: LlamaConfig) -> None:
        self._frequencies = rope_frequencies(config)
        self._cos_TH = self._sin_TH = torch.empty(0, config.head_size)

    def between(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of positions first to end - 1, each (T, H); the sine's first half is negated."""
        if end > len(self._cos_TH):
            angles = torch.outer(torch.arange(end, dtype=torch.float32), self._frequencies)
            sin = angles.sin()
            self._cos_TH = angles.cos().repeat(1, 2)
            self._sin_TH = torch.cat((-sin, sin), dim=-1)
        return self._cos_TH[first:end], self._sin_TH[first:end]


def rotate(x_BTNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Apply rotary embedding to queries or keys: dimension i is paired with i + H/2, as checkpoints are stored."""
    swapped = x_BTNH.roll(x_BTNH.shape[-1] // 2, dims=-1)
    return (x_BTNH * cos_TH[:, None]).addcmul_(swapped, sin_TH[:, None])
