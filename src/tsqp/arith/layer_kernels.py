"""Checked calls of the native kernels for what lies between a model's products and after them, in float32.

A row's result depends on its own sequence only: not on the rows beside it, on how many there are, or on threads. What
``rms_norm``, ``swiglu`` and ``rotate`` make of it is the same bits with every instruction set.

Shapes: B batch, T tokens, S tokens that are looked at, M rows, N heads, G key-value heads, H head size, D hidden,
F FFN, E = 2F gate and up, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tsqp.arith.extension import INSTRUCTION_SETS, address, module, readable, strided
from tsqp.arith.paging import BLOCK_TOKENS, Segments
from tsqp.errors import ExactnessError

_LOG2_E = 1 / math.log(2)


class Filters(NamedTuple):
    """Which tokens may be drawn, and what logits are divided by; ``engine/sampling.py`` has the definitions.

    Attributes:
        temperature: a float32 number, neither 0 nor below the smallest normal one.
        top_k: below V; 0 keeps all.
        top_p: in (0, 1].
        min_p: in [0, 1].
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclass(frozen=True, slots=True)
class LayerKernels:
    """Attention, layers and sampling, with one of this processor's instruction sets."""

    instructions: str

    @property
    def attends(self) -> bool:
        """Whether ``attend`` and ``attend_paged`` are there."""
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
        batch, tokens, heads, size = q_BTNH.shape
        kv_heads, total = k_BGSH.shape[1:3]
        self._check_heads(heads, kv_heads)
        if total < tokens:
            raise ExactnessError(f"{tokens} tokens cannot be the last of {total}.")
        module.attend(
            strided(q_BTNH, batch, tokens, heads, size),
            strided(k_BGSH, batch, kv_heads, total, size),
            strided(v_BGSH, batch, kv_heads, total, size),
            address(out_BTNH, torch.float32, batch, tokens, heads, size),
            (batch, tokens, total, heads, kv_heads, size),
            q_BTNH.stride()[:3],
            k_BGSH.stride()[:3],
            v_BGSH.stride()[:3],
            torch.get_num_threads(),
        )

    def attend_paged(self, q_MNH: Tensor, pool: Tensor, segments: Segments, out_MNH: Tensor) -> None:
        """Store the same for rows of many sequences; rows of no segment are left as they are.

        A token's bits are those of ``attend`` for a whole prompt, however it is cut and wherever its blocks lie.

        Args:
            q_MNH: float32, as the others; the last dimension contiguous.
            pool: a layer's keys and values, shape (blocks, 2, G, BLOCK_TOKENS, H); each block contiguous.
            segments: what the rows are.
            out_MNH: contiguous.

        Raises:
            ExactnessError: other dtypes, shapes or layouts, segments that need more rows or blocks than there are, or
                the instruction set lacks it.
        """
        (rows, heads, size), (blocks, _, kv_heads) = q_MNH.shape, pool.shape[:3]
        self._check_heads(heads, kv_heads)
        segments.check_fits(rows, blocks)
        module.attend_paged(
            strided(q_MNH, rows, heads, size),
            _pool_address(pool),
            segments.spans_at,
            segments.tables_at,
            address(out_MNH, torch.float32, rows, heads, size),
            (segments.count, heads, kv_heads, size),
            q_MNH.stride()[:2],
            pool.stride(0),
            torch.get_num_threads(),
        )

    def keep(self, qkv_MXH: Tensor, cos_MH: Tensor, sin_MH: Tensor, pool: Tensor, segments: Segments) -> None:
        """Rotate a step's queries and keys in place, as ``rotate``, and store keys and values where segments find them.

        Args:
            qkv_MXH: N queries, G keys and G values of each row, float32, contiguous. Rows of no segment are left alone.
            cos_MH: of the rows' positions, float32, contiguous.
            sin_MH: as ``cos_MH``.
            pool: as in ``attend_paged``.
            segments: what the rows are.

        Raises:
            ExactnessError: as ``attend_paged``; a head size that is odd.
        """
        (rows, heads, size), (blocks, _, kv_heads) = qkv_MXH.shape, pool.shape[:3]
        if size % 2 or heads <= 2 * kv_heads or pool.shape[-1] != size:
            raise ExactnessError(
                f"{heads} heads of {size} numbers are not queries, keys and values for {kv_heads} of {pool.shape[-1]}."
            )
        segments.check_fits(rows, blocks)
        module.keep(
            address(qkv_MXH, torch.float32, rows, heads, size),
            address(cos_MH, torch.float32, rows, size),
            address(sin_MH, torch.float32, rows, size),
            _pool_address(pool),
            segments.spans_at,
            segments.tables_at,
            (segments.count, heads - 2 * kv_heads, kv_heads, size),
            heads * size,
            pool.stride(0),
            self._level,
            torch.get_num_threads(),
        )

    def rms_norm(
        self,
        x_MD: Tensor,
        weight_D: Tensor,
        eps: float,
        out_MD: Tensor,
        added_MD: Tensor | None = None,
        sum_MD: Tensor | None = None,
    ) -> None:
        """Store x / sqrt(mean(x^2) + eps) * weight, of ``x + added`` where that is given.

        Args:
            x_MD: float32, as the others; rows may be of wider ones, and another process may change it meanwhile.
            weight_D: any layout.
            eps: added to the mean of the squares.
            out_MD: contiguous, and apart from the others.
            added_MD: as ``x_MD``.
            sum_MD: where to keep ``x + added``; contiguous, x itself or apart from all others. Without it nowhere.

        Raises:
            ExactnessError: other dtypes, shapes or layouts.
        """
        rows, size = x_MD.shape
        weight_D = readable(weight_D)
        module.rms_norm(
            strided(x_MD, rows, size),
            0 if added_MD is None else strided(added_MD, rows, size),
            0 if sum_MD is None else address(sum_MD, torch.float32, rows, size),
            address(weight_D, torch.float32, size),
            eps,
            address(out_MD, torch.float32, rows, size),
            (rows, size),
            (x_MD.stride(0), 0 if added_MD is None else added_MD.stride(0)),
            self._level,
            torch.get_num_threads(),
        )

    def swiglu(self, gate_up_ME: Tensor, out_MF: Tensor) -> None:
        """Store SiLU(gate) * up for the two halves of each row.

        Args:
            gate_up_ME: float32.
            out_MF: float32, contiguous, and apart from the other.

        Raises:
            ExactnessError: other dtypes, shapes or layouts.
        """
        rows, size = out_MF.shape
        gate_up_ME = readable(gate_up_ME)
        module.swiglu(
            address(gate_up_ME, torch.float32, rows, 2 * size),
            address(out_MF, torch.float32, rows, size),
            rows,
            size,
            self._level,
            torch.get_num_threads(),
        )

    def rotate(self, x_MNH: Tensor, cos_MH: Tensor, sin_MH: Tensor, out_MNH: Tensor) -> None:
        """Store x cos + swapped sin, where swapping exchanges the halves of each head.

        Args:
            x_MNH: float32, as the others; the last dimension contiguous, H even.
            cos_MH: any layout.
            sin_MH: as ``cos_MH``.
            out_MNH: as x, and x itself or apart from it.

        Raises:
            ExactnessError: other dtypes, shapes or layouts.
        """
        rows, heads, size = x_MNH.shape
        if size % 2:
            raise ExactnessError(f"a head of {size} numbers has no halves to rotate.")
        cos_MH, sin_MH = readable(cos_MH), readable(sin_MH)
        module.rotate(
            strided(x_MNH, rows, heads, size),
            address(cos_MH, torch.float32, rows, size),
            address(sin_MH, torch.float32, rows, size),
            strided(out_MNH, rows, heads, size),
            (rows, heads, size),
            x_MNH.stride()[:2],
            out_MNH.stride()[:2],
            self._level,
            torch.get_num_threads(),
        )

    @property
    def draws(self) -> bool:
        """Whether ``draw`` is there."""
        return self.attends

    def draw(self, logits_V: Tensor, largest: float, filters: Filters, uniform: float) -> int:
        """Return a token drawn from what the filters leave.

        Args:
            logits_V: float32, V at least 1. Of logits that another process changes meanwhile comes some token of them.
            largest: of the logits, none of which is NaN; finite.
            filters: of this request.
            uniform: in [0, 1): where in the distribution function, by ascending tokens, the one to return lies.

        Raises:
            ExactnessError: another dtype or shape, or the instruction set lacks it.
        """
        if not self.draws:
            raise ExactnessError(f"there is no native sampling for {self.instructions}.")
        vocab = logits_V.numel()
        if not vocab:
            raise ExactnessError("a native kernel draws from at least one token.")
        logits_V = readable(logits_V)
        return module.draw(
            address(logits_V, torch.float32, vocab),
            vocab,
            largest,
            _LOG2_E / filters.temperature,
            filters.top_k,
            filters.top_p,
            filters.min_p,
            uniform,
            self._level,
        )

    @property
    def _level(self) -> int:
        return INSTRUCTION_SETS.index(self.instructions)

    def _check_heads(self, heads: int, kv_heads: int) -> None:
        if not self.attends:
            raise ExactnessError(f"there is no native attention for {self.instructions}.")
        if not kv_heads or heads % kv_heads:
            raise ExactnessError(f"{heads} heads cannot share {kv_heads}.")


def _pool_address(pool: Tensor) -> int:
    """Return where a layer's pool lies; see ``attend_paged``."""
    blocks, _, kv_heads, _, size = pool.shape
    first = strided(pool, blocks, 2, kv_heads, BLOCK_TOKENS, size)
    head = BLOCK_TOKENS * size
    if pool.stride()[1:] != (kv_heads * head, head, size, 1):
        raise ExactnessError(f"a native kernel takes contiguous blocks, not strides {list(pool.stride())}.")
    return first
