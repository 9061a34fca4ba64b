"""The native extension, if it is built, and checks of the memory that it is given: it sees addresses and sizes only."""

from __future__ import annotations

import torch
from torch import Tensor

from tsqp.errors import ExactnessError

reason = ""
try:
    from tsqp import _native
except ImportError as _error:
    _native = None  # type: ignore[assignment]
    reason = str(_error)
module = _native

# In order: a processor that has one has those before it. The numbers are native.h's.
INSTRUCTION_SETS = ("portable", "avx2", "avx512-vnni")


def readable(tensor: Tensor) -> Tensor:
    """Return a tensor as the extension reads it, a copy where rows are strided or elements not aligned."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def readable_rows(tensor: Tensor) -> Tensor:
    """Return a tensor with a contiguous last dimension, a copy where it has none or elements are not aligned."""
    if tensor.stride(-1) == 1 and not tensor.data_ptr() % tensor.element_size():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def address(tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """Return where a contiguous tensor lies.

    Raises:
        ExactnessError: another dtype, shape or layout, or elements that are not aligned.
    """
    at = tensor.data_ptr()
    right = tensor.dtype == dtype and tensor.shape == shape and tensor.is_cpu and tensor.is_contiguous()
    if not right or at % dtype.itemsize:
        raise ExactnessError(
            f"a native kernel takes contiguous {dtype} {list(shape)} on the cpu, "
            f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {list(tensor.stride())}."
        )
    return at


def strided(tensor: Tensor, *shape: int) -> int:
    """Return where a float32 tensor lies of which only the last dimension must be contiguous.

    Raises:
        ExactnessError: another dtype, shape or layout, or elements that are not aligned.
    """
    at = tensor.data_ptr()
    right = (tensor.dtype, tensor.shape, tensor.is_cpu) == (torch.float32, shape, True) and tensor.stride(-1) == 1
    if not right or at % torch.float32.itemsize:
        raise ExactnessError(
            f"a native kernel takes torch.float32 {list(shape)} on the cpu with a contiguous last dimension, "
            f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {list(tensor.stride())}."
        )
    return at


def separate_rows(tensor: Tensor, rows: int, columns: int) -> int:
    """Return where float32 rows lie that do not overlap; they may be parts of wider ones.

    Raises:
        ExactnessError: another dtype, shape or layout, or elements that are not aligned.
    """
    at = strided(tensor, rows, columns)
    if rows > 1 and tensor.stride(0) < columns:
        raise ExactnessError(f"a native kernel takes rows apart from each other, not strides {list(tensor.stride())}.")
    return at
