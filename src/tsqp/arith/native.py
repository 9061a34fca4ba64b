"""Native CPU kernels (``tsqp._native``, sources in ``native/``): whether they are there, and checked calls of them.

Kernels of integers have twins in PyTorch beside their callers, which give the same bits and serve where the extension
is not built. Products and attention of floats are PyTorch's there, in another order of additions. The extension sees
addresses and sizes only, so dtype, shape, layout and alignment are checked here, on every call.

``TSQP_NATIVE`` (docs/configuration.md) chooses an instruction set below the processor's best one, or ``off``. It
changes speed, and the last bits of what is computed in floats.

Shapes: M rows, K inputs, N outputs, P panels of codes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tsqp.errors import ConfigError, ExactnessError

_reason = ""
try:
    from tsqp import _native as _extension
except ImportError as _error:
    _extension = None  # type: ignore[assignment]
    _reason = str(_error)

VARIABLE = "TSQP_NATIVE"
# In order: a processor that has one has those before it. The numbers are native.h's.
INSTRUCTION_SETS = ("portable", "avx2", "avx512-vnni")
_OFF = "off"
# Outputs of a panel, and inputs of a pair, in the layout of codes.
PANEL = 16
PAIR = 2


class Scaling(NamedTuple):
    """What turns integer products into real ones.

    Attributes:
        rows_M1: scales of the activations, float64.
        columns_N: scales of the weights, float32.
        bias_N: float32, or None.
    """

    rows_M1: Tensor
    columns_N: Tensor
    bias_N: Tensor | None = None

    def part(self, rows: slice) -> Scaling:
        """Return that of some rows."""
        return self._replace(rows_M1=self.rows_M1[rows])

    def readable(self) -> Scaling:
        """Return it as the extension reads it; to be kept until the call is over."""
        bias_N = None if self.bias_N is None else _readable(self.bias_N)
        return Scaling(_readable(self.rows_M1), _readable(self.columns_N), bias_N)

    def addresses(self, rows: int, outputs: int) -> tuple[int, int, int]:
        """Return where its tensors lie.

        Raises:
            ExactnessError: other dtypes or shapes.
        """
        return (
            _address(self.rows_M1, torch.float64, rows, 1),
            _address(self.columns_N, torch.float32, outputs),
            0 if self.bias_N is None else _address(self.bias_N, torch.float32, outputs),
        )


@dataclass(frozen=True, slots=True)
class Kernels:
    """The extension, with one of this processor's instruction sets."""

    instructions: str

    def multiply(self, x_MK: Tensor, panels: Tensor, y_MN: Tensor) -> None:
        """Store x W^T modulo 2^32 in y; see ``ring.NativeKernel``.

        Args:
            x_MK: int32.
            panels: int8, shape (P, ceil(K / 2), 16, 2), contiguous.
            y_MN: int32, contiguous.

        Raises:
            ExactnessError: other dtypes, shapes or layouts.
        """
        (rows, inputs), outputs = x_MK.shape, y_MN.shape[-1]
        x_MK = _readable(x_MK)
        _extension.multiply(
            _address(x_MK, torch.int32, rows, inputs),
            _address(panels, torch.int8, -(-outputs // PANEL), -(-inputs // PAIR), PANEL, PAIR),
            _address(y_MN, torch.int32, rows, outputs),
            rows,
            inputs,
            outputs,
            self._level,
            torch.get_num_threads(),
        )

    @property
    def multiplies_floats(self) -> bool:
        """Whether there is ``multiply_floats``: the portable instructions have none."""
        return self._level > 0

    def multiply_floats(self, x_MK: Tensor, panels: Tensor, bias_N: Tensor | None, y_MN: Tensor) -> None:
        """Store x W^T (+ b) in y; see ``arith/panels.py``.

        Args:
            x_MK: float32, K at least 1; another process may change it meanwhile.
            panels: float32, shape (P, K, 16), contiguous.
            bias_N: float32.
            y_MN: float32, contiguous; apart from x, and each element is written once.

        Raises:
            ExactnessError: other dtypes, shapes or layouts.
        """
        (rows, inputs), outputs = x_MK.shape, y_MN.shape[-1]
        if not inputs:
            raise ExactnessError("a native kernel takes at least one input.")
        x_MK = _readable(x_MK)
        bias_N = None if bias_N is None else _readable(bias_N)
        _extension.multiply_floats(
            _address(x_MK, torch.float32, rows, inputs),
            _address(panels, torch.float32, -(-outputs // PANEL), inputs, PANEL),
            0 if bias_N is None else _address(bias_N, torch.float32, outputs),
            _address(y_MN, torch.float32, rows, outputs),
            rows,
            inputs,
            outputs,
            self._level,
            torch.get_num_threads(),
        )

    def quantize(self, x_MK: Tensor, factor: float) -> tuple[Tensor, Tensor, int]:
        """Return round(x / s) as int32, s = ||x|| factor as float64 (M, 1), and how many rows are not finite.

        Args:
            x_MK: float32.
            factor: at least 0; see ``quantize_activations``.

        Raises:
            ExactnessError: another dtype or shape.
        """
        rows, inputs = x_MK.shape
        x_MK = _readable(x_MK)
        xq_MK = torch.empty(rows, inputs, dtype=torch.int32)
        scale_M1 = torch.empty(rows, 1, dtype=torch.float64)
        failures = _extension.quantize(
            _address(x_MK, torch.float32, rows, inputs),
            factor,
            _address(xq_MK, torch.int32, rows, inputs),
            _address(scale_M1, torch.float64, rows, 1),
            rows,
            inputs,
            self._level,
            torch.get_num_threads(),
        )
        return xq_MK, scale_M1, failures

    def dequantize(self, y_MN: Tensor, scaling: Scaling, real_MN: Tensor) -> None:
        """Store (float) y s_x s_j (+ bias) in ``real_MN``, float32 and contiguous, which may be y's own memory.

        Raises:
            ExactnessError: other dtypes, shapes or layouts.
        """
        rows, outputs = y_MN.shape
        y_MN, scaling = _readable(y_MN), scaling.readable()
        _extension.dequantize(
            _address(y_MN, torch.int32, rows, outputs),
            *scaling.addresses(rows, outputs),
            _address(real_MN, torch.float32, rows, outputs),
            rows,
            outputs,
            self._level,
            torch.get_num_threads(),
        )

    def dots(self, words_MN: Tensor, limbs_3N: Tensor) -> Tensor:
        """Return the inner products of words with a vector modulo 2^61 - 1: int64, shape (M,).

        Args:
            words_MN: int32.
            limbs_3N: the vector's limbs of 21 bits, int32.

        Raises:
            ExactnessError: other dtypes, shapes or layouts.
        """
        return self._prepared(limbs_3N, tuple(words_MN.shape), None, None, None)(words_MN)

    def unmasking(
        self, limbs_3N: Tensor, masks_MN: Tensor | None, out_MN: Tensor, scaling: Scaling | None
    ) -> Callable[[Tensor], Tensor]:
        """Return a function that takes masks off words, stores what they are, and returns what ``dots`` does of it.

        The words may be memory that another process changes meanwhile: each is read once. The function is for one call.

        Args:
            limbs_3N: the vector's limbs of 21 bits, int32.
            masks_MN: int32, subtracted modulo 2^32.
            out_MN: where to store the difference; int32, contiguous.
            scaling: store instead what ``dequantize`` would make of it, float32 in the memory of ``out_MN``.

        Raises:
            ExactnessError: other dtypes, shapes or layouts; also from the function.
        """
        return self._prepared(limbs_3N, tuple(out_MN.shape), masks_MN, out_MN, scaling)

    def _prepared(
        self,
        limbs_3N: Tensor,
        shape: tuple[int, ...],
        masks_MN: Tensor | None,
        out_MN: Tensor | None,
        scaling: Scaling | None,
    ) -> Callable[[Tensor], Tensor]:
        rows, length = shape
        # What the addresses are of must live until the call is over.
        kept = limbs_3N, masks_MN, scaling = (
            _readable(limbs_3N),
            None if masks_MN is None else _readable(masks_MN),
            None if scaling is None else scaling.readable(),
        )
        dots_M = torch.empty(rows, dtype=torch.int64)
        addresses = (
            0 if masks_MN is None else _address(masks_MN, torch.int32, rows, length),
            0 if out_MN is None else _address(out_MN, torch.int32, rows, length),
            _address(limbs_3N, torch.int32, 3, length),
            _address(dots_M, torch.int64, rows),
            *((0, 0, 0) if scaling is None else scaling.addresses(rows, length)),
        )

        def dots(words_MN: Tensor, _kept: object = (kept, out_MN)) -> Tensor:
            words_MN = _readable(words_MN)
            at = _address(words_MN, torch.int32, rows, length)
            _extension.dots(at, *addresses, rows, length, self._level, torch.get_num_threads())
            return dots_M

        return dots

    @property
    def attends(self) -> bool:
        """Whether ``attend`` is there."""
        return self.instructions == INSTRUCTION_SETS[-1]

    def attend(self, q_BTNH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, out_BTNH: Tensor) -> None:
        """Store softmax(q k^T / sqrt(H)) v, causal, for the last T of S tokens; see ``causal_attention``.

        Args:
            q_BTNH: float32, as the others; the last dimension contiguous.
            k_BGSH: key-value heads serve N / G query heads each.
            v_BGSH: as keys.
            out_BTNH: contiguous.

        Raises:
            ExactnessError: other dtypes, shapes or layouts, or the instruction set lacks it.
        """
        if not self.attends:
            raise ExactnessError(f"there is no native attention for {self.instructions}.")
        batch, tokens, heads, size = q_BTNH.shape
        kv_heads, total = k_BGSH.shape[1:3]
        if not kv_heads or heads % kv_heads or total < tokens:
            raise ExactnessError(f"{heads} heads cannot share {kv_heads}, nor {tokens} tokens be the last of {total}.")
        _extension.attend(
            _strided(q_BTNH, batch, tokens, heads, size),
            _strided(k_BGSH, batch, kv_heads, total, size),
            _strided(v_BGSH, batch, kv_heads, total, size),
            _address(out_BTNH, torch.float32, batch, tokens, heads, size),
            (batch, tokens, total, heads, kv_heads, size),
            q_BTNH.stride()[:3],
            k_BGSH.stride()[:3],
            v_BGSH.stride()[:3],
            torch.get_num_threads(),
        )

    @property
    def _level(self) -> int:
        return INSTRUCTION_SETS.index(self.instructions)


def _readable(tensor: Tensor) -> Tensor:
    """Return a tensor as the extension reads it, a copy where rows are strided or elements not aligned."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _address(tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
    address = tensor.data_ptr()
    right = tensor.dtype == dtype and tensor.shape == shape and tensor.is_cpu and tensor.is_contiguous()
    if not right or address % dtype.itemsize:
        raise ExactnessError(
            f"a native kernel takes contiguous {dtype} {list(shape)} on the cpu, "
            f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {list(tensor.stride())}."
        )
    return address


def _strided(tensor: Tensor, *shape: int) -> int:
    if (tensor.dtype, tensor.shape, tensor.is_cpu) != (torch.float32, shape, True) or tensor.stride(-1) != 1:
        raise ExactnessError(
            f"a native kernel takes torch.float32 {list(shape)} on the cpu with a contiguous last dimension, "
            f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {list(tensor.stride())}."
        )
    return tensor.data_ptr()


def available() -> tuple[str, ...]:
    """Return the instruction sets that can be used, the best last; none where the extension is not built."""
    return INSTRUCTION_SETS[: _extension.best() + 1] if _extension else ()


@cache
def kernels() -> Kernels | None:
    """Return the kernels to use in this process; None if PyTorch's twins are to be used.

    Raises:
        ConfigError: ``TSQP_NATIVE`` names no instruction set, or one that this processor or installation lacks.
    """
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return Kernels(available()[-1]) if available() else None
    if asked == _OFF:
        return None
    if asked not in INSTRUCTION_SETS:
        raise ConfigError(
            f"{VARIABLE}={asked}: expected {_OFF}, {', '.join(INSTRUCTION_SETS[:-1])} or {INSTRUCTION_SETS[-1]}."
        )
    if asked not in available():
        found = f"this processor has {', '.join(available())}" if available() else f"they are not built ({_reason})"
        raise ConfigError(f"{VARIABLE}={asked}: native kernels cannot use it; {found}.")
    return Kernels(asked)


def notice() -> str | None:
    """Return what to tell the user in a sentence where PyTorch's slower twins serve; None where all is well."""
    if kernels():
        return None
    if _extension:
        return f"{VARIABLE}={_OFF}: exact products, checks and scaling are computed by PyTorch, slower."
    return (
        "the native kernels are not built, so exact products, checks and scaling are computed by PyTorch, slower: "
        "install a C compiler, then tsqp again."
    )
