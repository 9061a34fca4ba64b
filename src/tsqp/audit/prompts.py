"""The prompt that is attacked and the text that the attacker trains on, as token ids."""

from __future__ import annotations

import torch
from torch import Tensor

from tsqp.audit.evidence import MIN_TOKENS, token_limit, training_ids
from tsqp.audit.public_text import PUBLIC_TEXT
from tsqp.errors import InputError
from tsqp.model.architecture import LlamaConfig
from tsqp.model.tokenizer import Tokenizer

LETTER = (
    "Dear Dr. Lindqvist, my blood test came back this morning and the number you warned me about is 11.4. I have not "
    "told my wife yet. The transfer to the clinic, 4,850 euros from account 7731, goes out on Friday under the name of "
    "Marta Kowalski. Please do not call the office; write to me here. What should I say to my daughter when she asks?"
)
_RANDOM_TOKENS = 64
_SEED = 20240521


def prompt_ids(architecture: LlamaConfig, tokenizer: Tokenizer | None, prompt: str | None) -> tuple[int, ...]:
    """Return the prompt's token ids; random ones where the model has no tokenizer.

    Args:
        architecture: bounds the length.
        tokenizer: the model's.
        prompt: text, or None for a built-in letter.

    Raises:
        InputError: a text for a model without a tokenizer, or one that is too short or too long to be attacked.
    """
    limit = token_limit(architecture)
    if tokenizer is None:
        if prompt is not None:
            raise InputError("this model has no tokenizer.json, so it takes no text prompt: leave out --prompt.")
        generator = torch.Generator().manual_seed(_SEED)
        count = min(_RANDOM_TOKENS, limit)
        return tuple(torch.randint(architecture.vocab_size, (count,), generator=generator).tolist())
    ids = tuple(tokenizer.encode(LETTER if prompt is None else prompt))
    if not MIN_TOKENS <= len(ids) <= limit:
        raise InputError(
            f"the prompt has {len(ids)} tokens; the audit takes {MIN_TOKENS} to {limit} for this model, since "
            "membership in a space of rows says something only while the rows are few."
        )
    return ids


def training_text_ids(architecture: LlamaConfig, tokenizer: Tokenizer | None) -> Tensor:
    """Return what the attacker trains on: public text where there is a tokenizer, and random tokens, int64 (B, T)."""
    generator = torch.Generator().manual_seed(_SEED)
    text = tokenizer.encode(PUBLIC_TEXT) if tokenizer else []
    return training_ids(architecture.vocab_size, text, generator)
