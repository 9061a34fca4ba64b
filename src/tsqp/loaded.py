"""A loaded model, whatever its level: how it predicts and takes steps of generation, in parts that take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tsqp.config import EnclaveConfig
from tsqp.enclave.connect import Peer
from tsqp.enclave.mask_pool import MaskPool
from tsqp.errors import InputError, TsqpError
from tsqp.meter import Meter
from tsqp.model.llama import Llama, Rows
from tsqp.model.overlap import micro_batches, teams_in_turns
from tsqp.threads import using_threads
from tsqp.transport.urls import parse
from tsqp.wire.messages import Welcome

# Between two replies the enclave's other threads sleep. Waking one costs some 0.1 ms, as much as a whole operation on
# this many tokens; attention, the largest, gains from a second thread above it (docs/performance.md).
_TOKENS_WORTH_THREADS = 256

# Smaller micro-batches read the weights more often and multiply less each time; more of them hide more of a slow link.
_TOKENS_PER_MICRO_BATCH = 64
_MOST_MICRO_BATCHES = 8

Predict = Callable[[Tensor], Tensor]
OnStep = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Stepper:
    """Computes steps of generation.

    Attributes:
        llama: the model.
        groups: into how many parts a step is cut that take turns.
        own_products: whether this process computes the products, and so needs all its threads.
        pool: masks, at `masked`.
        paused: during a ``with`` block the pool is not filled.
        reopen: opens the link to the worker again if it was lost; False where it was not, and something else is.
        lose: takes the link for lost, so that ``reopen`` opens it; it was found out otherwise that nobody answers.
        look: raises a ``TsqpError`` where the worker does not answer.
        check: raises one where masks cannot be made.
    """

    llama: Llama
    groups: int = 1
    own_products: bool = False
    pool: MaskPool | None = None
    paused: Callable[[], AbstractContextManager[None]] = nullcontext
    reopen: Callable[[], bool] = lambda: False
    lose: Callable[[], None] = lambda: None
    look: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None


@torch.inference_mode()
def run_together(work: Sequence[tuple[Stepper, Sequence[Rows]]]) -> list[list[Tensor] | TsqpError]:
    """Compute a step: the parts of each stepper on its own worker, all at the same time.

    Returns:
        For each stepper float32 logits of each part's kept rows, shape (R, V), or why nothing of it can be used.
    """
    rows = max(len(part.ids_M) for _, parts in work for part in parts)
    few = rows < _TOKENS_WORTH_THREADS and not any(stepper.own_products for stepper, _ in work)
    with using_threads(1) if few else nullcontext():
        return teams_in_turns([stepper.llama.team(parts) for stepper, parts in work])


@dataclass(frozen=True, slots=True)
class Runnable:
    """A model ready to predict: ids (B, T) to last-position logits (B, V), and what it costs.

    ``predict_all`` gives logits at every position, (B, T, V); the monolithic baseline has none. ``micro_batches`` tells
    into how many parts prompts are cut that take turns. ``prepare`` waits until the mask pool is full, where there is
    one, and is told where to report progress. ``stepper`` is for generation; the baseline has none.
    """

    predict: Predict
    meter: Meter
    predict_all: Predict | None = None
    micro_batches: Callable[[Tensor], int] = lambda _ids_BT: 1
    prepare: Callable[[Callable[[float], None]], None] = lambda _on_progress: None
    stepper: Stepper | None = None


def shares_cores(worker: Peer, welcome: Welcome) -> bool:
    """Tell whether the worker computes on the cores that this process runs on. By its own account: it is for speed."""
    return welcome.device == "cpu" and parse(worker.address).stays_on_this_machine


def cutting(config: EnclaveConfig, *, shared_cores: bool) -> Callable[[Tensor], int]:
    """Return into how many micro-batches prompts are cut: what the user says, else by their length.

    One where the worker shares this process's cores: then it has nothing to do while this process computes for another
    micro-batch, but neither is there a core that waits.
    """

    def count(ids_BT: Tensor) -> int:
        best = 1 if shared_cores else min(_MOST_MICRO_BATCHES, max(1, ids_BT.numel() // _TOKENS_PER_MICRO_BATCH))
        return len(micro_batches(ids_BT.shape[0], ids_BT.shape[1], config.micro_batches or best))

    return count


def step_groups(config: EnclaveConfig, *, shared_cores: bool) -> int:
    """Return into how many parts a step of generation is cut; see ``cutting``."""
    return config.micro_batches or (1 if shared_cores else 2)


def taking_turns(model: Llama, meter: Meter, cut: Callable[[Tensor], int]) -> Runnable:
    """Run prefills in micro-batches, with one thread where these are too small to wake others for.

    `local` over a packed model does so too, but for its products: attention's last bits depend on how a prompt is cut
    and on the number of threads, and the integer levels give the same bits for the same number of micro-batches.
    """

    def predict(ids_BT: Tensor, *, all_logits: bool = False) -> Tensor:
        parts = cut(ids_BT)
        small = ids_BT.numel() // parts < _TOKENS_WORTH_THREADS
        with using_threads(1) if small else nullcontext():
            return model.prefill(ids_BT, all_logits=all_logits, parts=parts)

    return Runnable(predict, meter, partial(predict, all_logits=True), cut)


def with_all_logits(model: Runnable) -> Runnable:
    """Return a model that computes the head at every position and hands out the last one's logits.

    Raises:
        InputError: the baseline, which has no such way.
    """
    predict_all = model.predict_all
    if predict_all is None:
        raise InputError("the monolithic baseline computes the head at the last position only.")
    return replace(model, predict=lambda ids_BT: predict_all(ids_BT)[:, -1])
