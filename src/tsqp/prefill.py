"""Runs and times a prefill at any level: what ``tsqp prefill`` and the published scripts do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tsqp.errors import InputError
from tsqp.loaded import Runnable
from tsqp.meter import Meter
from tsqp.model.architecture import LlamaConfig
from tsqp.model.llama import check_prompt_length
from tsqp.model.tokenizer import Tokenizer
from tsqp.reports import PrefillReport

SAMPLE_TEXT = (
    "A trusted process keeps the prompt, the keys and the cache; an untrusted machine multiplies large matrices. "
    "The two meet at a narrow door, and everything that passes through it is written down. Whoever rents the larger "
    "machine learns how long a sentence is and when it was asked, but the words themselves stay at home. "
)


@dataclass(frozen=True, slots=True)
class Run:
    """Cost of one prefill: seconds in total, blocked on the worker, and by the worker's account; bytes and calls.

    ``fill_s`` is the time spent filling the mask pool before it.
    """

    total_s: float
    waited_s: float
    worker_s: float
    fill_s: float
    cost: Meter


def prompt_ids(
    architecture: LlamaConfig, tokenizer: Tokenizer | None, prompt: str | None, tokens: int | None
) -> list[int]:
    """Return the token ids of a run's prompt.

    Args:
        architecture: bounds the length.
        tokenizer: the model's, if it has one.
        prompt: text, or None for a built-in one (random ids where there is no tokenizer).
        tokens: cut the prompt to this many; None keeps a given prompt whole.

    Raises:
        InputError: an empty prompt, one shorter than ``tokens``, or longer than the model's context.
    """
    if prompt is not None:
        if tokenizer is None:
            raise InputError("this model has no tokenizer.json, so it takes no text prompt: use --tokens.")
        ids = tokenizer.encode(prompt)
        if not ids:
            raise InputError("the prompt is empty: give at least one token.")
        if tokens is not None and len(ids) < tokens:
            raise InputError(f"the prompt has {len(ids)} tokens, --tokens asks for {tokens}: lower it or leave it out.")
        ids = ids[:tokens]
    else:
        ids = _sample_ids(architecture, tokenizer, 128 if tokens is None else tokens)
    check_prompt_length(len(ids), architecture)
    return ids


def _sample_ids(architecture: LlamaConfig, tokenizer: Tokenizer | None, count: int) -> list[int]:
    """Return ``count`` ids of the built-in text, or of a seeded generator; never many more than the context holds."""
    count = max(0, min(count, architecture.context_length + 1))
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        ids: list[int] = torch.randint(architecture.vocab_size, (count,), generator=generator).tolist()
        return ids
    once = tokenizer.encode(SAMPLE_TEXT)
    return (once * (count // len(once) + 1))[:count]


def timed(model: Runnable, ids_BT: Tensor, on_fill: Callable[[float], None] = lambda _done: None) -> tuple[Run, Tensor]:
    """Fill the mask pool if there is one, then run one prefill; return what it cost and its logits (B, V)."""
    model.prepare(on_fill)
    before = replace(model.meter)
    started = time.perf_counter()
    logits_BV = model.predict(ids_BT)
    total_s = time.perf_counter() - started
    cost = model.meter.since(before)
    return Run(total_s, cost.waited_ns / 1e9, cost.compute_ns / 1e9, 0.0, cost), logits_BV


def measure(
    model: Runnable,
    ids_BT: Tensor,
    repeats: int,
    describe: dict[str, str | int | None],
    decode: Callable[[list[int]], str] | None,
    on_step: Callable[[str, float], None] = lambda _name, _done: None,
) -> PrefillReport:
    """Prefill once to warm up, then ``repeats`` times, and report the median run.

    Args:
        model: what to run.
        ids_BT: int64 token ids.
        repeats: at least 1.
        describe: the report's ``model``, ``level``, ``masks``, ``dtype`` and ``threads``.
        decode: token ids to text, if the model has a tokenizer.
        on_step: told the fraction done.

    Raises:
        InputError: fewer than one repeat.
    """
    if repeats < 1:
        raise InputError(f"--repeat {repeats}: at least 1 is needed.")
    runs = []
    _, logits_BV = timed(model, ids_BT, lambda done: on_step("filling the mask pool", done))
    for done in range(repeats):
        filled_ns = model.meter.mask_fill_ns
        run, logits_BV = timed(model, ids_BT)
        runs.append(replace(run, fill_s=(model.meter.mask_fill_ns - filled_ns) / 1e9))
        on_step("prefill", (done + 1) / repeats)
    next_tokens: list[int] = logits_BV.argmax(dim=-1).tolist()
    describe = {**describe, "micro_batches": model.micro_batches(ids_BT)}
    return _report(runs, ids_BT, describe, next_tokens, decode)


def _report(
    runs: list[Run],
    ids_BT: Tensor,
    describe: dict[str, str | int | None],
    next_tokens: list[int],
    decode: Callable[[list[int]], str] | None,
) -> PrefillReport:
    batch, tokens = ids_BT.shape
    median_s = statistics.median(run.total_s for run in runs)
    run = min(runs, key=lambda each: abs(each.total_s - median_s))
    return PrefillReport(
        **describe,  # type: ignore[arg-type]  # names and types are the caller's
        tokens=tokens,
        batch=batch,
        repeats=len(runs),
        prefill_s=median_s,
        prefill_s_all=[each.total_s for each in runs],
        tokens_per_s=batch * tokens / median_s,
        round_trips=run.cost.round_trips,
        bytes_sent=run.cost.bytes_sent,
        bytes_received=run.cost.bytes_received,
        enclave_s=run.total_s - run.waited_s,
        worker_s=run.worker_s,
        waited_s=run.waited_s,
        pcie_s=run.cost.copy_ns / 1e9,
        wire_s=max(0.0, run.waited_s - run.worker_s),
        verified_rows=run.cost.verified_rows,
        mask_rows_used=run.cost.mask_rows,
        mask_wait_s=run.cost.mask_wait_ns / 1e9,
        mask_fill_s=run.fill_s,
        quantise_s=run.cost.quantise_ns / 1e9,
        mask_s=run.cost.mask_ns / 1e9,
        ahead_s=run.cost.ahead_ns / 1e9,
        check_s=run.cost.check_ns / 1e9,
        next_tokens=next_tokens,
        next_text=decode(next_tokens[:1]) if decode else None,
    )
