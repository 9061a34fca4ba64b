"""Places where workers of an engine run, are lost, hang and lie: real processes, and peers in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
from attacks.lies import LIES
from attacks.test_over_sockets import HostileServer
from engine_answers import Answer
from fake_engine import byte_tokenizer
from hostile import HostilePeer, Material, claiming, on
from workers import free_port

from tsqp.arith import native
from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine.api import Finished, Generation, Sampling
from tsqp.engine.loop import GenerationEngine
from tsqp.engine.opening import open_engine
from tsqp.errors import TsqpError
from tsqp.launch import local_worker
from tsqp.levels import Model
from tsqp.model.architecture import read_config
from tsqp.paths import private_socket_directory

PROMPT = tuple(range(2, 32))
LONG_PROMPT = tuple(range(2, 100)) * 2
TOKENS = 12
LIE = on("layers.1.down", claiming(LIES["a word off by 1"]))
_PATIENCE_S = 120


def until(holds: Callable[[], bool]) -> None:
    for _ in range(_PATIENCE_S * 20):
        if holds():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it did not come to be in time")


@dataclass
class Running:
    """An engine, and what it told its user."""

    engine: GenerationEngine
    notices: list[str]

    def ask(self, prompt: tuple[int, ...] = PROMPT, tokens: int = TOKENS) -> Answer:
        answer = Answer()
        answer.number = self.engine.submit(
            Generation(
                prompt_ids=prompt,
                max_tokens=tokens,
                sampling=Sampling(temperature=0),
                ignore_end=True,
                owner="ada",
            ),
            answer.take,
        )
        return answer

    def fails(self) -> TsqpError:
        """Ask, and return the error: of the step, or of the engine that has noticed before."""
        try:
            return self.ask().error
        except TsqpError as error:
            return error

    def until_ready(self) -> None:
        until(lambda: self.engine.stats().ready)

    def until_in_use(self, workers: int) -> None:
        """Wait until so many workers are in use."""
        until(lambda: self.engine.stats().workers_usable == workers)

    def until_nobody_is_left(self, *words: str) -> str:
        """Wait for a reason that has these words, and return it."""
        until(lambda: all(word in self.engine.stats().reason for word in ("no usable worker", *words)))
        assert not self.engine.stats().ready
        return self.engine.stats().reason


class Site:
    """A model and places for its workers: processes that can be ended and started again, and peers that lie."""

    def __init__(self, material: Material, floats: Path, stack: ExitStack) -> None:
        self.material, self.floats = material, floats
        self._stack = stack
        self._directory = stack.enter_context(private_socket_directory())
        self._processes: dict[str, psutil.Process] = {}

    def start(self, level: str, address: str | None = None) -> str:
        """Start a worker process; return its address."""
        address = address or f"127.0.0.1:{free_port()}"
        directory = self.floats if level == "open" else self.material.directory
        words = ["--model", str(directory), "--device", "cpu", "--threads", "1", "--listen", address]
        before = set(psutil.Process().children())
        self._stack.enter_context(local_worker(words))
        (self._processes[address],) = set(psutil.Process().children()) - before
        return address

    def stop(self, address: str) -> None:
        self._processes[address].suspend()

    def resume(self, address: str) -> None:
        self._processes[address].resume()

    def kill(self, address: str) -> None:
        self._processes[address].kill()
        self._processes[address].wait()

    def terminate(self, address: str) -> None:
        """Let it answer what it has taken in, and end."""
        self._processes[address].terminate()

    def host(self, name: str = "liar") -> HostilePeer:
        """Serve a worker in this process, honest until told otherwise."""
        peer = HostilePeer(f"ipc://{self._directory}/{name}", self.material.dispatcher())
        self._stack.callback(HostileServer(peer, peer.address).close)
        return peer

    def run(self, level: str, *addresses: str, max_running: int = 64, **settings: object) -> Running:
        """Run an engine, which divides each step over all workers that it can."""
        given = {"connect_timeout_s": 1.0, "request_timeout_s": 30.0, **settings}
        notices: list[str] = []
        engine = open_engine(
            self.model(level),
            EnclaveConfig(level=level, **given),  # type: ignore[arg-type]
            EngineConfig(
                workers=addresses, worker_rows=1, kv_memory=1 << 20, reuse_prefixes="on", max_running=max_running
            ),
            on_notice=lambda sentence: None if sentence == native.notice() else notices.append(sentence),
        )
        return Running(self._stack.enter_context(engine), notices)

    def model(self, level: str) -> Model:
        if level == "open":
            return Model(self.floats, read_config(self.floats), byte_tokenizer(), None)
        packed = self.material.packed
        return Model(self.material.directory, packed.config, byte_tokenizer(), packed)


def local_ids(site: Site, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    """What every packed level must generate."""
    run = site.run("local")
    answer = run.ask(prompt)
    assert isinstance(answer.end, Finished)
    return answer.ids


def secrets_of(engine: GenerationEngine) -> tuple[set[bytes], bytes]:
    """The secret vectors of all checks, and the key of the enclave's masks."""
    products = engine.stepper.llama.ops._products  # type: ignore[attr-defined]
    vectors = {bytes(check._s._values_N.numpy()) for check in products._checkers.values()}
    return vectors, products._pool._source._key.seed()
