"""One variant of a benchmark in a process of its own: loads, then prefills once per line on standard input.

``python -m tsqp.bench.child '{"variant": ..., ...}'`` prints one JSON line per run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from msgspec import Struct

from tsqp import prefill
from tsqp.config import EnclaveConfig
from tsqp.levels import open_model, runnable, with_all_logits

LEGACY = ("legacy", "legacy-matmul")


class Order(Struct, frozen=True, kw_only=True):
    """What to load: a level, or a client of the first protocol.

    ``mask_pool`` is for how many tokens masks are ready before each run; 0 has them made or fetched during it.
    """

    level: str
    model: str
    ids: list[int]
    dtype: str
    threads: int
    worker: str
    all_logits: bool = False
    mask_pool: int = 0
    mask_memory: int = 1 << 30
    dealers: tuple[str, ...] = ()
    dealer_keys: tuple[str, ...] = ()


class Sample(Struct, frozen=True, kw_only=True):
    """One prefill: seconds, bytes, round trips, and the predicted token to compare variants by."""

    total_s: float
    worker_s: float
    wire_s: float
    round_trips: int
    bytes_moved: int
    next_token: int
    protection_s: float = 0.0
    mask_wait_s: float = 0.0


Run = Callable[[torch.Tensor], Sample]


def _tell(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")


@contextmanager
def _own(order: Order) -> Iterator[Run]:
    """Run one of our levels, or the monolithic baseline."""
    config = EnclaveConfig(
        dtype=order.dtype,
        worker=order.worker,
        mask_pool=order.mask_pool,
        mask_memory=order.mask_memory,
        dealers=order.dealers,
        dealer_keys=order.dealer_keys,
    )
    opened = open_model(order.model, order.level)
    with runnable(order.level, opened, config, on_notice=_tell) as loaded:
        model = with_all_logits(loaded) if order.all_logits else loaded

        def run(ids_BT: torch.Tensor) -> Sample:
            measured, logits_BV = prefill.timed(model, ids_BT)
            return Sample(
                total_s=measured.total_s,
                worker_s=measured.worker_s,
                wire_s=measured.waited_s - measured.worker_s,
                round_trips=measured.cost.round_trips,
                bytes_moved=measured.cost.bytes_sent + measured.cost.bytes_received,
                next_token=int(logits_BV[0].argmax()),
                protection_s=measured.cost.protection_ns / 1e9,
                mask_wait_s=measured.cost.mask_wait_ns / 1e9,
            )

        yield run


@contextmanager
def _legacy(order: Order) -> Iterator[Run]:
    """Run the published client."""
    from tsqp.bench.legacy_client import LegacyClient, build  # noqa: PLC0415  transformers and msgpack are optional

    client = LegacyClient(order.worker)
    model = build(Path(order.model), client, matmul=order.level == "legacy-matmul")

    def run(ids_BT: torch.Tensor) -> Sample:
        trips, moved = client.round_trips, client.bytes_sent + client.bytes_received
        started = time.perf_counter()
        with torch.inference_mode():
            logits_BTV = model(ids_BT, use_cache=False).logits
        return Sample(
            total_s=time.perf_counter() - started,
            worker_s=0.0,
            wire_s=0.0,
            round_trips=client.round_trips - trips,
            bytes_moved=client.bytes_sent + client.bytes_received - moved,
            next_token=int(logits_BTV[0, -1].argmax()),
        )

    try:
        yield run
    finally:
        client.close()


def main() -> None:
    """Follow the order given as the first argument."""
    order = msgspec.json.decode(sys.argv[1], type=Order)
    torch.set_num_threads(order.threads)
    ids_BT = torch.tensor([order.ids])
    with (_legacy if order.level in LEGACY else _own)(order) as run:
        for _ in sys.stdin:
            sys.stdout.write(msgspec.json.encode(run(ids_BT)).decode() + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
