"""``tsqp bench``: prefill at every level, against transformers and against the published client, in one run.

Every variant is a process of its own that stays loaded; rounds go through all of them in turn, so that drift of the
machine hits each alike. Those not running are stopped (SIGSTOP), since OpenMP threads that wait actively would
otherwise take the cores from the one being measured.
"""

from __future__ import annotations

import datetime as dt
import os
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tsqp.bench import hardware
from tsqp.bench.child import Order, Sample
from tsqp.bench.plans import PLANS, Plan
from tsqp.config import EnclaveConfig
from tsqp.errors import InternalError
from tsqp.launch import local_worker
from tsqp.levels import open_model
from tsqp.model.locate import locate_packed
from tsqp.paths import private_socket_directory
from tsqp.prefill import prompt_ids
from tsqp.reports import BenchReport, Ratio, Variant
from tsqp.transport import keys

_WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_WARM_UP = 2
# Each turn begins with one run that is not counted: the caches still hold the variant before.
_RUNS_PER_TURN = 4


def _without_waiting() -> dict[str, str]:
    """Return the environment less what the user may have set about OpenMP."""
    return {name: value for name, value in os.environ.items() if name not in _WAITING_VARIABLES}


class _Child:
    """A running variant, stopped while it is not measured."""

    def __init__(self, plan: Plan, order: Order) -> None:
        self.plan = plan
        self.samples: list[Sample] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tsqp.bench.child", msgspec.json.encode(order).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_without_waiting() | plan.environment,
        )
        self._paused = False

    def run(self) -> Sample:
        """Let it prefill once."""
        if self._process.stdin is None or self._process.stdout is None:
            raise InternalError("the benchmark's child has no pipes.")
        if self._paused:
            self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            sample = msgspec.json.decode(line, type=Sample)
        except (BrokenPipeError, msgspec.DecodeError) as error:
            raise InternalError(
                f"variant {self.plan.name} ended with exit code {self._process.wait()}; see above."
            ) from error
        self._process.send_signal(signal.SIGSTOP)
        self._paused = True
        return sample

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


@dataclass(frozen=True, slots=True)
class _Peers:
    """The workers by link, the dealers and their public keys."""

    links: dict[str, str]
    dealers: tuple[str, ...]
    dealer_keys: tuple[str, ...]


@contextmanager
def _peers(directory: Path, packed: Path, config: EnclaveConfig, threads: int) -> Iterator[_Peers]:
    """Run a float worker, one of int8 codes, and a dealer unless there are dealers already."""
    dtype = config.dtype
    shared = ["--threads", str(threads), "--device", "cpu"]
    floats = ["--model", str(directory), "--dtype", dtype, *shared]
    codes = ["--model", str(packed), *shared]
    with ExitStack() as stack:
        private = stack.enter_context(private_socket_directory())
        public, secret = keys.create(private, "dealer")
        tcp, ipc = f"tcp://127.0.0.1:{_free_port()}", f"ipc://{private}/worker"
        environment = _without_waiting()
        shm = stack.enter_context(local_worker([*floats, "--listen", tcp, "--listen", ipc], environment=environment))
        exact = stack.enter_context(local_worker(codes, environment=environment))
        dealers, dealer_keys = config.dealers, config.dealer_keys
        if not dealers and config.masks != "enclave":
            own = local_worker([*codes, "--key", str(secret)], "ipc", environment=environment, command="dealer")
            dealers, dealer_keys = (stack.enter_context(own),), (str(public),)
        yield _Peers({"shm": shm, "ipc": ipc, "tcp": tcp, "exact": exact}, dealers, dealer_keys)


def _order(plan: Plan, peers: _Peers, model: Path, ids: list[int], config: EnclaveConfig, threads: int) -> Order:
    pool = len(ids) if config.mask_pool is None else config.mask_pool
    return Order(
        level=plan.level,
        model=str(model),
        ids=ids,
        dtype=config.dtype,
        threads=threads,
        worker=peers.links[plan.link],
        all_logits=plan.all_logits,
        mask_pool=pool if plan.masks_ready else 0,
        mask_memory=config.mask_memory,
        dealers=peers.dealers if plan.dealer else (),
        dealer_keys=peers.dealer_keys if plan.dealer else (),
    )


def run(
    config: EnclaveConfig,
    tokens: int,
    threads: int,
    *,
    rounds: int,
    on_step: Callable[[str, float], None],
) -> BenchReport:
    """Measure every variant.

    Args:
        config: a plain model, the dtype of the levels in floats, and masks: ``enclave`` leaves out the variants with
            dealers, ``dealers`` those without; given dealers take the place of one that is started here.
        tokens: prompt length.
        threads: per process.
        rounds: turns of each variant, each of one run to warm up and four that count.
        on_step: told the fraction done.

    Raises:
        TsqpError: the worker does not start, or a variant fails.
    """
    model, dtype = config.model, config.dtype
    plans = [
        plan
        for plan in PLANS
        if config.masks is None or plan.level != "masked" or plan.dealer == (config.masks == "dealers")
    ]
    opened = open_model(model, "open", on_step)
    packed = locate_packed(model, lambda done: on_step("packing the model", done))
    ids = prompt_ids(opened.architecture, opened.tokenizer, None, tokens)
    with ExitStack() as stack:
        peers = stack.enter_context(_peers(opened.directory, packed, config, threads))
        children = [
            stack.enter_context(
                _started(plan, _order(plan, peers, packed if plan.packed else opened.directory, ids, config, threads))
            )
            for plan in plans
        ]
        _measure(children, rounds, on_step)
        variants = [_summary(child, tokens) for child in children]
    _check_agreement(children)
    return BenchReport(
        date=dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        commit=hardware.commit(),
        command=f"tsqp bench --model {model} --tokens {tokens} --dtype {dtype} --threads {threads} --rounds {rounds}"
        + (f" --masks {config.masks}" if config.masks else ""),
        hardware=hardware.describe(),
        model=model,
        tokens=tokens,
        dtype=dtype,
        threads=threads,
        warm_up=_WARM_UP,
        rounds=rounds,
        variants=variants,
        ratios=ratios(variants),
    )


@contextmanager
def _started(plan: Plan, order: Order) -> Iterator[_Child]:
    child = _Child(plan, order)
    try:
        yield child
    finally:
        child.close()


def _measure(children: list[_Child], rounds: int, on_step: Callable[[str, float], None]) -> None:
    total = len(children) + rounds
    for done, child in enumerate(children):
        on_step("benchmark", done / total)
        for _ in range(_WARM_UP):
            child.samples = [child.run()]
    timed = [child for child in children if child.plan.timed]
    for child in timed:
        child.samples = []
    for done in range(rounds):
        on_step("benchmark", (len(children) + done) / total)
        for child in timed:
            child.run()
            child.samples += [child.run() for _ in range(_RUNS_PER_TURN)]
    on_step("benchmark", 1.0)


def _check_agreement(children: list[_Child]) -> None:
    """Refuse to report times of variants that do not predict the same token: in floats, and over the packed model."""
    for packed in (False, True):
        predicted = {c.plan.name: c.samples[-1].next_token for c in children if c.plan.packed == packed}
        if len(set(predicted.values())) != 1:
            raise InternalError(f"the variants do not agree on the next token: {predicted}.")


def _summary(child: _Child, tokens: int) -> Variant:
    seconds = [sample.total_s for sample in child.samples]
    median_s = statistics.median(seconds)
    typical = min(child.samples, key=lambda sample: abs(sample.total_s - median_s))
    return Variant(
        name=child.plan.name,
        settings=child.plan.settings,
        median_s=median_s,
        p95_s=statistics.quantiles(seconds, n=20)[-1] if len(seconds) > 1 else seconds[0],
        all_s=seconds,
        bytes_per_token=typical.bytes_moved / tokens,
        round_trips=typical.round_trips,
        enclave_s=typical.total_s - typical.worker_s - typical.wire_s,
        worker_s=typical.worker_s,
        wire_s=typical.wire_s,
        protection_s=typical.protection_s,
        mask_wait_s=typical.mask_wait_s,
    )


def ratios(variants: list[Variant]) -> list[Ratio]:
    """Compare the variants; limits are those the project promises for 128 tokens in float32.

    ``monolithic`` is the better of the two OpenMP settings. The published client computed attention's products on the
    worker; that it is three times as slow is promised of that, on the fastest transport of each side.
    """
    by_name = {variant.name: variant for variant in variants}
    baseline_s = min(by_name[name].median_s for name in ("monolithic-active", "monolithic-passive"))
    open_, ipc = by_name["open"], by_name["open-ipc"]
    legacy, with_matmul = by_name["legacy"], by_name["legacy-matmul"]
    share = open_.bytes_per_token
    every = by_name["open-all-logits"].bytes_per_token
    masked = by_name.get("masked") or by_name["masked-dealer"]
    return [
        _ratio("open over shm / monolithic", open_.median_s / baseline_s),
        _ratio("open over ipc / monolithic", ipc.median_s / baseline_s, at_most=1.10),
        _ratio("local / monolithic", by_name["local"].median_s / baseline_s),
        _ratio("open over shm / local", open_.median_s / by_name["local"].median_s),
        _ratio("local int8 / monolithic", by_name["local-int8"].median_s / baseline_s),
        _ratio("verified / monolithic", by_name["verified"].median_s / baseline_s),
        _ratio(f"{masked.name}, pool filled / monolithic", masked.median_s / baseline_s, at_most=2.6),
        *(
            _ratio(f"{label} / monolithic", by_name[name].median_s / baseline_s)
            for name, label in (
                ("masked-sustained", "masked, masks made within"),
                ("masked-dealer", "masked, dealer, pool filled"),
                ("masked-dealer-sustained", "masked, dealer, fetched within"),
            )
            if name in by_name
        ),
        _ratio(f"{masked.name}, pool filled / local", masked.median_s / by_name["local"].median_s),
        _ratio(f"{masked.name}: protection's share of the time", masked.protection_s / masked.median_s),
        _ratio("legacy client over tcp / open over shm", legacy.median_s / open_.median_s),
        _ratio(
            "legacy client with Matmul over tcp / open over shm", with_matmul.median_s / open_.median_s, at_least=3.0
        ),
        _ratio("legacy client over tcp / open over ipc", legacy.median_s / ipc.median_s),
        _ratio("bytes per token: open / legacy", share / legacy.bytes_per_token, at_most=0.73),
        _ratio(
            "bytes per token: open / legacy with Matmul",
            share / with_matmul.bytes_per_token,
            at_most=0.53,
        ),
        _ratio("bytes per token: open with head at every position / legacy", every / legacy.bytes_per_token),
    ]


def _ratio(name: str, value: float, at_most: float | None = None, at_least: float | None = None) -> Ratio:
    if at_most is not None:
        return Ratio(name=name, value=value, limit=f"at most {at_most:g}", ok=value <= at_most)
    if at_least is not None:
        return Ratio(name=name, value=value, limit=f"at least {at_least:g}", ok=value >= at_least)
    return Ratio(name=name, value=value, limit="", ok=None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
