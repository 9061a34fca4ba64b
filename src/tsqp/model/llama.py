"""LLaMA's forward pass, written once against ``LinearOps``.

Shapes: B batch, T tokens, D hidden, F FFN, N query heads, G key-value heads, X = N + 2G heads of q, k and v together,
E = X*H columns of them, H head size, V vocabulary, K a linear's input.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.errors import InputError
from tsqp.model.architecture import LlamaConfig
from tsqp.model.attention import causal_attention, offloaded_attention
from tsqp.model.kv_cache import KVCache
from tsqp.model.layers import RotaryTable, rms_norm, rotate, swiglu
from tsqp.model.ops import LinearOps
from tsqp.model.overlap import MicroBatch, Pending, in_turns, micro_batches

Steps = Generator[Pending, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tokens of some sequences that are computed together.

    Attributes:
        ids_BT: their ids.
        first: position of the first one.
        cache: keys and values of the tokens before, and of these for the tokens after; None for a whole prompt.
        wanted: of how many of the last positions logits are asked for.
    """

    ids_BT: Tensor
    first: int
    cache: KVCache | None
    wanted: int

    def kept(self, x_BTK: Tensor) -> Tensor:
        """Drop the positions that nothing is asked of, once the last layer's attention has read them."""
        return x_BTK[:, x_BTK.shape[1] - self.wanted :]


class Llama:
    """A LLaMA whose linear layers are computed by ``ops`` and everything else here, in float32.

    Args:
        config: the model's architecture.
        ops: who computes the linear layers.
        offload_attention: also send attention's two products to ``ops`` (`open` only; slower on one machine).
    """

    def __init__(self, config: LlamaConfig, ops: LinearOps, *, offload_attention: bool = False) -> None:
        self.config = config
        self._ops = ops
        self._norms = ops.state()
        self._rotary = RotaryTable(config)
        self._offload_attention = offload_attention

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
        logits = in_turns([self._run(chunk) for chunk in self._chunks(ids_BT, cut, all_logits)], self._ops.abandon)
        groups = len({part.sequences.start for part in cut})
        if not all_logits:
            return torch.cat(logits[-groups:])[:, 0]
        return torch.cat([torch.cat(logits[group::groups], dim=1) for group in range(groups)])

    def _chunks(self, ids_BT: Tensor, cut: list[MicroBatch], all_logits: bool) -> Iterator[_Chunk]:  # noqa: FBT001
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
            )

    def _run(self, chunk: _Chunk) -> Steps:
        """Compute one chunk's logits, shape (B, wanted, V)."""
        x_MD = yield self._ops.embedding(chunk.ids_BT.reshape(-1))
        x_BTD = x_MD.view(*chunk.ids_BT.shape, -1)
        for index in range(self.config.layers):
            normed = self._norm(f"model.layers.{index}.input_layernorm", x_BTD)
            qkv_BTE = yield from self._linear(f"layers.{index}.qkv", normed)
            q_BTNH, k_BGSH, v_BGSH = self._heads(qkv_BTE, index, chunk)
            if index == self.config.layers - 1:
                x_BTD = chunk.kept(x_BTD)
                if not chunk.wanted:
                    return x_BTD
            attended = self._attention(q_BTNH, k_BGSH, v_BGSH, x_BTD.shape[1])
            x_BTD = (yield from self._linear(f"layers.{index}.o", attended)).add_(x_BTD)
            normed = self._norm(f"model.layers.{index}.post_attention_layernorm", x_BTD)
            hidden_BTF = swiglu((yield from self._linear(f"layers.{index}.gate_up", normed)))
            x_BTD = (yield from self._linear(f"layers.{index}.down", hidden_BTF)).add_(x_BTD)
        return (yield from self._linear("head", self._norm("model.norm", x_BTD)))

    def _heads(self, qkv_BTE: Tensor, layer: int, chunk: _Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, T, N, H), and keys and values (B, G, S, H) of these and all earlier tokens."""
        config = self.config
        heads_BTXH = qkv_BTE.unflatten(-1, (-1, config.head_size))
        rotated, v_BTGH = heads_BTXH.split((config.heads + config.kv_heads, config.kv_heads), dim=2)
        angles = self._rotary.between(chunk.first, chunk.first + qkv_BTE.shape[1])
        q_BTNH, k_BTGH = rotate(rotated, *angles).split((config.heads, config.kv_heads), dim=2)
        if chunk.cache is None:
            return q_BTNH, k_BTGH.transpose(1, 2), v_BTGH.transpose(1, 2)
        return q_BTNH, *chunk.cache.extend(layer, chunk.first, k_BTGH, v_BTGH)

    def _attention(self, q_BTNH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, wanted: int) -> Tensor:
        if self._offload_attention:
            return offloaded_attention(q_BTNH, k_BGSH, v_BGSH, wanted, self._ops.matmul)
        return causal_attention(q_BTNH, k_BGSH, v_BGSH, wanted)

    def _norm(self, name: str, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self._norms[f"{name}.weight"], self.config.rms_norm_eps)

    def _linear(self, group: str, x_BTK: Tensor) -> Steps:
        y_MN = yield self._ops.linear(group, x_BTK.flatten(0, 1))
        return y_MN.view(*x_BTK.shape[:2], y_MN.shape[-1])


def check_prompt_length(tokens: int, config: LlamaConfig) -> None:
    """Refuse a prompt that does not fit the model's context.

    Raises:
        InputError: no tokens, or too many.
    """
    if not 0 < tokens <= config.context_length:
        raise InputError(f"the prompt has {tokens} tokens; this model takes 1 to {config.context_length}.")
