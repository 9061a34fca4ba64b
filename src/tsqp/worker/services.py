"""What a worker process answers: float products (`open`), exact products (`verified`, `masked`), or mask products.

One process serves one of them. A dealer never sees a masked activation, and an online worker never sees a seed: if one
process saw both, it could unmask, so neither answers the other's requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tsqp.arith.keystream import keystream_rows
from tsqp.arith.ring import multiply
from tsqp.errors import InputError
from tsqp.model.architecture import LinearGroup
from tsqp.model.linears import Linears, bound_result, memory_errors
from tsqp.wire import codec, messages
from tsqp.wire.messages import AnyRequest, Service

_WHAT = {
    "open": "float products, for the level open",
    "exact": "int8 codes, for the levels verified and masked",
    "masks": "mask products, as a dealer",
}


class WorkerService(Protocol):
    """Products of one model on one device."""

    serves: Service
    groups: dict[str, LinearGroup]
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""

    @property
    def state(self) -> dict[str, Tensor]:
        """Non-linear parameters it gives away: none but at `open`."""

    def product(self, header: AnyRequest, tensors: tuple[Tensor, ...]) -> Tensor:
        """Compute what is asked for; the result is on the CPU.

        Raises:
            InputError: another kind of service is needed, or operands do not fit the model.
            DeviceMemoryError: no room.
        """


class OpenService:
    """Float products in clear.

    Args:
        linears: the model's large weights.
        state: its non-linear parameters by name, float32 on the CPU.
    """

    serves: Service = "open"

    def __init__(self, linears: Linears, state: dict[str, Tensor]) -> None:
        self.linears = linears
        self.groups, self.device, self.dtype = linears.groups, linears.device, linears.dtype
        self.state = state

    def product(self, header: AnyRequest, tensors: tuple[Tensor, ...]) -> Tensor:
        """See ``WorkerService.product``. The result has the dtype that the request's tensor had."""
        match header:
            case messages.Linear(group=group, x=x):
                y, name = self.linears.linear(group, tensors[0]), x.dtype
            case messages.Embedding(dtype=name):
                y = self.linears.embedding(tensors[0])
            case messages.MatMul(a=a):
                y, name = self.linears.matmul(*tensors), a.dtype
            case _:
                raise _refused(header, self.serves)
        dtype = codec.TORCH_DTYPES[name]
        if not dtype.is_floating_point:
            raise InputError(f"a product cannot be returned as {dtype}; ask for a float dtype.")
        return y.to("cpu", dtype)


class _CodesService:
    """Holds a model's int8 codes.

    Args:
        groups: the model's linear groups, in order.
        codes: int8, shape (N, K), by group name, on one device.
    """

    dtype = torch.int8

    def __init__(self, groups: Sequence[LinearGroup], codes: dict[str, Tensor], device: torch.device) -> None:
        self.groups = {group.name: group for group in groups}
        self.device = device
        self.state: dict[str, Tensor] = {}
        self._codes = codes

    def _codes_of(self, group: str) -> Tensor:
        codes_NK = self._codes.get(group)
        if codes_NK is None:
            raise InputError(f"no linear group is named {group!r}.")
        return codes_NK


class ExactService(_CodesService):
    """Products modulo 2^32 of words that mean nothing to it (`masked`) or of integers in clear (`verified`)."""

    serves: Service = "exact"

    @torch.inference_mode()
    def product(self, header: AnyRequest, tensors: tuple[Tensor, ...]) -> Tensor:
        """See ``WorkerService.product``."""
        match header:
            case messages.LinearExact(group=group):
                return self._linear(group, tensors[0])
            case messages.Codes(group=group, first=first, rows=rows):
                codes_NK = self._codes_of(group)
                if first + rows > len(codes_NK):
                    raise InputError(f"codes of {group} have {len(codes_NK)} rows; rows up to {first + rows} asked.")
                return codes_NK[first : first + rows].cpu()
            case _:
                raise _refused(header, self.serves)

    def _linear(self, group: str, x_MK: Tensor) -> Tensor:
        codes_NK = self._codes_of(group)
        if x_MK.ndim != 2 or x_MK.dtype != torch.int32 or x_MK.shape[1] != codes_NK.shape[1]:  # noqa: PLR2004
            raise InputError(
                f"exact linear {group} expects int32 of shape [M, {codes_NK.shape[1]}], "
                f"got {x_MK.dtype} {list(x_MK.shape)}."
            )
        bound_result((len(x_MK), len(codes_NK)))
        with memory_errors(f"exact linear {group}", self.device):
            return multiply(x_MK.to(self.device), codes_NK).cpu()


class DealerService(_CodesService):
    """Products of keystream rows: what a dealer is asked for, ahead of any prompt."""

    serves: Service = "masks"

    @torch.inference_mode()
    def product(self, header: AnyRequest, tensors: tuple[Tensor, ...]) -> Tensor:  # noqa: ARG002  of every service
        """See ``WorkerService.product``."""
        if not isinstance(header, messages.MaskProduct):
            raise _refused(header, self.serves)
        codes_NK = self._codes_of(header.group)
        bound_result((header.count, max(codes_NK.shape)))
        number = list(self.groups).index(header.group)
        with memory_errors(f"mask product {header.group}", self.device):
            r_MK = keystream_rows(header.seed, number, header.first, header.count, codes_NK.shape[1])
            return multiply(r_MK.to(self.device), codes_NK).cpu()


def _refused(header: AnyRequest, serves: Service) -> InputError:
    return InputError(f"a {type(header).__name__} request came to a process that serves {_WHAT[serves]}.")
