"""The Linear and Embedding modules of a model on one device: what a worker computes, and `local` in its stead.

On CPUs float32 products are computed by a native kernel, which stores them where the client reads them; where that is
not built, and in bfloat16, by oneDNN, called directly. PyTorch's own ``linear`` takes MKL there, whose float32 kernels
are 2.5 times slower on the AMD processors this was measured on (benchmarks/results); all are plain IEEE float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tsqp.arith import panels
from tsqp.arith.chain_kernel import ChainKernel, ChainWeights, Weights
from tsqp.errors import DeviceMemoryError, InputError
from tsqp.model.architecture import EMBEDDING_MODULE, LinearGroup, LlamaConfig, linear_groups, weight_shapes
from tsqp.model.share import WHOLE, Share, parts
from tsqp.model.weights import Checkpoint

# A hint to oneDNN; its layout serves any number of rows.
_TYPICAL_ROWS = 128

# 4 GiB of float32: logits of 8192 positions over a vocabulary of 128 k.
MAX_RESULT_ELEMENTS = 1 << 30


class memory_errors:  # used as a function is; a generator would take longer than a small product's checks
    """Turn torch's out-of-memory errors within a ``with`` block into ``DeviceMemoryError``, which says what to do."""

    __slots__ = ("_device", "_operation")

    def __init__(self, operation: str, device: torch.device) -> None:
        self._operation = operation
        self._device = device

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Raise the other error, or let this one pass."""
        if error is not None and is_out_of_memory(error):
            raise out_of_memory(self._operation, self._device) from error


def out_of_memory(operation: str, device: torch.device) -> DeviceMemoryError:
    """Return the error that says which device lacks memory, during what, and what to do."""
    advice = "shorten the prompt, lower --batch, use --dtype bfloat16, or free memory on it"
    return DeviceMemoryError(f"{device} is out of memory during {operation}: {advice}.")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether torch or Python raised this because there is no memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@functools.cache
def onednn_computes(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN's linear is there and right for this dtype on this CPU; if not, torch's own is used.

    It only decides speed: both compute the same product.
    """
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x_MK = torch.randn(5, 64, generator=generator).to(dtype)
    w_NK = torch.randn(48, 64, generator=generator).to(dtype)
    try:
        theirs = functional.linear(x_MK, w_NK)
        packed_NK = _onednn_layout(w_NK)
        w_NK.zero_()  # the layout must be a copy: loading reuses the memory it packs from
        ours = _onednn_linear(x_MK, packed_NK, None)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(
        ours.float(), theirs.float(), rtol=16 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps
    )


def _onednn_linear(x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    y_MN: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, w_NK, bias_N, "none", [], "")  # noqa: SLF001
    return y_MN


def _onednn_layout(w_NK: Tensor) -> Tensor:
    """Copy weights into the blocks that oneDNN multiplies fastest by."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(w_NK, _TYPICAL_ROWS)  # noqa: SLF001
    return packed


def product(x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Return x W^T + b, shape (M, N), in the dtype both operands share; ``w_NK`` may be in oneDNN's layout."""
    if x_MK.device.type == "cpu" and onednn_computes(x_MK.dtype):
        return _onednn_linear(x_MK, w_NK, bias_N)
    return functional.linear(x_MK, w_NK, bias_N)


class Linears:
    """Embedding table and stacked group weights of one model, in one dtype on one device.

    Weights are held once: in the layout of what computes them, panels or oneDNN's, but for a head that oneDNN computes,
    which is plain. A tied head is the embedding table. Products of one member of several (the first published
    protocol) need a plain copy of their group's weights, made on first use.

    Args:
        config: the model's architecture.
        checkpoint: its weights.
        dtype: float32, float16 or bfloat16.
        device: where products are computed.
        on_progress: called with the fraction loaded.
        share: which rows of each group to load, and to multiply by. The first rank has the embedding table too, all of
            it and beside its rows of a tied head; the others have none.

    Raises:
        WeightsError: a tensor is missing or has another shape.
        DeviceMemoryError: the device cannot hold the weights.
    """

    def __init__(
        self,
        config: LlamaConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: Callable[[float], None] | None = None,
        share: Share = WHOLE,
    ) -> None:
        checkpoint.require(weight_shapes(config))
        self.config, self.dtype, self.device, self.share = config, dtype, device, share
        self.groups = {group.name: group for group in linear_groups(config)}
        self._kernels = panels.kernels_for(dtype, device)
        self._panels: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor] = {}
        self._plain: dict[str, Tensor] = {}
        self._embedding_VD: Tensor | None = None
        with memory_errors("loading", device), torch.inference_mode():
            if share.rank == 0:
                self._load_embedding(checkpoint)
            scratch = self._scratch()
            # The head first: the copy that its panels are made from is large, and not wanted when all else is there.
            for done, group in enumerate(sorted(self.groups.values(), key=lambda group: group.name != "head")):
                self._load(group, checkpoint, scratch)
                if on_progress:
                    on_progress((done + 1) / len(self.groups))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _scratch(self) -> Tensor | None:
        """Allocate room for the largest group that is packed, once: freed piece by piece it would fragment the heap."""
        if not self._kernels and not (self.device.type == "cpu" and onednn_computes(self.dtype)):
            return None
        return self._empty(
            max(len(self.rows(group)) * group.in_features for group in self.groups.values() if group.name != "head")
        )

    def rows(self, group: LinearGroup) -> range:
        """Return which of a group's rows are here."""
        return self.share.of(group.rows)

    def _load_embedding(self, checkpoint: Checkpoint) -> None:
        """Read the embedding table, as rows, or as the panels of a tied head."""
        table_VD = self._empty(self.config.vocab_size, self.config.hidden_size)
        checkpoint.read_into(f"{EMBEDDING_MODULE}.weight", table_VD)
        self._embedding_VD = table_VD
        if not self.config.tied_head or not self.share.is_whole:
            return
        if self._kernels:
            self._panels["head"] = panels.lay_out(table_VD)
            self._embedding_VD = None
        else:
            self._weights["head"] = table_VD

    def _load(self, group: LinearGroup, checkpoint: Checkpoint, scratch: Tensor | None) -> None:
        tied = group.name == "head" and self.config.tied_head
        if tied and self.share.is_whole:
            return
        rows = self.rows(group)
        shape = (len(rows), group.in_features)
        if group.name == "head":
            scratch = None
        weight_NK = self._empty(*shape) if scratch is None else scratch[: math.prod(shape)].view(shape)
        for member, some, place in parts(group, rows):
            checkpoint.read_into(f"{EMBEDDING_MODULE if tied else member}.weight", weight_NK[place], some)
        if self._kernels:
            self._panels[group.name] = panels.lay_out(weight_NK)
        elif scratch is None:
            self._weights[group.name] = weight_NK
        else:
            self._weights[group.name] = _onednn_layout(weight_NK)
        if group.bias:
            bias_N = self._biases[group.name] = self._empty(len(rows))
            for member, some, place in parts(group, rows):
                checkpoint.read_into(f"{member}.bias", bias_N[place], some)

    @torch.inference_mode()
    def linear(self, name: str, x_MK: Tensor, member: int | None = None) -> Tensor:
        """Multiply by one group, or by one of its members.

        Args:
            name: a group of ``self.groups``.
            x_MK: shape (M, K), any float dtype and device; cast to the weights' own.
            member: index of the only member to compute.

        Returns:
            Shape (M, N) in the weights' dtype, on this device.

        Raises:
            InputError: no such group, or x has another shape.
            DeviceMemoryError: the device has no room for the product.
        """
        group = self.check(name, x_MK.dtype, tuple(x_MK.shape))
        if member is None or len(group.members) == 1:
            return self.multiply(name, x_MK)
        w_NK, bias_N = self._plain_weight(name).split(group.out_features)[member], self._biases.get(name)
        bias_N = None if bias_N is None else bias_N.split(group.out_features)[member]
        with memory_errors(f"linear {name}", self.device):
            return product(x_MK.to(self.device, self.dtype), w_NK, bias_N)

    def multiply(self, name: str, x_MK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        """Multiply rows that ``check`` has accepted by one group's weights; see ``linear``.

        Args:
            name: the group.
            x_MK: the operand's rows.
            out_MN: where to store the result, in the weights' dtype, rows perhaps of wider ones; by default new memory.
        """
        with memory_errors(f"linear {name}", self.device):
            bias_N, panels = self._biases.get(name), self._panels.get(name)
            if x_MK.dtype != self.dtype or x_MK.device != self.device:
                x_MK = x_MK.to(self.device, self.dtype)
            if self._kernels and panels is not None:
                y_MN = self._empty(x_MK.shape[0], len(self.rows(self.groups[name]))) if out_MN is None else out_MN
                self._kernels.multiply_floats(x_MK, panels, bias_N, y_MN)
                return y_MN
            y_MN = product(x_MK, self._weights[name], bias_N)
            return y_MN if out_MN is None else out_MN.copy_(y_MN)

    def check(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> LinearGroup:
        """Return the group ``name`` if a tensor can be multiplied by its weights.

        Raises:
            InputError: no such group, the tensor has another shape, or the result would be too large.
        """
        group = self.groups.get(name)
        if group is None:
            raise InputError(f"no linear group is named {name!r}.")
        if len(shape) != 2 or shape[1] != group.in_features or not dtype.is_floating_point:  # noqa: PLR2004
            raise InputError(
                f"linear {name} expects floats of shape [M, {group.in_features}], got {dtype} {list(shape)}."
            )
        bound_result((shape[0], group.rows))
        return group

    def chain_kernel(self, names: Sequence[str], norm_D: Tensor, next_norm_D: Tensor) -> ChainKernel | None:
        """Return what computes a chain of groups natively, with the norms within; None if PyTorch does."""
        if not self._kernels:
            return None
        o, gate_up, down, following = (
            Weights(self._panels[name], self._biases.get(name), self.groups[name].rows) for name in names
        )
        weights = ChainWeights(o, norm_D, gate_up, down, next_norm_D, following)
        return ChainKernel(self._kernels, weights, self.config.rms_norm_eps)

    def laid_out(self, name: str) -> Tensor | None:
        """Return a group's weights as they are multiplied, to read ahead; None where only oneDNN knows how they lie."""
        weights = self._panels.get(name)
        weights = self._weights[name] if weights is None else weights
        return weights if weights.layout is torch.strided else None

    def _plain_weight(self, name: str) -> Tensor:
        if name not in self._plain:
            with memory_errors(f"unpacking {name}", self.device):
                self._plain[name] = self._unpacked(name)
        return self._plain[name]

    def _unpacked(self, name: str) -> Tensor:
        if name in self._panels:
            return panels.plain(self._panels[name], self.groups[name].rows)
        weight = self._weights[name]
        return weight.to_dense() if weight.layout is not torch.strided else weight

    @torch.inference_mode()
    def embedding(self, ids_M: Tensor) -> Tensor:
        """Look up rows of the embedding table.

        Args:
            ids_M: int64 token ids, shape (M,).

        Returns:
            Shape (M, D) in the weights' dtype, on this device.

        Raises:
            InputError: not int64, not one-dimensional, or an id outside the vocabulary.
        """
        if ids_M.ndim != 1 or ids_M.dtype != torch.int64:
            raise InputError(f"embedding expects int64 ids of shape [M], got {ids_M.dtype} {list(ids_M.shape)}.")
        ids = ids_M.tolist()  # a copy: in shared memory the client could change an id between check and use
        if ids and not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise InputError(f"embedding got a token id outside the vocabulary of {self.config.vocab_size}.")
        bound_result((len(ids), self.config.hidden_size))
        with memory_errors("embedding", self.device):
            index_M = torch.tensor(ids, dtype=torch.int64, device=self.device)
            if self._embedding_VD is None:
                return panels.rows(self._panels["head"], index_M)
            return self._embedding_VD.index_select(0, index_M)

    @torch.inference_mode()
    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply two activations, shapes (..., M, K) and (..., K, N), in their own dtype on this device.

        Raises:
            InputError: the shapes or dtypes do not go together.
        """
        if not (a.ndim == b.ndim >= 2 and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]):  # noqa: PLR2004
            raise InputError(f"matmul of shapes {list(a.shape)} and {list(b.shape)}: inner sizes must agree.")
        if a.dtype != b.dtype or not a.is_floating_point():
            raise InputError(f"matmul of {a.dtype} and {b.dtype}: both must be of one float dtype.")
        if not a.numel() or not b.numel():
            raise InputError(f"matmul of shapes {list(a.shape)} and {list(b.shape)}: an operand is empty.")
        bound_result((*a.shape[:-1], b.shape[-1]))
        with memory_errors("matmul", self.device):
            return torch.matmul(a.to(self.device), b.to(self.device))


def bound_result(shape: tuple[int, ...]) -> None:
    """Refuse a product whose result is larger than any message: a few bytes must not claim all memory.

    Raises:
        InputError: more than ``MAX_RESULT_ELEMENTS``.
    """
    elements = math.prod(shape)
    if elements > MAX_RESULT_ELEMENTS:
        raise InputError(f"a result of shape {list(shape)} has {elements} elements; at most {MAX_RESULT_ELEMENTS}.")
