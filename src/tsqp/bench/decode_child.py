"""One variant of ``tsqp bench decode`` in a process of its own: an engine, or transformers.

``python -m tsqp.bench.decode_child '{"level": ..., ...}'`` reads one ``DecodeAsk`` per line and prints one
``DecodeSample`` per line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from tsqp.bench.child import Order, settings, tell
from tsqp.bench.decode_watch import TimedOps, Watch
from tsqp.bench.monolithic import Monolithic
from tsqp.enclave.mask_pool import MaskPool
from tsqp.engine.api import Generation, Sampling
from tsqp.engine.loop import GenerationEngine
from tsqp.engine.opening import open_engine
from tsqp.errors import InternalError
from tsqp.levels import open_model
from tsqp.wire import codec

# Masks for a long run are some thousand megabytes; a slow machine makes 50 MB a second.
_FILL_TIMEOUT_S = 300.0
_FILL_POLL_S = 0.01


class DecodeOrder(Order, frozen=True, kw_only=True):
    """What to load.

    ``ids`` are what prompts are cut out of, ``prompt_tokens`` each. ``masks_ready``: the pool is full before a run,
    and left alone until it ends; else it is as large as the engine makes it, and filled as it always is.
    """

    prompt_tokens: int
    masks_ready: bool = False


class DecodeAsk(Struct, frozen=True, kw_only=True):
    """What to generate: ``batch`` answers at once, of ``tokens`` tokens each.

    ``top_p`` 1 is greedy, else temperature 1 with it. ``parts`` also times products; a step is less than 0.1 ms longer.
    """

    batch: int
    tokens: int
    top_p: float = 1.0
    parts: bool = False


class DecodeSample(Struct, frozen=True, kw_only=True):
    """The steps of one run in which every request had a token, and their seconds.

    ``first_token`` is the first request's, to compare variants by. ``mask_wait_s`` was spent waiting for masks, and
    ``mask_fill_s`` on filling the pool meanwhile. ``products_s`` to ``told_s`` are there with ``parts`` only: time in
    products, of it waiting for the worker and the worker's own account; in attention; in computing steps, products and
    attention included; in choosing tokens and telling them.
    """

    total_s: float
    steps: int
    first_token: int
    bytes_moved: int = 0
    mask_wait_s: float = 0.0
    mask_fill_s: float = 0.0
    products_s: float = 0.0
    waited_s: float = 0.0
    worker_s: float = 0.0
    attention_s: float = 0.0
    computed_s: float = 0.0
    told_s: float = 0.0


Run = Callable[[DecodeAsk], DecodeSample]


@contextmanager
def _engine(order: DecodeOrder) -> Iterator[Run]:
    """Run an engine at one of our levels."""
    model = open_model(order.model, order.level)
    config = replace(settings(order), mask_pool=order.mask_pool if order.masks_ready else None)
    with open_engine(model, config, on_notice=tell) as engine:
        pool = engine.stepper.pool if order.masks_ready else None

        def run(ask: DecodeAsk) -> DecodeSample:
            if pool is not None:
                _wait_until_full(pool)
            with engine.stepper.paused() if pool is not None else nullcontext():
                return _timed(engine, order, ask) if ask.parts else _generated(engine, order, ask, None)

        yield run


def _wait_until_full(pool: MaskPool) -> None:
    deadline = time.monotonic() + _FILL_TIMEOUT_S
    while not pool.is_full:
        if time.monotonic() > deadline:
            raise InternalError(
                f"the mask pool holds {pool.held} of {pool.wanted} rows after {_FILL_TIMEOUT_S:g} s; expected all."
            )
        time.sleep(_FILL_POLL_S)


def _timed(engine: GenerationEngine, order: DecodeOrder, ask: DecodeAsk) -> DecodeSample:
    """Generate with a clock around every product."""
    llama = engine.stepper.llama
    ops = llama.ops
    timed = TimedOps(ops)
    llama.use(timed)
    try:
        return _generated(engine, order, ask, timed)
    finally:
        llama.use(ops)


def _generated(engine: GenerationEngine, order: DecodeOrder, ask: DecodeAsk, products: TimedOps | None) -> DecodeSample:
    sampling = Sampling(temperature=0) if ask.top_p == 1 else Sampling(temperature=1, top_p=ask.top_p, seed=0)
    watch = Watch(engine, ask.batch, ask.tokens, products)
    for number, ids in enumerate(prompts(order, ask.batch)):
        generation = Generation(prompt_ids=ids, max_tokens=ask.tokens, sampling=sampling, ignore_end=True)
        engine.submit(generation, watch.listener(number))
    first, last = watch.window()
    spent = {name: last.seconds[name] - first.seconds[name] for name in last.seconds}
    sample = DecodeSample(
        total_s=last.at_s - first.at_s,
        steps=last.steps - first.steps,
        first_token=watch.first_token,
        bytes_moved=last.bytes_moved - first.bytes_moved,
        mask_wait_s=spent["mask_wait"],
        mask_fill_s=spent["mask_fill"],
    )
    if products is None:
        return sample
    return msgspec.structs.replace(
        sample,
        products_s=last.products_s - first.products_s,
        waited_s=spent["worker"] + spent["wire"],
        worker_s=spent["worker"],
        attention_s=spent["attention"],
        computed_s=last.computed_s - first.computed_s,
        told_s=spent["sampling"],
    )


def prompts(order: DecodeOrder, batch: int) -> list[tuple[int, ...]]:
    """Cut prompts out of a text, each one token further on: of one length, and all different."""
    return [tuple(order.ids[first : first + order.prompt_tokens]) for first in range(batch)]


class _Arrivals:
    """A streamer for transformers' ``generate``: notes when the prompt and then each token comes."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def put(self, _ids: Tensor) -> None:
        self.at_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to show."""


@contextmanager
def _transformers(order: DecodeOrder) -> Iterator[Run]:
    """Run transformers' ``generate``: its own KV cache, sdpa, the requests as one batch."""
    model: Any = Monolithic(Path(order.model), codec.TORCH_DTYPES[order.dtype]).model

    def run(ask: DecodeAsk) -> DecodeSample:
        ids_BT, arrivals = torch.tensor(prompts(order, ask.batch)), _Arrivals()
        with torch.inference_mode():
            all_BT = model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=ask.tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                streamer=arrivals,
            )
        _, first_s, *_, last_s = arrivals.at_s
        return DecodeSample(
            total_s=last_s - first_s, steps=ask.tokens - 1, first_token=int(all_BT[0, order.prompt_tokens])
        )

    yield run


def main() -> None:
    """Follow the order given as the first argument."""
    order = msgspec.json.decode(sys.argv[1], type=DecodeOrder)
    torch.set_num_threads(order.threads)
    how = _transformers if order.level == "monolithic" else _engine
    with how(order) as run:
        for line in sys.stdin:
            sample = run(msgspec.json.decode(line, type=DecodeAsk))
            sys.stdout.write(msgspec.json.encode(sample).decode() + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
