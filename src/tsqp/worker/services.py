"""What a worker process answers: float products (`open`), exact products (`verified`, `masked`), or mask products.

One process serves one of them. A dealer never sees a masked activation, and an online worker never sees a seed: if one
process saw both, it could unmask, so neither answers the other's requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tsqp.arith.keystream import MAX_ROWS, keystream_rows
from tsqp.arith.ring import Codes, multiply
from tsqp.errors import InputError
from tsqp.model.architecture import LinearGroup
from tsqp.model.chains import LinearChains
from tsqp.model.linears import Linears, bound_result, memory_errors
from tsqp.wire import codec, int8_rows, messages
from tsqp.wire.messages import AnyRequest, Service
from tsqp.worker.batching import Rows

# In which activations may travel at the level open.
WIRE_DTYPES: tuple[messages.DtypeName, ...] = ("float32", "float16", "bfloat16", "int8")
_FLOAT_ROWS = (messages.Linear, messages.LinearChain)
_WHAT = {
    "open": "float products, for the level open",
    "exact": "int8 codes, for the levels verified and masked",
    "masks": "mask products, as a dealer",
}


class WorkerService(Protocol):
    """Products of one model on one device."""

    serves: Service
    groups: dict[str, LinearGroup]
    # Names of chains, and of the group that each ends with; none but at `open`.
    chains: dict[str, str]
    device: torch.device
    wire_dtypes: tuple[messages.DtypeName, ...]
    # How many processes compute each product together.
    ranks: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""

    @property
    def rows_dtype(self) -> torch.dtype:
        """Dtype of what ``multiply`` takes and returns."""

    @property
    def state(self) -> dict[str, Tensor]:
        """Non-linear parameters it gives away: none but at `open`."""

    def product(self, header: AnyRequest, tensors: Sequence[Tensor]) -> Tensor:
        """Compute what is asked for; the result is on the CPU.

        Raises:
            InputError: another kind of service is needed, or operands do not fit the model.
            DeviceMemoryError: no room.
        """

    # What ``product`` does, in parts, for requests that are multiplied together. ``name`` is a group's, or a chain's.

    def rows(self, header: AnyRequest, tensors: Sequence[Tensor]) -> Rows | None:
        """Check a request for rows times a group's weights; None if it is of another kind, which ``product`` checks.

        Raises:
            InputError: its operand does not fit the model.
        """

    def operand(self, header: AnyRequest, tensors: Sequence[Tensor]) -> Tensor:
        """Return a checked request's rows, shape (M, K), on the CPU, in ``rows_dtype``."""

    def widths(self, name: str) -> tuple[int, int]:
        """Return how many columns ``multiply`` takes, and how many it returns."""

    def multiply(self, name: str, x_MK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        """Multiply rows, moved to the device where need be; the result stays there.

        Args:
            name: by what, from ``rows``.
            x_MK: from ``operand``, of one request or of several.
            out_MN: where to store the result; by default new memory.

        Raises:
            DeviceMemoryError: no room.
        """

    def weights(self, group: str) -> Tensor | None:
        """Return a group's weights as they lie in memory, if that is known."""

    def sends_products(self, header: AnyRequest) -> bool:
        """Tell whether what ``multiply`` returns is, as it is, what the sender wants."""

    def result(self, header: AnyRequest, y_MN: Tensor) -> Tensor:
        """Return a request's part of a product as its sender wants it, on the CPU."""


class OpenService:
    """Float products in clear.

    Args:
        linears: the model's large weights.
        state: its non-linear parameters by name, float32 on the CPU.
    """

    serves: Service = "open"
    wire_dtypes: tuple[messages.DtypeName, ...] = WIRE_DTYPES

    def __init__(self, linears: Linears, state: dict[str, Tensor]) -> None:
        self.linears = linears
        self.groups, self.device = linears.groups, linears.device
        self.dtype = self.rows_dtype = linears.dtype
        self.state = state
        self.ranks = linears.share.ranks
        self._chains = LinearChains(linears, state)
        self._hidden = linears.config.hidden_size
        self.chains = {name: chain.groups[-1].name for name, chain in self._chains.by_name.items()}

    def product(self, header: AnyRequest, tensors: Sequence[Tensor]) -> Tensor:
        """See ``WorkerService.product``. The result has the dtype that the request's tensor had."""
        match header:
            case messages.Linear() | messages.LinearChain():
                rows = self.rows(header, tensors)
                return self.result(header, self.multiply(rows.name if rows else "", self.operand(header, tensors)))
            case messages.Embedding(dtype=name):
                return _on_the_wire(self.linears.embedding(tensors[0]), name)
            case messages.MatMul(a=a):
                return _on_the_wire(self.linears.matmul(*tensors), a.dtype)
            case _:
                raise _refused(header, self.serves)

    def rows(self, header: AnyRequest, tensors: Sequence[Tensor]) -> Rows | None:
        """See ``WorkerService.rows``."""
        if not isinstance(header, _FLOAT_ROWS):
            return None
        # What the header says of the tensor has been found true.
        shape, dtype = header.x.shape, codec.TORCH_DTYPES[header.x.dtype]
        if isinstance(header, messages.LinearChain):
            chain = self._chains.find(header.groups)
            if dtype == torch.int8:
                width = chain.widths[0] + int8_rows.SCALE_BYTES + self._hidden * (int8_rows.STREAM_BYTES - 1)
                if len(shape) != 2 or shape[1] != width:  # noqa: PLR2004
                    raise InputError(
                        f"linear {chain.name} expects int8 rows of {width} bytes, what the first group reads and the "
                        f"residual stream, got {list(shape)}."
                    )
                dtype, shape = self.dtype, (shape[0], chain.widths[0])
            chain.check(dtype, shape)
            return Rows(chain.name, shape[0])
        if dtype == torch.int8 and shape:
            row = int8_rows.decode(tensors[0][:1])
            group = self.linears.check(header.group, row.dtype, tuple(row.shape))
            bound_result((shape[0], group.rows + int8_rows.SCALE_BYTES))
        else:
            self.linears.check(header.group, dtype, shape)
        return Rows(header.group, shape[0])

    def operand(self, header: AnyRequest, tensors: Sequence[Tensor]) -> Tensor:
        """See ``WorkerService.operand``."""
        x = tensors[0]
        if x.dtype == self.dtype:
            return x
        if x.dtype == torch.int8 and isinstance(header, messages.LinearChain):
            return int8_rows.decode_beside(x, self._hidden).to(self.dtype)
        return (int8_rows.decode(x) if x.dtype == torch.int8 else x).to(self.dtype)

    def widths(self, name: str) -> tuple[int, int]:
        """See ``WorkerService.widths``."""
        group = self.groups.get(name)
        return (group.in_features, group.rows) if group else self._chains.by_name[name].widths

    def multiply(self, name: str, x_MK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        """See ``WorkerService.multiply``."""
        return (self.linears if name in self.groups else self._chains).multiply(name, x_MK, out_MN)

    def weights(self, group: str) -> Tensor | None:
        """See ``WorkerService.weights``."""
        return self.linears.laid_out(group)

    def sends_products(self, header: AnyRequest) -> bool:
        """See ``WorkerService.sends_products``."""
        return isinstance(header, _FLOAT_ROWS) and codec.TORCH_DTYPES[header.x.dtype] == self.dtype

    def result(self, header: AnyRequest, y_MN: Tensor) -> Tensor:
        """See ``WorkerService.result``."""
        if isinstance(header, messages.LinearChain) and header.x.dtype == "int8":
            last = y_MN.shape[1] - 2 * self._hidden
            return int8_rows.encode_parts(y_MN.cpu(), (self._hidden, self._hidden, last))
        return _on_the_wire(y_MN, header.x.dtype) if isinstance(header, _FLOAT_ROWS) else y_MN


def _on_the_wire(y: Tensor, name: messages.DtypeName) -> Tensor:
    """Return a product in the dtype in which its operand came."""
    if name == "int8":
        return int8_rows.encode(y.cpu())
    dtype = codec.TORCH_DTYPES[name]
    if not dtype.is_floating_point:
        raise InputError(f"a product cannot be returned as {dtype}; ask for a float dtype or int8.")
    return y.to("cpu", dtype)


class _CodesService:
    """Holds a model's int8 codes.

    Args:
        groups: the model's linear groups, in order.
        codes: by group name, on one device.
    """

    dtype = torch.int8
    rows_dtype = torch.int32
    wire_dtypes: tuple[messages.DtypeName, ...] = ()

    def __init__(self, groups: Sequence[LinearGroup], codes: dict[str, Codes], device: torch.device) -> None:
        self.groups = {group.name: group for group in groups}
        self.chains: dict[str, str] = {}
        self.device = device
        self.state: dict[str, Tensor] = {}
        self.ranks = 1
        self._codes = codes

    def _group(self, name: str) -> LinearGroup:
        group = self.groups.get(name)
        if group is None:
            raise InputError(f"no linear group is named {name!r}.")
        return group

    def widths(self, name: str) -> tuple[int, int]:
        """See ``WorkerService.widths``."""
        group = self._group(name)
        return group.in_features, group.rows

    def multiply(self, name: str, x_MK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        """See ``WorkerService.multiply``."""
        with memory_errors(f"exact linear {name}", self.device):
            return multiply(x_MK.to(self.device), self._codes[name], out_MN)

    def weights(self, group: str) -> Tensor | None:
        """See ``WorkerService.weights``."""
        return self._codes[group].laid_out

    def sends_products(self, header: AnyRequest) -> bool:  # noqa: ARG002  of every service
        """See ``WorkerService.sends_products``."""
        return True

    def result(self, header: AnyRequest, y_MN: Tensor) -> Tensor:  # noqa: ARG002  of every service
        """See ``WorkerService.result``."""
        return y_MN.cpu()


class ExactService(_CodesService):
    """Products modulo 2^32 of words that mean nothing to it (`masked`) or of integers in clear (`verified`)."""

    serves: Service = "exact"

    @torch.inference_mode()
    def product(self, header: AnyRequest, tensors: Sequence[Tensor]) -> Tensor:
        """See ``WorkerService.product``."""
        match header:
            case messages.LinearExact(group=group):
                self._check(group, tensors[0])
                return self.multiply(group, tensors[0]).cpu()
            case messages.Codes(group=group, first=first, rows=rows):
                known = self._group(group).rows
                if first + rows > known:
                    raise InputError(f"codes of {group} have {known} rows; rows up to {first + rows} asked.")
                return self.plain(group, first, rows).cpu()
            case _:
                raise _refused(header, self.serves)

    def rows(self, header: AnyRequest, tensors: Sequence[Tensor]) -> Rows | None:
        """See ``WorkerService.rows``."""
        if not isinstance(header, messages.LinearExact):
            return None
        self._check(header.group, tensors[0])
        return Rows(header.group, len(tensors[0]))

    def operand(self, header: AnyRequest, tensors: Sequence[Tensor]) -> Tensor:  # noqa: ARG002  of every service
        """See ``WorkerService.operand``."""
        return tensors[0]

    def plain(self, name: str, first: int, rows: int) -> Tensor:
        """Return rows of a group's codes: int8, shape (rows, K)."""
        return self._codes[name].plain(first, rows)

    def _check(self, name: str, x_MK: Tensor) -> None:
        inputs, outputs = self.widths(name)
        if x_MK.ndim != 2 or x_MK.dtype != torch.int32 or x_MK.shape[1] != inputs:  # noqa: PLR2004
            raise InputError(
                f"exact linear {name} expects int32 of shape [M, {inputs}], got {x_MK.dtype} {list(x_MK.shape)}."
            )
        bound_result((len(x_MK), outputs))


class DealerService(_CodesService):
    """Products of keystream rows: what a dealer is asked for, ahead of any prompt."""

    serves: Service = "masks"

    @torch.inference_mode()
    def product(self, header: AnyRequest, tensors: Sequence[Tensor]) -> Tensor:
        """See ``WorkerService.product``."""
        if not isinstance(header, messages.MaskProduct):
            raise _refused(header, self.serves)
        self.rows(header, tensors)
        with memory_errors(f"mask product {header.group}", self.device):
            return self.multiply(header.group, self.operand(header, tensors)).cpu()

    def rows(self, header: AnyRequest, tensors: Sequence[Tensor]) -> Rows | None:  # noqa: ARG002  of every service
        """See ``WorkerService.rows``. Each request's rows are of a seed of its own; only the group must be one."""
        if not isinstance(header, messages.MaskProduct):
            return None
        bound_result((header.count, max(self.widths(header.group))))
        if header.first + header.count > MAX_ROWS:
            raise InputError(f"mask rows {header.first} to {header.first + header.count}: at most {MAX_ROWS} exist.")
        return Rows(header.group, header.count)

    def operand(self, header: AnyRequest, tensors: Sequence[Tensor]) -> Tensor:  # noqa: ARG002  of every service
        """See ``WorkerService.operand``."""
        if not isinstance(header, messages.MaskProduct):
            raise _refused(header, self.serves)
        number = list(self.groups).index(header.group)
        inputs = self.groups[header.group].in_features
        return keystream_rows(header.seed, number, header.first, header.count, inputs)


def _refused(header: AnyRequest, serves: Service) -> InputError:
    return InputError(f"a {type(header).__name__} request came to a process that serves {_WHAT[serves]}.")
