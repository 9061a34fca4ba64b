"""Products modulo 2^32: int32 residues times int8 codes, exactly, on whatever this machine computes fastest.

Shapes: M rows, K inputs, N outputs. A residue is an int32 word and its addition wraps. Codes lie in [-127, 127].

Each kernel states why none of its sums can round or overflow. ``kernel_for`` compares a kernel with Python integers
before it hands it out, on inputs chosen to break it; one that errs is never used. docs/arithmetic.md, "Exact products".
"""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tsqp.arith import native
from tsqp.errors import ExactnessError
from tsqp.threads import using_threads

# float64 holds every integer up to 2^53. |x| <= 2^31 and |w| < 2^7, so K products sum to less than K 2^38.
FLOAT64_MAX_K = 1 << 15

# int8 lies in [-128, 127]: K products sum to at most K 2^14 <= 2^31 - 1.
INT8_MAX_K = ((1 << 31) - 1) // (1 << 14)
_LIMBS = 4
# 0x80808080 as an int32: added to x, it turns the bytes of the sum into balanced limbs, each plus 128.
_OFFSET = 0x80808080 - (1 << 32)
# torch._int_mm on CUDA takes more than 16 rows, and multiples of 8 inputs and outputs.
CUDA_MIN_ROWS = 17
CUDA_MULTIPLE = 8
_LIMB_BLOCK = INT8_MAX_K // CUDA_MULTIPLE * CUDA_MULTIPLE
# Element-wise operations on fewer elements than this run in one thread (docs/performance.md).
_WORTH_THREADS = 1 << 21
# How many codes are widened to float64 at a time: 32 MB.
_WIDENED = 1 << 22


class Kernel(Protocol):
    """One way to multiply, and the layout of codes that it reads."""

    name: str

    def lay_out(self, w_NK: Tensor) -> Tensor:
        """Return int8 codes of shape (N, K) as this kernel reads them: a copy, or contiguous codes themselves."""

    def plain(self, codes: Codes, first: int, rows: int) -> Tensor:
        """Return rows of laid-out codes again: int8, shape (rows, K)."""

    def multiply(self, x_MK: Tensor, codes: Codes, out_MN: Tensor) -> None:
        """Store x W^T modulo 2^32.

        Args:
            x_MK: int32 residues.
            codes: of this kernel, on the same device.
            out_MN: int32, contiguous, on the same device.
        """


@dataclass(frozen=True, slots=True)
class Codes:
    """int8 codes W of shape (N, K) in the layout of the kernel that multiplies by them.

    Attributes:
        rows: N.
        inputs: K.
        laid_out: the codes; only the kernel knows how they lie.
        kernel: multiplies by them.
    """

    rows: int
    inputs: int
    laid_out: Tensor
    kernel: Kernel

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.laid_out.device

    @property
    def nbytes(self) -> int:
        """What they take."""
        return self.laid_out.nbytes

    def plain(self, first: int = 0, rows: int | None = None) -> Tensor:
        """Return rows ``first`` to ``first + rows`` as they were given: int8, shape (rows, K). By default all."""
        return self.kernel.plain(self, first, self.rows - first if rows is None else rows)


class _PlainLayout:
    """The codes as they are: contiguous rows."""

    def lay_out(self, w_NK: Tensor) -> Tensor:
        """See ``Kernel.lay_out``."""
        return w_NK.contiguous()

    def plain(self, codes: Codes, first: int, rows: int) -> Tensor:
        """See ``Kernel.plain``."""
        return codes.laid_out[first : first + rows]


class NativeKernel:
    """Pairs of 16-bit limbs times codes in panels of 16 outputs, by ``native/gemm.c``: exact for any K.

    A panel holds, for each pair of inputs, the two codes of each of its outputs. N is padded to 16, K to 2, with zeros.

    Args:
        kernels: the extension.
    """

    def __init__(self, kernels: native.Kernels) -> None:
        self.name = f"native {kernels.instructions}"
        self._kernels = kernels

    def lay_out(self, w_NK: Tensor) -> Tensor:
        """See ``Kernel.lay_out``. A pair is moved as one int16."""
        count, pairs = -(-len(w_NK) // native.PANEL), -(-w_NK.shape[1] // native.PAIR)
        if not count or not pairs:
            return w_NK.new_empty(count, pairs, native.PANEL, native.PAIR)
        padded_NK = _padded(w_NK, count * native.PANEL, pairs * native.PAIR).contiguous()
        if padded_NK.storage_offset() % native.PAIR:
            padded_NK = padded_NK.clone()
        panels = padded_NK.view(torch.int16).view(count, native.PANEL, pairs).transpose(1, 2).contiguous()
        return panels.view(torch.int8).view(count, pairs, native.PANEL, native.PAIR)

    def plain(self, codes: Codes, first: int, rows: int) -> Tensor:
        """See ``Kernel.plain``."""
        panel = first // native.PANEL
        panels = codes.laid_out[panel : -(-(first + rows) // native.PANEL)]
        plain_NK = panels.transpose(1, 2).reshape(len(panels) * native.PANEL, panels.shape[1] * native.PAIR)
        skipped = first - panel * native.PANEL
        return plain_NK[skipped : skipped + rows, : codes.inputs].contiguous()

    def multiply(self, x_MK: Tensor, codes: Codes, out_MN: Tensor) -> None:
        """See ``Kernel.multiply``."""
        self._kernels.multiply(x_MK, codes.laid_out, out_MN)


class Float64Kernel(_PlainLayout):
    """float64 products over blocks of at most 2^15 inputs, within which every sum is an integer below 2^53."""

    name = "float64"

    def multiply(self, x_MK: Tensor, codes: Codes, out_MN: Tensor) -> None:
        """See ``Kernel.multiply``. Blocks' sums wrap in int64, which keeps them right modulo 2^32."""
        w_NK = codes.laid_out
        y_MN = torch.zeros(len(x_MK), len(w_NK), dtype=torch.int64, device=x_MK.device)
        for first in range(0, x_MK.shape[1], FLOAT64_MAX_K):
            x_MB = x_MK[:, first : first + FLOAT64_MAX_K].double()
            step = max(1, _WIDENED // x_MB.shape[1])
            for n in range(0, len(w_NK), step):
                w_SB = w_NK[n : n + step, first : first + FLOAT64_MAX_K].double()
                y_MN[:, n : n + step] += (x_MB @ w_SB.T).to(torch.int64)
        out_MN.copy_(y_MN.to(torch.int32))


class LimbKernel:
    """int8 products of the four balanced base-256 limbs of x, stacked into one product of 4 M rows.

    x = l0 + 2^8 l1 + 2^16 l2 + 2^24 l3 (mod 2^32), limbs in [-128, 127]. A limb's product is an exact int32 for K up to
    ``INT8_MAX_K``; longer rows are cut. The four are shifted and added with wrap (Horner).

    Args:
        multiple: of which the product takes inputs and outputs; codes are laid out with zeros up to there.
        least_rows: that the product takes.
    """

    name = "int8 limbs"

    def __init__(self, multiple: int = 1, least_rows: int = 1) -> None:
        self._multiple, self._least_rows = multiple, least_rows

    def lay_out(self, w_NK: Tensor) -> Tensor:
        """See ``Kernel.lay_out``."""
        rows, inputs = (-(-size // self._multiple) * self._multiple for size in w_NK.shape)
        return _padded(w_NK, rows, inputs).contiguous()

    def plain(self, codes: Codes, first: int, rows: int) -> Tensor:
        """See ``Kernel.plain``."""
        return codes.laid_out[first : first + rows, : codes.inputs].contiguous()

    def multiply(self, x_MK: Tensor, codes: Codes, out_MN: Tensor) -> None:
        """See ``Kernel.multiply``."""
        for first in range(0, x_MK.shape[1], _LIMB_BLOCK):
            block = slice(first, first + _LIMB_BLOCK)
            x_MB, w_NB = x_MK[:, block], codes.laid_out[:, block]
            if first:
                out_MN += self._block(x_MB, w_NB, torch.empty_like(out_MN))
            else:
                self._block(x_MB, w_NB, out_MN)

    def _block(self, x_MK: Tensor, w_NK: Tensor, y_MN: Tensor) -> Tensor:
        with _few_threads(x_MK):
            limbs_LK = limbs(x_MK)
            padded_LK = _padded(limbs_LK, max(len(limbs_LK), self._least_rows), w_NK.shape[1])
        y_IMN = _int_mm(padded_LK, w_NK)[: len(limbs_LK), : y_MN.shape[1]].unflatten(0, (_LIMBS, -1))
        with _few_threads(y_IMN[0]):
            torch.add(y_IMN[2], y_IMN[3], alpha=256, out=y_MN)
            for limb in (1, 0):
                torch.add(y_IMN[limb], y_MN, alpha=256, out=y_MN)
        return y_MN


def _few_threads(x_MK: Tensor) -> AbstractContextManager[None]:
    """Work on few elements in one thread: waking others for each operation takes longer than the operation."""
    return using_threads(1) if not x_MK.is_cuda and x_MK.numel() < _WORTH_THREADS else nullcontext()


def _int_mm(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """Multiply int8 matrices into int32."""
    if a_MK.shape[1] == 1:  # torch 2.13 returns garbage for a single column
        a_MK, b_NK = _padded(a_MK, len(a_MK), 2), _padded(b_NK, len(b_NK), 2)
    product: Tensor = torch._int_mm(a_MK, b_NK.T)  # noqa: SLF001  the only int8 product torch has
    return product


def _padded(x_MK: Tensor, rows: int, columns: int) -> Tensor:
    """Return x, or a copy with zeros below and to the right where it is smaller."""
    if tuple(x_MK.shape) == (rows, columns):
        return x_MK
    return functional.pad(x_MK, (0, columns - x_MK.shape[1], 0, rows - len(x_MK)))


def multiply_int8(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """Return the exact integers a B^T of int8 operands on the CPU.

    Args:
        a_MK: int8, contiguous rows.
        b_NK: int8.

    Returns:
        int32, shape (M, N).

    Raises:
        ExactnessError: K is above ``INT8_MAX_K``, where a sum could leave int32.
    """
    if a_MK.shape[1] > INT8_MAX_K:
        raise ExactnessError(f"int8 products of rows of {a_MK.shape[1]}: at most {INT8_MAX_K} stay in int32.")
    if not a_MK.numel() or not b_NK.numel():
        return torch.zeros(len(a_MK), len(b_NK), dtype=torch.int32)
    if _int8_products_are_exact():
        return _int_mm(a_MK, b_NK)
    return (a_MK.double() @ b_NK.double().T).to(torch.int32)


def limbs(x_MK: Tensor) -> Tensor:
    """Split int32 residues into four balanced base-256 limbs, least significant first.

    Args:
        x_MK: int32.

    Returns:
        int8, shape (4 M, K): all rows of limb 0, then of limb 1, and so on.
    """
    digits_MK = (x_MK + _OFFSET).bitwise_xor_(_OFFSET).contiguous()
    limbs_IMK: Tensor = digits_MK.view(torch.int8).unflatten(-1, (-1, _LIMBS)).permute(2, 0, 1)
    return limbs_IMK.reshape(_LIMBS * len(x_MK), x_MK.shape[1])


@cache
def _int8_products_are_exact() -> bool:
    try:
        check_exact(LimbKernel(), torch.device("cpu"))
    except (ExactnessError, RuntimeError, AttributeError):
        return False
    return True


def lay_out(w_NK: Tensor, kernel: Kernel | None = None) -> Codes:
    """Lay codes out for the kernel of the device that they are on.

    Args:
        w_NK: int8 codes in [-127, 127]. They may be kept as they are: do not change them any more.
        kernel: for tests; by default ``kernel_for`` the device.

    Raises:
        ExactnessError: not int8 of two dimensions, or no kernel computes exactly on this device.
    """
    if (w_NK.dtype, w_NK.ndim) != (torch.int8, 2):
        raise ExactnessError(f"codes of {w_NK.dtype} {list(w_NK.shape)}: expected int8 [N, K].")
    kernel = kernel or kernel_for(w_NK.device)
    return Codes(len(w_NK), w_NK.shape[1], kernel.lay_out(w_NK), kernel)


def multiply(x_MK: Tensor, codes: Codes, out_MN: Tensor | None = None) -> Tensor:
    """Multiply residues by int8 codes modulo 2^32.

    Args:
        x_MK: int32 residues, on the codes' device.
        codes: from ``lay_out``.
        out_MN: where to store the product: int32, contiguous, on the same device; by default new memory.

    Returns:
        int32 residues, shape (M, N), equal to integer arithmetic modulo 2^32.

    Raises:
        ExactnessError: another dtype or shape.
    """
    if (x_MK.dtype, x_MK.ndim) != (torch.int32, 2):
        raise ExactnessError(f"exact product of {x_MK.dtype} {list(x_MK.shape)}: expected int32 [M, K].")
    if x_MK.shape[1] != codes.inputs:
        raise ExactnessError(f"exact product of rows of {x_MK.shape[1]} and of {codes.inputs}.")
    shape = (len(x_MK), codes.rows)
    if out_MN is None:
        out_MN = torch.empty(shape, dtype=torch.int32, device=x_MK.device)
    if (out_MN.dtype, tuple(out_MN.shape)) != (torch.int32, shape) or not out_MN.is_contiguous():
        raise ExactnessError(f"a product of int32 {list(shape)} cannot go to {out_MN.dtype} {list(out_MN.shape)}.")
    if x_MK.numel() and codes.rows:
        codes.kernel.multiply(x_MK, codes, out_MN)
    else:
        out_MN.zero_()
    return out_MN


def kernel_for(device: torch.device) -> Kernel:
    """Return the first kernel, fastest first, that agrees with Python integers on this device.

    Raises:
        ExactnessError: none does.
        ConfigError: ``TSQP_NATIVE`` asks for what is not there.
    """
    return tried(device)[0]


def notice(device: torch.device) -> str | None:
    """Return what to tell the user in a sentence where a faster kernel was tried and errs; None where none does."""
    kernel, wrong = tried(device)
    return (
        f"{device} computes exact products by the {kernel.name} kernel, slower: {'; '.join(wrong)}" if wrong else None
    )


@cache
def tried(device: torch.device) -> tuple[Kernel, tuple[str, ...]]:
    """Return ``kernel_for`` the device, and what is wrong with each faster one. Errors are the same."""
    failures: list[str] = []
    extension = native.kernels() if device.type == "cpu" else None
    kernels: list[Kernel] = [NativeKernel(extension)] if extension else []
    limb = LimbKernel(CUDA_MULTIPLE, CUDA_MIN_ROWS) if device.type == "cuda" else LimbKernel()
    for kernel in (*kernels, limb, Float64Kernel()):
        try:
            check_exact(kernel, device)
        except (ExactnessError, RuntimeError, AttributeError) as error:  # noqa: PERF203  three kernels at most
            failures.append(f"{kernel.name}: {error}")
        else:
            return kernel, tuple(failures)
    raise ExactnessError(f"no kernel multiplies exactly on {device}: {'; '.join(failures)}")


def check_exact(kernel: Kernel, device: torch.device) -> None:
    """Compare a kernel with Python integers, on inputs chosen to break it.

    Extremes of both operands with one sign (the largest sums), alternating signs, every byte pattern at a limb's
    border, and random words; every number of rows that a kernel could treat in its own way, and many; odd sizes; rows
    longer than a block of any kernel.

    Raises:
        ExactnessError: it errs.
    """
    few = [(rows, 33, 83) for rows in range(1, 14)]
    for rows, inputs, outputs in (*few, (1, 1, 8), (1, 64, 8), (5, 576, 24), (33, 130, 16), (2, INT8_MAX_K + 9, 8)):
        x_MK, w_NK = adversarial(rows, inputs, outputs)
        y_MN = multiply(x_MK.to(device), lay_out(w_NK.to(device), kernel)).cpu()
        for row in range(rows):
            xs = x_MK[row].tolist()
            for column in range(outputs):
                want = sum(map(int.__mul__, xs, w_NK[column].tolist())) & 0xFFFFFFFF
                if int(y_MN[row, column]) & 0xFFFFFFFF != want:
                    raise ExactnessError(f"the {kernel.name} kernel errs at {rows} x {inputs} x {outputs} on {device}.")


def adversarial(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Return operands on which inexact kernels err: x of shape (rows, inputs), codes of shape (outputs, inputs).

    The codes hold -128 too, which no model's do, but the limbs of a check may (``multiply_int8``).
    """
    generator = random.Random(rows * inputs + outputs)  # noqa: S311  test data
    low, high = -(1 << 31), (1 << 31) - 1
    borders = (low, high, 0x7F7F7F7F, -0x7F7F7F80, 0x80, -0x81, 0x7FFF, -0x8000, -1)
    patterns = [
        [low] * inputs,
        [high] * inputs,
        [low if i % 2 else high for i in range(inputs)],
        generator.choices(borders, k=inputs),
        [generator.randint(low, high) for _ in range(inputs)],
    ]
    codes = [
        [127] * inputs,
        [-128] * inputs,
        [-127 if i % 2 else 127 for i in range(inputs)],
        [generator.randint(-127, 127) for _ in range(inputs)],
    ]
    x = [patterns[(row + rows) % len(patterns)] for row in range(rows)]
    w = [codes[column % len(codes)] for column in range(outputs)]
    return torch.tensor(x, dtype=torch.int64).to(torch.int32), torch.tensor(w, dtype=torch.int8)
