"""Keys and values of the tokens that a sequence has had so far, layer by layer. They stay in the enclave.

Shapes: B sequences, G key-value heads, C capacity in tokens, S tokens so far, T new tokens, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsqp.model.architecture import LlamaConfig


class KVCache:
    """Room for the keys and values of some sequences of equal length.

    Args:
        config: the model's architecture.
        batch: sequences, B.
        capacity: tokens of each, C.
    """

    def __init__(self, config: LlamaConfig, batch: int, capacity: int) -> None:
        self._kv = torch.empty(config.layers, 2, batch, config.kv_heads, capacity, config.head_size)

    def extend(self, layer: int, first: int, k_BTGH: Tensor, v_BTGH: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of tokens ``first`` to ``first + T``; return those of all tokens up to there.

        Args:
            layer: the layer's number.
            first: tokens that are there already.
            k_BTGH: float32 keys, after rotary embedding.
            v_BTGH: float32 values.

        Returns:
            Views of shape (B, G, S, H), S = first + T.
        """
        end = first + k_BTGH.shape[1]
        k_BGCH, v_BGCH = self._kv[layer]
        k_BGCH[:, :, first:end] = k_BTGH.transpose(1, 2)
        v_BGCH[:, :, first:end] = v_BTGH.transpose(1, 2)
        return k_BGCH[:, :, :end], v_BGCH[:, :, :end]
