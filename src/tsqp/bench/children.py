"""The processes of a benchmark: one per variant, and the workers and dealers that they use.

Each variant stays loaded. Those not running are stopped (SIGSTOP), since OpenMP threads that wait actively would
otherwise take the cores from the one being measured.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from tsqp.bench.child import Ask, Order, Sample
from tsqp.bench.plans import Plan
from tsqp.config import EnclaveConfig
from tsqp.errors import InternalError
from tsqp.launch import local_worker
from tsqp.paths import private_socket_directory
from tsqp.transport import keys

OnStep = Callable[[str, float], None]
Answer = TypeVar("Answer", bound=Struct)

WARM_UP = 2
# Each turn begins with one run that is not counted: the caches still hold the variant before.
RUNS_PER_TURN = 4
_WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_WHOLE = Ask()


def without_waiting() -> dict[str, str]:
    """Return the environment less what the user may have set about OpenMP."""
    return {name: value for name, value in os.environ.items() if name not in _WAITING_VARIABLES}


class Process:
    """A process that answers each line with one; stopped while it has nothing to answer.

    Args:
        name: of what it measures.
        module: what it runs, with the order as its argument.
        order: what it loads.
        environment: it runs in, beside this process's own.
    """

    def __init__(self, name: str, module: str, order: Struct, environment: Mapping[str, str]) -> None:
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, msgspec.json.encode(order).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**without_waiting(), **environment},
        )
        self._paused = False

    def answer(self, ask: Struct, kind: type[Answer]) -> Answer:
        """Let it do as asked, once.

        Raises:
            InternalError: the process has ended.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise InternalError("the benchmark's child has no pipes.")
        if self._paused:
            self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(msgspec.json.encode(ask).decode() + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            answer = msgspec.json.decode(line, type=kind)
        except (BrokenPipeError, msgspec.DecodeError) as error:
            raise InternalError(
                f"variant {self._name} ended with exit code {self._process.wait()}; see above."
            ) from error
        self._process.send_signal(signal.SIGSTOP)
        self._paused = True
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


class Child:
    """A running variant of prefill.

    Args:
        plan: which variant.
        order: what it loads.
    """

    def __init__(self, plan: Plan, order: Order) -> None:
        self.plan = plan
        self.samples: list[Sample] = []
        self._process = Process(plan.name, "tsqp.bench.child", order, plan.environment)

    def run(self, ask: Ask = _WHOLE) -> Sample:
        """Let it prefill once.

        Raises:
            InternalError: the process has ended.
        """
        return self._process.answer(ask, Sample)

    def close(self) -> None:
        """End the process."""
        self._process.close()


@contextmanager
def started(plan: Plan, order: Order) -> Iterator[Child]:
    """Run one variant for the time of a ``with`` block."""
    child = Child(plan, order)
    try:
        yield child
    finally:
        child.close()


def take_turns(
    children: Sequence[Child], rounds: int, on_step: OnStep, ask: Ask = _WHOLE, runs: int = RUNS_PER_TURN
) -> None:
    """Measure every variant in turns, so that drift of the machine hits each alike.

    Args:
        children: those whose plan is not timed run to warm up only, and keep that sample.
        rounds: turns of each.
        on_step: told the fraction done.
        ask: what each runs.
        runs: how many of a turn count, after one that does not.
    """
    total = len(children) + rounds
    for done, child in enumerate(children):
        on_step("benchmark", done / total)
        for _ in range(WARM_UP):
            child.samples = [child.run(ask)]
    timed = [child for child in children if child.plan.timed]
    for child in timed:
        child.samples = []
    for done in range(rounds):
        on_step("benchmark", (len(children) + done) / total)
        for child in timed:
            child.run(ask)
            child.samples += [child.run(ask) for _ in range(runs)]
    on_step("benchmark", 1.0)


def check_agreement(children: Sequence[Child]) -> None:
    """Refuse to report times of variants that do not predict the same token: in floats, and over the packed model."""
    for packed in (False, True):
        predicted = {
            child.plan.name: child.samples[-1].next_token
            for child in children
            if child.plan.packed == packed and not child.plan.floor
        }
        if len(set(predicted.values())) > 1:
            raise InternalError(f"the variants do not agree on the next token: {predicted}.")


@dataclass(frozen=True, slots=True)
class Peers:
    """The workers by link, the dealers and their public keys."""

    links: dict[str, str]
    dealers: tuple[str, ...] = ()
    dealer_keys: tuple[str, ...] = ()


@contextmanager
def peers(
    models: tuple[Path, Path], config: EnclaveConfig, threads: int, device: str = "cpu", *, dealer: bool = False
) -> Iterator[Peers]:
    """Run a float worker over shm, ipc and tcp, one of int8 codes, and with ``dealer`` one unless there are some.

    Args:
        models: in floats, and packed.
        config: the dtype of floats, and the dealers that there are.
        threads: of each.
        device: of each.
        dealer: whether one is needed.
    """
    directory, packed = models
    shared = ["--threads", str(threads), "--device", device]
    floats = ["--model", str(directory), "--dtype", config.dtype, *shared]
    codes = ["--model", str(packed), *shared]
    environment = without_waiting()
    with ExitStack() as stack:
        private = stack.enter_context(private_socket_directory())
        tcp, ipc = f"tcp://127.0.0.1:{free_port()}", f"ipc://{private}/worker"
        shm = stack.enter_context(local_worker([*floats, "--listen", tcp, "--listen", ipc], environment=environment))
        exact = stack.enter_context(local_worker(codes, environment=environment))
        dealers, dealer_keys = config.dealers, config.dealer_keys
        if dealer and not dealers:
            public, secret = keys.create(private, "dealer")
            own = local_worker([*codes, "--key", str(secret)], "ipc", environment=environment, command="dealer")
            dealers, dealer_keys = (stack.enter_context(own),), (str(public),)
        yield Peers({"shm": shm, "ipc": ipc, "tcp": tcp, "exact": exact}, dealers, dealer_keys)


def free_port() -> int:
    """Return a tcp port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
