"""The system that is soaked: two servers, each before workers of its own, under load; all real processes."""

from __future__ import annotations

import http.client
import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from faults.commands import Command
from faults.load import Asked, Load, ask
from faults.masked_words import MaskedWords
from faults.proxy import Proxy
from real_serving import speaking_checkpoint
from workers import free_port, packed_tiny

from tsqp.transport.named import GRANT, OpenedRegion
from tsqp.transport.urls import parse

MODEL = "tiny"
REQUEST_TIMEOUT_S = 2.0
CONNECT_TIMEOUT_S = 1.5
MESSAGE_BYTES = 4 << 20
REGION_PREFIX = f"tsqp-soak-{os.getpid()}-"
_CONTEXT = 512
_LOOK_S = 0.1
_PATIENCE_S = 90.0
_QUIET_S = 1.0
# Answers whose likeliest tokens are ahead by less could be others in a larger batch, where float products are summed.
_CLEAR = 0.02
_LETTERS = "abcdefghijklmnopqrstuvwxyz ,."


class Site:
    """Directories, models and settings that all processes share.

    Args:
        directory: a private one with a short name, since sockets lie there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        runtime = directory / "run"
        runtime.mkdir(mode=0o700)
        self.environment = {
            **os.environ,
            "TSQP_CACHE": str(directory / "cache"),
            "XDG_RUNTIME_DIR": str(runtime),
            "TSQP_REQUEST_TIMEOUT_S": f"{REQUEST_TIMEOUT_S:g}",
            "TSQP_CONNECT_TIMEOUT_S": f"{CONNECT_TIMEOUT_S:g}",
            "TSQP_MAX_MESSAGE_BYTES": str(MESSAGE_BYTES),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
        }
        sizes = {"max_position_embeddings": _CONTEXT, "num_hidden_layers": 2}
        self.floats = speaking_checkpoint(directory / "tiny", **sizes)
        self.other = speaking_checkpoint(directory / "other", seed=1, **sizes)
        self.packed = packed_tiny(self.floats, directory / "packed")
        self.words = MaskedWords()

    def command(self, name: str, words: list[str], ready: str) -> Command:
        """Make a command, which does not run yet."""
        log = self.directory / f"{name.replace(' ', '-')}.log"
        return Command(name, words, ready.encode(), log, self.environment)

    def worker(self, name: str, model: Path, addresses: list[str]) -> Command:
        """Make a worker's command."""
        listen = [word for address in addresses for word in ("--listen", address)]
        words = ["-m", "faults.failing_worker", "worker", "--model", str(model), "--device", "cpu", "--threads", "1"]
        return self.command(name, [*words, "--json", *listen], '"endpoints"')


@dataclass
class WorkerAt:
    """A worker, and the ways to it.

    Attributes:
        command: its process.
        addresses: where it listens.
        proxy: before the first of these, if there is one.
        sockets_alone: how many sockets it has without clients.
    """

    command: Command
    addresses: list[str]
    proxy: Proxy | None = None
    sockets_alone: int = 0

    def held(self) -> tuple[int, int, int]:
        """Return what it holds for clients: sockets, regions, seats."""
        return self.command.sockets() - self.sockets_alone, self.command.regions(), self.seats()

    def seats(self) -> int:
        """Return how many seats of its named region are taken; 0 where it has none."""
        named = next((parse(each) for each in self.addresses if "/dev/shm/" in each), None)  # noqa: S108
        if named is None:
            return 0
        region = OpenedRegion(named, MESSAGE_BYTES)
        try:
            return sum(bool(region.front(number)[GRANT]) for number in range(region.shape.seats))
        finally:
            region.close()


class Lane:
    """A server, its workers and its clients.

    Args:
        site: what all lanes share.
        level: of protection.
        name: of this lane alone.
        workers: which it is given.
        seed: of all that is chosen here.

    Attributes:
        signs: when and how it showed that something is wrong: errors, not being ready, notices.
    """

    def __init__(self, site: Site, level: str, name: str, workers: list[WorkerAt], seed: int) -> None:
        self.site, self.level, self.name, self.workers = site, level, name, workers
        self.chance = random.Random(f"{seed} {name}")
        self.port = free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.model = site.floats if level == "open" else site.packed
        self.server = site.command(f"serve {name}", [], f"listening on http://{self.host}")
        self.signs: list[tuple[float, str]] = []
        self._down_until = -1.0
        self._watching = threading.Event()
        self._over = threading.Event()
        self._read = 0
        self._thread = threading.Thread(target=self._watch, name=f"watch {name}")
        self.load: Load | None = None

    @property
    def address(self) -> str:
        """One worker's address, as enclaves are given it."""
        return self._address(self.chance.choice(self.workers))

    def _address(self, worker: WorkerAt) -> str:
        return f"127.0.0.1:{worker.proxy.port}" if worker.proxy else self.chance.choice(worker.addresses)

    @property
    def commands(self) -> list[Command]:
        """All of its processes, the server first."""
        return [self.server, *(worker.command for worker in self.workers)]

    def await_workers(self) -> None:
        """Wait until all workers are ready, and take note of what they hold without clients."""
        for worker in self.workers:
            worker.command.await_ready()
            worker.sockets_alone = worker.command.sockets()

    def serve(self) -> None:
        """Start the server, over one of the ways to each worker."""
        given = [word for worker in self.workers for word in ("--worker", self._address(worker))]
        words = ["-m", "tsqp", "serve", "--model", str(self.model), "--level", self.level, "--served-model", MODEL]
        sizes = ["--kv-memory", str(8 << 20), "--threads", "1"]
        if self.level == "masked":
            sizes += ["--mask-pool", "64"]
        self.server.start([*words, *given, *sizes, "--port", str(self.port)])

    def go(self, clients: int, seed: int) -> None:
        """Learn the right answers, undisturbed, and let clients ask from now on."""
        answers = self._answers()
        self.load = Load(self.host, MODEL, answers, clients, seed, self)
        self.up()
        self._thread.start()
        self.load.go()

    def _answers(self) -> dict[Asked, str]:
        found: dict[Asked, str] = {}
        while len(found) < 12:
            letters = "".join(self.chance.choices(_LETTERS, k=self.chance.choice((3, 20, 60))))
            asked = Asked(letters, self.chance.choice((4, 12, 30)))
            answer = ask(self.host, asked.body(MODEL, logprobs=2))
            assert not answer.error, answer
            if self.level != "open" or min(answer.gaps) > _CLEAR:
                found[asked] = answer.text
        return found

    def may_be_cut(self, since: float) -> bool:
        """Tell whether the server was down, because of a fault, at some time after."""
        return since <= self._down_until

    def down(self) -> None:
        """Take note that the server is taken down now."""
        self._watching.clear()
        self._down_until = float("inf")

    def up(self) -> None:
        """Take note that it is there."""
        self._down_until = time.monotonic()
        self._read = self.server.log.stat().st_size
        self._watching.set()

    def sign_after(self, when: float, word: str = "") -> float | None:
        """Return when something showed first after a time, in seconds after it; with a word in it, if one is given."""
        return next((at - when for at, what in self.signs if at >= when and word in what), None)

    def used(self) -> WorkerAt:
        """Return the worker that is in use."""
        return max(self.workers, key=lambda worker: worker.proxy.used if worker.proxy else 0.0)

    def has_answered(self, before: float) -> bool:
        """Tell whether all that was asked before a time has an answer or an error."""
        assert self.load is not None
        return self.load.has_answered(before)

    def is_right(self) -> bool:
        """Ask for something, and tell whether the answer is right."""
        assert self.load is not None
        asked, right = self.chance.choice(list(self.load.answers.items()))
        return ask(self.host, asked.body(MODEL)).outcome(right) == "right"

    def close(self) -> None:
        """End clients and watching. May be called twice."""
        self._over.set()
        self._watching.set()
        if self.load:
            self.load.close()
            self._thread.join()

    def kill(self) -> None:
        """End what still runs."""
        for command in self.commands:
            if command.lives:
                command.kill()
        for worker in self.workers:
            if worker.proxy:
                worker.proxy.close()

    def erred(self, code: str) -> None:
        """Take note of an error that a client was told now."""
        self.signs.append((time.monotonic(), code))

    @property
    def is_quiet(self) -> bool:
        """Whether nothing has shown for a while."""
        return not self.signs or self.signs[-1][0] < time.monotonic() - _QUIET_S

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_S):
            self._watching.wait()
            said = self.server.said(self._read)
            if b"orker " in said:
                self.signs.append((time.monotonic(), said.decode(errors="replace")))
            self._read += len(said)
            if reason := self._not_ready():
                self.signs.append((time.monotonic(), reason))

    def _not_ready(self) -> str:
        connection = http.client.HTTPConnection(self.host, timeout=_PATIENCE_S)
        try:
            connection.request("GET", "/readyz")
            answer = connection.getresponse()
            content = answer.read().decode()
        except (OSError, http.client.HTTPException):
            return "" if self._down_until == float("inf") else "no connection"
        finally:
            connection.close()
        return content if answer.status != http.client.OK else ""


def masked_lane(site: Site, name: str, seed: int) -> Lane:
    """A server at `masked` before two workers, each behind a link that can fail and that sees all masked words."""
    workers = []
    for which in ("a", "b"):
        address = f"127.0.0.1:{(port := free_port())}"
        proxy = Proxy(port, site.words, random.Random(f"{seed} {name} {which}"))
        workers.append(WorkerAt(site.worker(f"worker {name} {which}", site.packed, [address]), [address], proxy))
    return Lane(site, "masked", name, workers, seed)


def open_lane(site: Site, name: str, seed: int) -> Lane:
    """A server at `open` before one worker, which listens everywhere: tcp, ipc, shared memory of both kinds."""
    run = site.directory / "run"
    named = f"shm:///dev/shm/{REGION_PREFIX}{free_port()}"
    addresses = [f"127.0.0.1:{free_port()}", f"ipc://{run}/c", f"shm://{run}/c.shm", named]
    return Lane(site, "open", name, [WorkerAt(site.worker(f"worker {name}", site.floats, addresses), addresses)], seed)


LANES = {"masked": masked_lane, "open": open_lane}
