"""What a step is to the enclave, the link and the worker, in units that are counted: rows, words, bytes, multiply-adds.

Shapes: M rows of a step, R kept ones, K inputs and N outputs of a product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tsqp.config import EXACT_LEVELS, EngineConfig
from tsqp.engine.memory import chunk_tokens
from tsqp.model.architecture import LlamaConfig
from tsqp.plan.calls import Call, asked, calls

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Step:
    """Rows that are computed together.

    Attributes:
        rows: M.
        kept: of how many of them logits are computed, R.
        sequences: that they belong to.
        context: how many tokens a row's attention reads, on average.
    """

    rows: float
    kept: float
    sequences: float
    context: float


@dataclass(frozen=True, slots=True)
class Product:
    """One request of a step.

    Attributes:
        words: numbers that go to the worker and come back.
        bytes: both ways, without headers.
        weight_bytes: that the worker reads for it.
        macs: multiply-adds.
    """

    words: float
    bytes: float
    weight_bytes: float
    macs: float


@dataclass(frozen=True, slots=True)
class StepWork:
    """A step's products in order, and what the enclave does beside them.

    Attributes:
        products: one for each round trip.
        layers: of attention.
        scores: multiply-adds of attention's first product; its second has as many.
        cached: numbers of keys and values that attention reads.
        logits: numbers that tokens are chosen from.
    """

    products: tuple[Product, ...]
    layers: int
    scores: float
    cached: float
    logits: float


def work(architecture: LlamaConfig, level: str, dtype: str, step: Step) -> StepWork:
    """Count a step.

    Args:
        architecture: the model's.
        level: `open`, `verified` or `masked`.
        dtype: of weights and activations at `open`.
        step: which; numbers of rows may be averages.
    """
    item = 1 if level in EXACT_LEVELS else _ITEM_BYTES[dtype]
    made = asked(calls(architecture, level, dtype), math.ceil(step.kept))
    products = tuple(_product(call, step, item) for call in made)
    width = architecture.heads * architecture.head_size
    # Of the last layer too few rows are left to matter where few are kept.
    rows = step.rows * (architecture.layers - 1) + (step.kept or step.rows)
    cached = step.sequences * step.context * 2 * architecture.kv_heads * architecture.head_size * architecture.layers
    logits = step.kept * architecture.vocab_size
    return StepWork(products, architecture.layers, rows * step.context * width, cached, logits)


def _product(call: Call, step: Step, item: int) -> Product:
    rows = step.kept if call.is_kept else step.rows
    weights = sum(group.rows * group.in_features for group in call.groups)
    sent, received = call.payload(1)
    columns = math.prod(call.sent.shape) + math.prod(call.received.shape)
    return Product(rows * columns, rows * (sent + received), item * weights, rows * weights)


def prefill_steps(tokens: int, first: int = 0) -> list[Step]:
    """Return the steps in which an engine reads a prompt alone, with the usual settings.

    Args:
        tokens: of the prompt.
        first: how many are known already.
    """
    chunk = chunk_tokens(EngineConfig())
    found = []
    for start in range(first, tokens, chunk):
        count = min(chunk, tokens - start)
        found.append(Step(count, float(start + count == tokens), 1, start + (count + 1) / 2))
    return found


def together(steps: Iterable[StepWork]) -> dict[str, float]:
    """Add the enclave's work on steps up: what its constants are multiplied with, by unit."""
    listed = list(steps)
    products = [product for step in listed for product in step.products]
    return {
        "step": float(len(listed)),
        "call": float(len(products)),
        "word": sum(product.words for product in products),
        "score": sum(step.scores for step in listed),
        "cached": sum(step.cached for step in listed),
        "logit": sum(step.logits for step in listed),
    }


def of_product(product: Product) -> dict[str, float]:
    """Return a worker's work on a product, by unit."""
    return {
        "call": 1.0,
        "word": product.words,
        "weight_byte": product.weight_bytes,
        "mac": product.macs,
    }
