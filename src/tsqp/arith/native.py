"""Native CPU kernels (``tsqp._native``, sources in ``native/``): whether they are there, and checked calls of them.

Kernels of integers have twins in PyTorch beside their callers, which give the same bits and serve where the extension
is not built. Products of floats, attention and the layers between are PyTorch's there, which rounds otherwise. The
extension sees addresses and sizes only, so dtype, shape, layout and alignment are checked here, on every call.

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

from tsqp.arith import extension
from tsqp.arith.extension import INSTRUCTION_SETS, address, readable, readable_rows, separate_rows, strided
from tsqp.arith.layer_kernels import LayerKernels
from tsqp.errors import ConfigError, ExactnessError

_extension, _reason = extension.module, extension.reason

VARIABLE = "TSQP_NATIVE"
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
        bias_N = None if self.bias_N is None else readable(self.bias_N)
        return Scaling(readable(self.rows_M1), readable(self.columns_N), bias_N)

    def addresses(self, rows: int, outputs: int) -> tuple[int, int, int]:
        """Return where its tensors lie.

        Raises:
            ExactnessError: other dtypes or shapes.
        """
        return (
            address(self.rows_M1, torch.float64, rows, 1),
            address(self.columns_N, torch.float32, outputs),
            0 if self.bias_N is None else address(self.bias_N, torch.float32, outputs),
        )


@dataclass(frozen=True, slots=True)
class Kernels(LayerKernels):
    """The extension, with one of this processor's instruction sets."""

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
        x_MK = readable(x_MK)
        _extension.multiply(
            address(x_MK, torch.int32, rows, inputs),
            address(panels, torch.int8, -(-outputs // PANEL), -(-inputs // PAIR), PANEL, PAIR),
            address(y_MN, torch.int32, rows, outputs),
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
            x_MK: float32, K at least 1; another process may change it meanwhile. Rows may be of wider ones.
            panels: float32, shape (P, K, 16), contiguous.
            bias_N: float32.
            y_MN: float32, rows perhaps of wider ones; apart from x, and each element is written once.

        Raises:
            ExactnessError: other dtypes, shapes or layouts.
        """
        (rows, inputs), outputs = x_MK.shape, y_MN.shape[-1]
        if not inputs:
            raise ExactnessError("a native kernel takes at least one input.")
        x_MK = readable_rows(x_MK)
        bias_N = None if bias_N is None else readable(bias_N)
        _extension.multiply_floats(
            strided(x_MK, rows, inputs),
            address(panels, torch.float32, -(-outputs // PANEL), inputs, PANEL),
            0 if bias_N is None else address(bias_N, torch.float32, outputs),
            separate_rows(y_MN, rows, outputs),
            (rows, inputs, outputs),
            (x_MK.stride(0), y_MN.stride(0)),
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
        x_MK = readable(x_MK)
        xq_MK = torch.empty(rows, inputs, dtype=torch.int32)
        scale_M1 = torch.empty(rows, 1, dtype=torch.float64)
        failures = _extension.quantize(
            address(x_MK, torch.float32, rows, inputs),
            factor,
            address(xq_MK, torch.int32, rows, inputs),
            address(scale_M1, torch.float64, rows, 1),
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
        y_MN, scaling = readable(y_MN), scaling.readable()
        _extension.dequantize(
            address(y_MN, torch.int32, rows, outputs),
            *scaling.addresses(rows, outputs),
            address(real_MN, torch.float32, rows, outputs),
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
            readable(limbs_3N),
            None if masks_MN is None else readable(masks_MN),
            None if scaling is None else scaling.readable(),
        )
        dots_M = torch.empty(rows, dtype=torch.int64)
        addresses = (
            0 if masks_MN is None else address(masks_MN, torch.int32, rows, length),
            0 if out_MN is None else address(out_MN, torch.int32, rows, length),
            address(limbs_3N, torch.int32, 3, length),
            address(dots_M, torch.int64, rows),
            *((0, 0, 0) if scaling is None else scaling.addresses(rows, length)),
        )

        def dots(words_MN: Tensor, _kept: object = (kept, out_MN)) -> Tensor:
            words_MN = readable(words_MN)
            at = address(words_MN, torch.int32, rows, length)
            _extension.dots(at, *addresses, rows, length, self._level, torch.get_num_threads())
            return dots_M

        return dots


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
