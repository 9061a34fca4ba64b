"""The non-linear parts: RMSNorm, rotary embedding, SwiGLU. At `open` the worker computes those within ``chains``.

Native kernels compute them where they are built, PyTorch's operators elsewhere; the two round differently. Either way a
token's bits depend on that token only. For the operators this relies on one thread, since threads cut rows anywhere
and an operator's last elements before a cut may round otherwise than whole vectors; on rows being cut into vectors
each by itself, which a dimension of strided rows ensures; and on products and sums that are rounded one by one.

Shapes: B batch, T tokens, M rows, D hidden, F FFN, E = 2F gate and up, N heads, H head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tsqp.arith import extension, native
from tsqp.model.architecture import LlamaConfig
from tsqp.threads import using_threads

# Cosines and signed sines of some positions, float32 (T, H) each; the sine's first half is negated.
Angles = tuple[Tensor, Tensor]

# Positions whose angles are computed together: few enough that PyTorch uses one thread, whatever the head size.
_POSITIONS = 128


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Scale each token to unit root mean square, then by ``weight_D`` (Zhang and Sennrich 2019)."""
    kernels = native.kernels()
    if not kernels:
        with using_threads(1):
            return _norm_rows(x_BTD, weight_D, eps)
    x_MD = extension.readable(x_BTD).flatten(0, -2)
    out_MD = torch.empty_like(x_MD)
    kernels.rms_norm(x_MD, weight_D, eps, out_MD)
    return out_MD.view(x_BTD.shape)


def add_rms_norm(x_MD: Tensor, added_MD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Add to ``x_MD`` in place, then return its ``rms_norm``.

    Args:
        x_MD: the residual stream, float32, contiguous.
        added_MD: float32.
        weight_D: float32.
        eps: added to the mean of the squares.
    """
    kernels = native.kernels()
    if not kernels:
        return rms_norm(x_MD.add_(added_MD), weight_D, eps)
    out_MD = torch.empty_like(x_MD)
    kernels.rms_norm(x_MD, weight_D, eps, out_MD, extension.readable_rows(added_MD), x_MD)
    return out_MD


def _norm_rows(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Compute ``rms_norm`` by PyTorch. Each operation but the sum is rounded as IEEE says, in a vector or alone."""
    squares_BT1 = x_BTD.double().square().sum(-1, keepdim=True)
    return x_BTD * (squares_BT1 / x_BTD.shape[-1] + eps).sqrt().reciprocal().float() * weight_D


def swiglu(gate_up_BTE: Tensor) -> Tensor:
    """Return SiLU(gate) * up for the two halves of the last dimension (Shazeer 2020). May overwrite the input."""
    size = gate_up_BTE.shape[-1] // 2
    kernels = native.kernels()
    if not kernels:
        gate_BTF, up_BTF = gate_up_BTE.chunk(2, dim=-1)
        with using_threads(1):
            return functional.silu(gate_BTF, inplace=True) * up_BTF
    gate_up_ME = gate_up_BTE.flatten(0, -2)
    out_MF = torch.empty(len(gate_up_ME), size)
    kernels.swiglu(gate_up_ME, out_MF)
    return out_MF.view(*gate_up_BTE.shape[:-1], size)


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
    """Cosines and signed sines of every position computed so far, grown when a longer prompt comes.

    They are computed for ``_POSITIONS`` at a time, so that a position's bits do not depend on what was asked for.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self._frequencies = rope_frequencies(config)
        self._cos_TH = self._sin_TH = torch.empty(0, config.head_size)

    def between(self, first: int, end: int) -> Angles:
        """Return those of positions first to end - 1."""
        self._grow(end)
        return self._cos_TH[first:end], self._sin_TH[first:end]

    def at(self, positions_M: Tensor) -> Angles:
        """Return those of some positions, int64."""
        self._grow(int(positions_M.max()) + 1 if len(positions_M) else 0)
        return self._cos_TH[positions_M], self._sin_TH[positions_M]

    def _grow(self, end: int) -> None:
        missing = range(len(self._cos_TH), end, _POSITIONS)
        if not missing:
            return
        cos, sin = [self._cos_TH], [self._sin_TH]
        for first in missing:
            positions = torch.arange(first, first + _POSITIONS, dtype=torch.float32)
            angles = torch.outer(positions, self._frequencies)
            cos.append(angles.cos().repeat(1, 2))
            sin.append(torch.cat((-angles.sin(), angles.sin()), dim=-1))
        self._cos_TH, self._sin_TH = torch.cat(cos), torch.cat(sin)


def rotate(x_BTNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Apply rotary embedding to queries or keys: dimension i is paired with i + H/2, as checkpoints are stored.

    Args:
        x_BTNH: float32; or rows, of shape (M, N, H).
        cos_TH: cosines of the tokens' positions, the same for each sequence; or of the rows'; or of one position
            for all.
        sin_TH: signed sines.
    """
    kernels = native.kernels()
    if not kernels:
        return _rotated(x_BTNH, cos_TH, sin_TH)
    x_MNH = x_BTNH.flatten(0, -3)
    tokens = x_BTNH.shape[-3]
    cos_TH, sin_TH = cos_TH.expand(tokens, -1), sin_TH.expand(tokens, -1)
    if len(x_MNH) != tokens:
        cos_TH, sin_TH = cos_TH.repeat(len(x_BTNH), 1), sin_TH.repeat(len(x_BTNH), 1)
    out_MNH = torch.empty(x_MNH.shape)
    kernels.rotate(x_MNH, cos_TH, sin_TH, out_MNH)
    return out_MNH.view(x_BTNH.shape)


def rotate_rows(x_MNH: Tensor, cos_MH: Tensor, sin_MH: Tensor) -> None:
    """Apply it in place, each row with its own position's cosines and sines.

    Args:
        x_MNH: queries and keys, float32; a view of wider rows, if the heads' numbers are contiguous.
        cos_MH: cosines, float32.
        sin_MH: signed sines, float32.
    """
    kernels = native.kernels()
    if kernels:
        kernels.rotate(x_MNH, cos_MH, sin_MH, x_MNH)
    else:
        x_MNH.copy_(_rotated(x_MNH, cos_MH, sin_MH))


def _rotated(x_BTNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Return it computed by PyTorch: the native kernel's operations, rounded one by one."""
    swapped = x_BTNH.roll(x_BTNH.shape[-1] // 2, dims=-1)
    return (x_BTNH * cos_TH[:, None]).add_(swapped.mul_(sin_TH[:, None]))
