"""LLaMA's forward pass, written once against ``LinearOps``.

It runs over rows, one for each token of some sequences. What belongs to sequences, their positions and the keys and
values of earlier tokens, comes with the rows.

Shapes: B batch, T tokens, M rows, R rows that logits are asked of, D hidden, F FFN, N query heads, G key-value heads,
X = N + 2G heads of q, k and v together, E = X*H, H head size, V vocabulary, K a linear's input.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tsqp.errors import InputError
from tsqp.model.architecture import LlamaConfig, chains, linear_groups, norm_before
from tsqp.model.attention import causal_attention, offloaded_attention
from tsqp.model.kv_cache import KVCache
from tsqp.model.layers import Angles, RotaryTable, add_rms_norm, rms_norm, rotate_rows, swiglu
from tsqp.model.ops import LinearOps
from tsqp.model.overlap import MicroBatch, Pending, Team, in_turns, micro_batches

Steps = Generator[Pending, Tensor, Tensor]


class Rows(Protocol):
    """Tokens that are computed together, and what their sequences know of earlier ones."""

    @property
    def ids_M(self) -> Tensor:
        """Return their ids, int64."""

    @property
    def positions_M(self) -> Tensor:
        """Return their positions, int64."""

    @property
    def kept(self) -> Tensor | None:
        """Return the numbers of the rows that logits are asked of; None for all."""

    def attend(self, layer: int, qkv_MXH: Tensor, angles: Angles, *, last: bool) -> Tensor:
        """Keep keys and values for later tokens, and return what attention makes of them and of earlier ones.

        Args:
            layer: which.
            qkv_MXH: N queries, G keys and G values of each row, contiguous; may be overwritten.
            angles: of the rows' positions.
            last: whether it is the model's last layer.

        Returns:
            Shape (M, N*H); for the ``last`` layer (R, N*H), of the kept rows only.
        """


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tokens of some prompts of equal length, as ``Rows``.

    Attributes:
        ids_BT: their ids.
        first: position of the first one.
        cache: keys and values of the tokens before, and of these for the tokens after; None for a whole prompt.
        wanted: of how many of the last positions logits are asked for.
        model: computes attention.
    """

    ids_BT: Tensor
    first: int
    cache: KVCache | None
    wanted: int
    model: Llama

    @property
    def ids_M(self) -> Tensor:
        return self.ids_BT.reshape(-1)

    @property
    def positions_M(self) -> Tensor:
        batch, tokens = self.ids_BT.shape
        return torch.arange(self.first, self.first + tokens).repeat(batch)

    @property
    def kept(self) -> Tensor | None:
        batch, tokens = self.ids_BT.shape
        if self.wanted == tokens:
            return None
        return torch.arange(batch * tokens).view(batch, tokens)[:, tokens - self.wanted :].flatten()

    def attend(self, layer: int, qkv_MXH: Tensor, angles: Angles, *, last: bool) -> Tensor:
        batch, tokens = self.ids_BT.shape
        heads, kv_heads = self.model.config.heads, self.model.config.kv_heads
        rotate_rows(qkv_MXH[:, : heads + kv_heads], *angles)
        q_BTNH, k_BTGH, v_BTGH = qkv_MXH.unflatten(0, (batch, tokens)).split((heads, kv_heads, kv_heads), dim=2)
        if self.cache is None:
            k_BGSH, v_BGSH = k_BTGH.transpose(1, 2), v_BTGH.transpose(1, 2)
        else:
            k_BGSH, v_BGSH = self.cache.extend(layer, self.first, k_BTGH, v_BTGH)
        wanted = self.wanted if last else tokens
        return self.model.attention(q_BTNH, k_BGSH, v_BGSH, wanted).flatten(0, 1)


class Llama:
    """A LLaMA: ``ops`` compute linear layers, and may compute what stands between; all else is done here, in float32.

    Args:
        config: the model's architecture.
        ops: who computes the linear layers.
        offload_attention: also send attention's two products to ``ops`` (`open` only; slower on one machine).
    """

    def __init__(self, config: LlamaConfig, ops: LinearOps, *, offload_attention: bool = False) -> None:
        self.config = config
        self._ops = ops
        state = ops.state()
        groups = [group.name for group in linear_groups(config)]
        self._norms = {group: state[norm] for group in groups if (norm := norm_before(group))}
        self._chains = chains(config)
        self._rotary = RotaryTable(config)
        self._offload_attention = offload_attention

    @property
    def ops(self) -> LinearOps:
        """Who computes the linear layers."""
        return self._ops

    def use(self, ops: LinearOps) -> None:
        """Let others compute the linear layers from now on: of the same model, after a link was lost."""
        self._ops = ops

    @torch.inference_mode()
    def prefill(self, ids_BT: Tensor, *, all_logits: bool = False, parts: int = 1) -> Tensor:
        """Run prompts of equal length.

        Args:
            ids_BT: int64 token ids, shape (B, T).
            all_logits: compute the head at every position instead of the last.
            parts: micro-batches that take turns: while the product of one is away, another is computed here.

        Returns:
            float32 logits, shape (B, V), or (B, T, V) with ``all_logits``.

        Raises:
            InputError: no prompt, an empty one, or one longer than the model's context.
        """
        if not len(ids_BT):
            raise InputError("the batch has no prompts; it takes at least 1.")
        check_prompt_length(ids_BT.shape[1], self.config)
        cut = micro_batches(ids_BT.shape[0], ids_BT.shape[1], parts)
        logits = self.run(list(self._chunks(ids_BT, cut, all_logits)))
        sizes = [part.sequences.stop - part.sequences.start for part in cut]
        shaped = [y_RV.unflatten(0, (size, y_RV.shape[0] // size)) for size, y_RV in zip(sizes, logits, strict=True)]
        groups = len({part.sequences.start for part in cut})
        if not all_logits:
            return torch.cat(shaped[-groups:])[:, 0]
        return torch.cat([torch.cat(shaped[group::groups], dim=1) for group in range(groups)])

    @torch.inference_mode()
    def run(self, parts: Sequence[Rows]) -> list[Tensor]:
        """Run sets of rows that take turns: while the product of one is away, another is computed here.

        Of two parts with tokens of one sequence the earlier tokens come first.

        Returns:
            float32 logits of each part's kept rows, shape (R, V).
        """
        team = self.team(parts)
        return in_turns(team.parts, team.abandon)

    def team(self, parts: Sequence[Rows]) -> Team[Tensor]:
        """Return the same, not started; to be run in inference mode."""
        return Team([self._run(rows) for rows in parts], self._ops.abandon)

    def _chunks(self, ids_BT: Tensor, cut: list[MicroBatch], all_logits: bool) -> Iterator[Rows]:  # noqa: FBT001
        tokens = ids_BT.shape[1]
        caches: dict[int, KVCache] = {}
        for part in cut:
            ids = ids_BT[part.sequences, part.first : part.end]
            if part.end < tokens and part.first == 0:
                caches[part.sequences.start] = KVCache(self.config, len(ids), tokens)
            yield _Chunk(
                ids_BT=ids,
                first=part.first,
                cache=caches.get(part.sequences.start),
                wanted=ids.shape[1] if all_logits else int(part.end == tokens),
                model=self,
            )

    def _run(self, rows: Rows) -> Steps:
        """Compute the kept rows' logits, shape (R, V)."""
        config, kept = self.config, rows.kept
        angles = self._rotary.at(rows.positions_M)
        x_MD = yield self._ops.embedding(rows.ids_M)
        normed = rms_norm(x_MD, self._norms["layers.0.qkv"], config.rms_norm_eps)
        product = yield self._ops.linear("layers.0.qkv", normed)
        for index, chain in enumerate(self._chains):
            last = index == config.layers - 1
            attended = rows.attend(index, product.view(len(x_MD), -1, config.head_size), angles, last=last)
            if last and kept is not None:
                x_MD = x_MD[kept]
                if not len(kept):
                    return x_MD.new_empty(0, config.vocab_size)
            product = yield from self._chain(chain, attended, x_MD)
        return product

    def _chain(self, groups: tuple[str, ...], attended_MK: Tensor, residual_MD: Tensor) -> Steps:
        """End a layer and begin the next; see ``LinearOps.linear_chain``."""
        pending = self._ops.linear_chain(groups, attended_MK, residual_MD)
        if pending:
            return (yield pending)
        o, gate_up, down, following = groups
        y_MD = yield self._ops.linear(o, attended_MK)
        product = yield self._ops.linear(gate_up, self._normed_sum(residual_MD, y_MD, gate_up))
        y_MD = yield self._ops.linear(down, swiglu(product))
        return (yield self._ops.linear(following, self._normed_sum(residual_MD, y_MD, following)))

    def _normed_sum(self, residual_MD: Tensor, added_MD: Tensor, group: str) -> Tensor:
        """Add to the residual stream, and return what a group reads of it."""
        return add_rms_norm(residual_MD, added_MD, self._norms[group], self.config.rms_norm_eps)

    def attention(self, q_BTNH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, wanted: int) -> Tensor:
        """Compute attention here, or send its products away; see ``causal_attention``."""
        if self._offload_attention:
            return offloaded_attention(q_BTNH, k_BGSH, v_BGSH, wanted, self._ops.matmul)
        return causal_attention(q_BTNH, k_BGSH, v_BGSH, wanted)


def check_prompt_length(tokens: int, config: LlamaConfig) -> None:
    """Refuse a prompt that does not fit the model's context.

    Raises:
        InputError: no tokens, or too many.
    """
    if not 0 < tokens <= config.context_length:
        raise InputError(f"the prompt has {tokens} tokens; this model takes 1 to {config.context_length}.")
