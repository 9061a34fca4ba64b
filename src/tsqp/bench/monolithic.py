"""The baseline: Hugging Face's own LLaMA in one process, set up as fast as transformers lets it be."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tsqp.errors import SetupError


class Monolithic:
    """Last-position logits of transformers' model: sdpa attention, inference mode, no KV cache.

    Args:
        directory: a Hugging Face directory.
        dtype: of weights and activations.

    Raises:
        SetupError: transformers is not installed.
    """

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        try:
            from transformers import AutoModelForCausalLM  # noqa: PLC0415  an optional dependency
            from transformers.utils import logging  # noqa: PLC0415
        except ImportError as error:
            raise SetupError("the level 'monolithic' needs transformers: pip install 'tsqp[reference]'.") from error
        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        ).eval()

    @torch.inference_mode()
    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Return float32 logits of the last position, shape (B, V)."""
        logits: Tensor = self.model(ids_BT, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1].float()
