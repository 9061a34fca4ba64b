"""One variant of a benchmark in a process of its own: loads, then does as asked, once per line on standard input.

``python -m tsqp.bench.child '{"level": ..., ...}'`` reads one ``Ask`` per line and prints one ``Sample`` per line.
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
from tsqp.bench import memory
from tsqp.bench.trace import Recording
from tsqp.config import EnclaveConfig
from tsqp.levels import open_model, runnable
from tsqp.loaded import Runnable, with_all_logits
from tsqp.meter import Recorder

LEGACY = ("legacy", "legacy-matmul")


class Order(Struct, frozen=True, kw_only=True):
    """What to load: a level, or a client of the first protocol.

    ``mask_pool`` is for how many tokens masks are ready before each run; 0 has them made or fetched during it.
    ``micro_batches`` is as in ``EnclaveConfig``. ``floor`` measures the level's parts alone instead of the level,
    products on ``device``.
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
    own_key: str | None = None
    micro_batches: int | None = None
    floor: bool = False
    device: str = "cpu"


class Ask(Struct, frozen=True, kw_only=True):
    """What to run: the first ``tokens`` of the prompt (0 for all of it), ``batch`` times; ``trace`` records it."""

    tokens: int = 0
    batch: int = 1
    trace: bool = False


class Sample(Struct, frozen=True, kw_only=True):
    """One prefill: seconds, bytes, round trips, and the predicted token to compare variants by.

    ``waited_s`` is the time blocked on the worker, ``worker_s`` the worker's own account of its work, ``pcie_s`` the
    part of that for copies. ``peak_bytes`` is the process's largest resident memory so far, less what it held when
    torch and TSQP were imported.
    """

    total_s: float
    next_token: int = -1
    waited_s: float = 0.0
    worker_s: float = 0.0
    pcie_s: float = 0.0
    round_trips: int = 0
    bytes_moved: int = 0
    micro_batches: int = 1
    quantise_s: float = 0.0
    mask_s: float = 0.0
    ahead_s: float = 0.0
    check_s: float = 0.0
    mask_wait_s: float = 0.0
    peak_bytes: int = 0
    recording: Recording | None = None

    @property
    def enclave_s(self) -> float:
        """All that is not waiting for the worker."""
        return self.total_s - self.waited_s

    @property
    def wire_s(self) -> float:
        """What the enclave waited beyond the worker's work; with overlap waiting may be less than that."""
        return max(0.0, self.waited_s - self.worker_s)

    @property
    def protection_s(self) -> float:
        """Quantising, masking, unmasking and checking."""
        return self.quantise_s + self.mask_s + self.ahead_s + self.check_s


Run = Callable[[Ask, torch.Tensor], Sample]

# A process that fills its pool may be stopped between asking a dealer and the reply, for all the others' turns.
_REQUEST_TIMEOUT_S = 24 * 3600.0


def tell(sentence: str) -> None:
    """Pass a notice on to whoever runs the benchmark."""
    sys.stderr.write(f"{sentence}\n")


def settings(order: Order) -> EnclaveConfig:
    """Return the settings that an order stands for."""
    return EnclaveConfig(
        level=order.level,
        dtype=order.dtype,
        worker=order.worker,
        mask_pool=order.mask_pool,
        mask_memory=order.mask_memory,
        dealers=order.dealers,
        dealer_keys=order.dealer_keys,
        own_key=order.own_key,
        micro_batches=order.micro_batches,
        request_timeout_s=_REQUEST_TIMEOUT_S,
    )


@contextmanager
def _own(order: Order, imported_bytes: int) -> Iterator[Run]:
    """Run one of our levels, or the monolithic baseline."""
    config = settings(order)
    opened = open_model(order.model, order.level)
    with runnable(order.level, opened, config, on_notice=tell) as loaded:
        model = with_all_logits(loaded) if order.all_logits else loaded

        def run(ask: Ask, ids_BT: torch.Tensor) -> Sample:
            measured, logits_BV = prefill.timed(model, ids_BT)
            cost = measured.cost
            return Sample(
                total_s=measured.total_s,
                next_token=int(logits_BV[0].argmax()),
                waited_s=measured.waited_s,
                worker_s=measured.worker_s,
                pcie_s=cost.copy_ns / 1e9,
                round_trips=cost.round_trips,
                bytes_moved=cost.bytes_sent + cost.bytes_received,
                micro_batches=model.micro_batches(ids_BT),
                quantise_s=cost.quantise_ns / 1e9,
                mask_s=cost.mask_ns / 1e9,
                ahead_s=cost.ahead_ns / 1e9,
                check_s=cost.check_ns / 1e9,
                mask_wait_s=cost.mask_wait_ns / 1e9,
                peak_bytes=max(0, memory.peak() - imported_bytes),
                recording=_record(model, ids_BT) if ask.trace else None,
            )

        yield run


def _record(model: Runnable, ids_BT: torch.Tensor) -> Recording:
    """Prefill once more and write down what happens when."""
    model.prepare(lambda _done: None)
    model.meter.recorder = recorder = Recorder()
    began_ns = time.monotonic_ns()
    try:
        model.predict(ids_BT)
    finally:
        model.meter.recorder = None
    return Recording(began_ns=began_ns, ended_ns=time.monotonic_ns(), spans=recorder.spans, requests=recorder.requests)


@contextmanager
def _legacy(order: Order, _imported_bytes: int) -> Iterator[Run]:
    """Run the published client."""
    from tsqp.bench.legacy_client import LegacyClient, build  # noqa: PLC0415  transformers and msgpack are optional

    client = LegacyClient(order.worker)
    model = build(Path(order.model), client, matmul=order.level == "legacy-matmul")

    def run(_ask: Ask, ids_BT: torch.Tensor) -> Sample:
        trips, moved = client.round_trips, client.bytes_sent + client.bytes_received
        started = time.perf_counter()
        with torch.inference_mode():
            logits_BTV = model(ids_BT, use_cache=False).logits
        return Sample(
            total_s=time.perf_counter() - started,
            round_trips=client.round_trips - trips,
            bytes_moved=client.bytes_sent + client.bytes_received - moved,
            next_token=int(logits_BTV[0, -1].argmax()),
        )

    try:
        yield run
    finally:
        client.close()


@contextmanager
def _floor(order: Order, _imported_bytes: int) -> Iterator[Run]:
    """Run a level's parts alone."""
    from tsqp.bench.floors import Floors  # noqa: PLC0415  it loads the worker's side too

    with Floors.of(order) as floors:
        yield lambda _ask, ids_BT: floors.measured(ids_BT)


def main() -> None:
    """Follow the order given as the first argument."""
    imported_bytes = memory.resident()
    order = msgspec.json.decode(sys.argv[1], type=Order)
    torch.set_num_threads(order.threads)
    ids_T = torch.tensor(order.ids)
    how = _floor if order.floor else _legacy if order.level in LEGACY else _own
    with how(order, imported_bytes) as run:
        for line in sys.stdin:
            ask = msgspec.json.decode(line, type=Ask)
            ids_BT = ids_T[: ask.tokens or len(ids_T)].repeat(ask.batch, 1)
            sys.stdout.write(msgspec.json.encode(run(ask, ids_BT)).decode() + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
