"""Attach a tiny random model of each architecture at every level and print what moved and what became of its logits.

``--write`` puts the table into docs/any-decoder.md; tests/integration/test_any_decoder.py compares it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import logging

import tsqp

PAGE = Path(__file__).parents[1] / "docs" / "any-decoder.md"
MARKS = ("<!-- table:any-decoder -->\n", "<!-- /table -->\n")
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
# Names of transformers' configurations and models, and what differs from SIZES; None leaves a size out.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {"tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": 6}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 16}),
    "Gemma 2": ("Gemma2", {"head_dim": 16, "sliding_window": 6}),
    "Gemma 3": ("Gemma3", {"head_dim": 16, "sliding_window": 6}),
    "Phi-3": ("Phi3", {"pad_token_id": 0}),
    "GPT-NeoX": ("GPTNeoX", {"num_key_value_heads": None}),
    "GPT-2": ("GPT2", {"num_key_value_heads": None, "intermediate_size": None, "max_position_embeddings": None}),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": ("Qwen2Moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 40}),
    "gpt-oss": ("GptOss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
}
CLASSES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "GPT2": ("GPT2Config", "GPT2LMHeadModel")}

# How a level is attached; a test serves the linear map in its own process.
Served = Callable[[str], AbstractContextManager[dict[str, Any]]]


def build(name: str, **options: Any) -> Any:  # noqa: ANN401  transformers has no types
    """Make a tiny model with random weights in which nothing is zero or one.

    Args:
        name: of ``MODELS``.
        options: of its configuration, over the others.
    """
    stem, differing = MODELS[name]
    config, model = CLASSES.get(stem, (f"{stem}Config", f"{stem}ForCausalLM"))
    sizes = {key: value for key, value in {**SIZES, **differing, **options}.items() if value is not None}
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * drawn if path.endswith("bias") else 1 + 0.3 * drawn)
            else:
                parameter.copy_(drawn if "embed" in path else 1.5 * drawn / parameter.shape[-1] ** 0.5)
    return made


def prompt() -> Tensor:
    """Return token ids, shape (2, 9)."""
    return torch.randint(SIZES["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:  # noqa: ANN401
    """Return the logits of ``prompt`` at every position, shape (2, 9, V)."""
    found: Tensor = model(prompt(), use_cache=False).logits
    return found


@dataclass(frozen=True)
class Row:
    """What is said of one architecture; differences are of logits, divided by the largest."""

    name: str
    attached: str
    stayed: str
    open_error: float
    exact_error: float
    same: bool

    def __str__(self) -> str:
        errors = f"{self.open_error:.0e} | {'yes' if self.same else 'NO'} | {self.exact_error:.0e}"
        return f"| {self.name} | {self.attached} | {self.stayed} | {errors} |"


HEADING = """| architecture | moved | stayed | `open` differs by | `verified` = `masked` = `local` | int8 differs by |
| --- | --- | --- | ---: | --- | ---: |
"""


def row(name: str, served: Served = lambda _level: nullcontext({})) -> Row:
    """Attach a model of one architecture at every level."""
    model = build(name)
    plain = logits(model)
    found: dict[str, Tensor] = {}
    attached, stayed = "", ""
    for level in ("open", "local", "verified", "masked"):
        with served(level) as options, tsqp.attach(model, level=level, accept_expert_leak=True, **options) as handle:
            found[level] = logits(model)
            attached = f"{len(handle.moved)} modules in {len(handle.groups)} groups"
            stayed = ", ".join(dict.fromkeys(_kind(model, path) for path in handle.stayed))
    return Row(
        name,
        attached,
        stayed,
        _error(found["open"], plain),
        _error(found["local"], plain),
        torch.equal(found["verified"], found["masked"]) and torch.equal(found["local"], found["masked"]),
    )


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _kind(model: Any, path: str) -> str:  # noqa: ANN401
    module = model.get_submodule(path)
    return f"`{re.sub(r'[.][0-9]+[.]', '.*.', path)}` ({type(module).__name__})"


def table(rows: list[Row]) -> str:
    """Return the page's table."""
    return HEADING + "".join(f"{each}\n" for each in rows)


def main() -> None:
    """Print the table, or put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the table of docs/any-decoder.md")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    text = table([row(name) for name in MODELS])
    if arguments.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        PAGE.write_text(f"{before}{MARKS[0]}{text}{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
