"""Runs and times a prefill at any level: what ``tsqp prefill`` and the published scripts do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tsqp.config import EnclaveConfig
from tsqp.enclave.connect import connect
from tsqp.enclave.session import Meter
from tsqp.errors import InputError
from tsqp.model.architecture import LlamaConfig, weight_shapes
from tsqp.model.digest import model_digest
from tsqp.model.linears import Linears
from tsqp.model.llama import Llama, check_prompt_length
from tsqp.model.ops import LocalOps, read_state
from tsqp.model.tokenizer import Tokenizer
from tsqp.model.weights import Checkpoint
from tsqp.reports import PrefillReport
from tsqp.wire import codec

SAMPLE_TEXT = (
    "A trusted process keeps the prompt, the keys and the cache; an untrusted machine multiplies large matrices. "
    "The two meet at a narrow door, and everything that passes through it is written down. Whoever rents the larger "
    "machine learns how long a sentence is and when it was asked, but the words themselves stay at home. "
)

# Between two replies the enclave's other threads sleep. Waking one costs some 0.1 ms, as much as a whole operation on
# this many tokens; attention, the largest, gains from a second thread above it (docs/performance.md).
_TOKENS_WORTH_THREADS = 256

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Runnable:
    """A model ready to predict: ids (B, T) to last-position logits (B, V), and what it costs on the wire.

    ``predict_all`` gives logits at every position, (B, T, V); the monolithic baseline has none.
    """

    predict: Predict
    meter: Meter
    predict_all: Predict | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """Cost of one prefill: seconds in total, blocked on the worker, and by the worker's account; bytes and calls."""

    total_s: float
    waited_s: float
    worker_s: float
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


@contextmanager
def runnable(
    level: str,
    directory: Path,
    architecture: LlamaConfig,
    config: EnclaveConfig,
    worker: str | None,
    *,
    offload_attention: bool = False,
    on_step: Callable[[str, float], None] = lambda _name, _done: None,
) -> Iterator[Runnable]:
    """Load a model at a level for the time of a ``with`` block.

    Args:
        level: ``open``, ``local`` or ``monolithic``.
        directory: the model's Hugging Face directory.
        architecture: its config.
        config: dtype and timeouts.
        worker: the worker's address at `open`.
        offload_attention: also send attention's products to the worker.
        on_step: told the fraction done of a named step.

    Raises:
        TsqpError: as loading or connecting does.
    """
    dtype = codec.TORCH_DTYPES[config.dtype]
    if level == "monolithic":
        from tsqp.bench.monolithic import Monolithic  # noqa: PLC0415  transformers is needed by this level only

        yield Runnable(Monolithic(directory, dtype), Meter())
        return
    checkpoint = Checkpoint(directory)
    checkpoint.require(weight_shapes(architecture))
    if level == "local":
        linears = Linears(
            architecture,
            checkpoint,
            dtype,
            torch.device("cpu"),
            lambda done: on_step("loading the weights", done),
        )
        yield _our_own(Llama(architecture, LocalOps(linears, read_state(linears, checkpoint))), Meter())
        return
    if worker is None:
        raise InputError("the level 'open' needs a worker's address.")
    digest = model_digest(architecture, checkpoint, lambda done: on_step("hashing the weights", done))
    with connect(worker, config, architecture, digest) as link:
        model = Llama(architecture, link.ops, offload_attention=offload_attention)
        yield _beside_a_worker(_our_own(model, link.session.meter))


def _our_own(model: Llama, meter: Meter) -> Runnable:
    return Runnable(model.prefill, meter, lambda ids_BT: model.prefill(ids_BT, all_logits=True))


def _beside_a_worker(model: Runnable) -> Runnable:
    """Use one thread where the enclave's share of a prefill is too small to wake others for."""

    def with_fitting_threads(predict: Predict) -> Predict:
        def run(ids_BT: Tensor) -> Tensor:
            threads = torch.get_num_threads()
            if ids_BT.numel() < _TOKENS_WORTH_THREADS:
                torch.set_num_threads(1)
            try:
                return predict(ids_BT)
            finally:
                torch.set_num_threads(threads)

        return run

    predict_all = with_fitting_threads(model.predict_all) if model.predict_all else None
    return Runnable(with_fitting_threads(model.predict), model.meter, predict_all)


def with_all_logits(model: Runnable) -> Runnable:
    """Return a model that computes the head at every position and hands out the last one's logits.

    Raises:
        InputError: the baseline, which has no such way.
    """
    predict_all = model.predict_all
    if predict_all is None:
        raise InputError("the monolithic baseline computes the head at the last position only.")
    return Runnable(lambda ids_BT: predict_all(ids_BT)[:, -1], model.meter)


def timed(model: Runnable, ids_BT: Tensor) -> tuple[Run, Tensor]:
    """Run one prefill; return what it cost and its logits (B, V)."""
    before = replace(model.meter)
    started = time.perf_counter()
    logits_BV = model.predict(ids_BT)
    total_s = time.perf_counter() - started
    after = model.meter
    cost = Meter(
        round_trips=after.round_trips - before.round_trips,
        bytes_sent=after.bytes_sent - before.bytes_sent,
        bytes_received=after.bytes_received - before.bytes_received,
        waited_ns=after.waited_ns - before.waited_ns,
        compute_ns=after.compute_ns - before.compute_ns,
    )
    return Run(total_s, cost.waited_ns / 1e9, cost.compute_ns / 1e9, cost), logits_BV


def measure(
    model: Runnable,
    ids_BT: Tensor,
    repeats: int,
    describe: dict[str, str | int],
    decode: Callable[[list[int]], str] | None,
    on_step: Callable[[str, float], None] = lambda _name, _done: None,
) -> PrefillReport:
    """Prefill once to warm up, then ``repeats`` times, and report the median run.

    Args:
        model: what to run.
        ids_BT: int64 token ids.
        repeats: at least 1.
        describe: the report's ``model``, ``level``, ``dtype`` and ``threads``.
        decode: token ids to text, if the model has a tokenizer.
        on_step: told the fraction done.

    Raises:
        InputError: fewer than one repeat.
    """
    if repeats < 1:
        raise InputError(f"--repeat {repeats}: at least 1 is needed.")
    runs = []
    _, logits_BV = timed(model, ids_BT)
    for done in range(repeats):
        run, logits_BV = timed(model, ids_BT)
        runs.append(run)
        on_step("prefill", (done + 1) / repeats)
    next_tokens: list[int] = logits_BV.argmax(dim=-1).tolist()
    return _report(runs, ids_BT, describe, next_tokens, decode)


def _report(
    runs: list[Run],
    ids_BT: Tensor,
    describe: dict[str, str | int],
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
        wire_s=run.waited_s - run.worker_s,
        next_tokens=next_tokens,
        next_text=decode(next_tokens[:1]) if decode else None,
    )
