"""Loads a Hugging Face decoder as users of transformers do, from a directory and without code from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsqp.errors import SetupError, UnsupportedModelError, WeightsError


def load_decoder(directory: Path, dtype: str | None = None) -> Any:  # noqa: ANN401  transformers has no types
    """Load a causal language model on the CPU.

    Args:
        directory: of ``config.json`` and safetensors files.
        dtype: ``float32``, ``float16`` or ``bfloat16``; None means as stored.

    Raises:
        SetupError: transformers is not installed.
        UnsupportedModelError: it knows no such decoder.
        WeightsError: the files cannot be read.
    """
    try:
        from transformers import AutoModelForCausalLM  # noqa: PLC0415  of an extra
    except ModuleNotFoundError as error:
        raise SetupError(f"{error.name} is not installed: run 'pip install tsqp[reference]'.") from error
    options = {"dtype": dtype or "auto", "local_files_only": True, "use_safetensors": True}
    try:
        return AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    except (ValueError, ImportError) as error:
        raise UnsupportedModelError(f"transformers cannot load {directory} as a decoder: {error}") from error
    except OSError as error:
        raise WeightsError(f"transformers cannot read {directory}: {error}") from error
