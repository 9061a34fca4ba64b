"""LLaMA's forward pass, written once against ``LinearOps``.

Shapes: B batch, T tokens, D hidden, F FFN, N query heads, G key-value heads, X = N + 2G heads of q, k and v together,
E = X*H columns of them, H head size, V vocabulary, K a linear's input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsqp.errors import InputError
from tsqp.model.architecture import LlamaConfig
from tsqp.model.attention import causal_attention, offloaded_attention
from tsqp.model.layers import RotaryTable, rms_norm, rotate, swiglu
from tsqp.model.ops import LinearOps


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
    def prefill(self, ids_BT: Tensor, *, all_logits: bool = False) -> Tensor:
        """Run prompts of equal length.

        Args:
            ids_BT: int64 token ids, shape (B, T).
            all_logits: compute the head at every position instead of the last.

        Returns:
            float32 logits, shape (B, V), or (B, T, V) with ``all_logits``.

        Raises:
            InputError: an empty prompt, or one longer than the model's context.
        """
        batch, tokens = ids_BT.shape
        check_prompt_length(tokens, self.config)
        x_BTD = self._ops.embedding(ids_BT.reshape(-1)).view(batch, tokens, -1)
        for index in range(self.config.layers - 1):
            x_BTD = self._layer(index, x_BTD)
        x_BTD = self._layer(self.config.layers - 1, x_BTD, last_only=not all_logits)
        x_BTD = self._norm("model.norm", x_BTD)
        logits_BTV = self._linear("head", x_BTD)
        return logits_BTV if all_logits else logits_BTV[:, 0]

    def _layer(self, index: int, x_BTD: Tensor, *, last_only: bool = False) -> Tensor:
        """Run one layer; with ``last_only`` drop every position but the last as soon as attention has read it."""
        normed = self._norm(f"model.layers.{index}.input_layernorm", x_BTD)
        attended = self._attention(self._linear(f"layers.{index}.qkv", normed))
        if last_only:
            attended, x_BTD = attended[:, -1:], x_BTD[:, -1:]
        x_BTD = self._linear(f"layers.{index}.o", attended).add_(x_BTD)
        normed = self._norm(f"model.layers.{index}.post_attention_layernorm", x_BTD)
        hidden_BTF = swiglu(self._linear(f"layers.{index}.gate_up", normed))
        return self._linear(f"layers.{index}.down", hidden_BTF).add_(x_BTD)

    def _attention(self, qkv_BTE: Tensor) -> Tensor:
        config = self.config
        heads_BTXH = qkv_BTE.unflatten(-1, (-1, config.head_size))
        rotated, v_BTGH = heads_BTXH.split((config.heads + config.kv_heads, config.kv_heads), dim=2)
        q_BTNH, k_BTGH = rotate(rotated, *self._rotary.upto(qkv_BTE.shape[1])).split(
            (config.heads, config.kv_heads), dim=2
        )
        if self._offload_attention:
            return offloaded_attention(q_BTNH, k_BTGH, v_BTGH, self._ops.matmul)
        return causal_attention(q_BTNH, k_BTGH, v_BTGH)

    def _norm(self, name: str, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self._norms[f"{name}.weight"], self.config.rms_norm_eps)

    def _linear(self, group: str, x_BTK: Tensor) -> Tensor:
        y_MN = self._ops.linear(group, x_BTK.flatten(0, 1))
        return y_MN.view(*x_BTK.shape[:2], y_MN.shape[-1])


def check_prompt_length(tokens: int, config: LlamaConfig) -> None:
    """Refuse a prompt that does not fit the model's context.

    Raises:
        InputError: no tokens, or too many.
    """
    if not 0 < tokens <= config.context_length:
        raise InputError(f"the prompt has {tokens} tokens; this model takes 1 to {config.context_length}.")
