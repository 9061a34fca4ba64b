"""Faults of processes and links: what is done, how it is undone, and what must be seen within which time."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from typing import ClassVar

from faults.lanes import CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S, Lane, WorkerAt
from faults.proxy import Proxy

# The end of a connection is heard at once, that of a named region's peer within liveness.CRASH_NOTICED_S.
CLOSED_S = 2.0
# How often a lost worker is tried again (engine/loop.py), and how often an idle engine looks after its own.
RETRY_S = 1.0


class Fault(ABC):
    """One fault, injected once.

    Args:
        lane: whose.

    Attributes:
        kind: its name.
        may_be_hidden: whether nobody need be told, since what failed may be done again at once, elsewhere.
        counts_clients: whether what a worker holds must not change by somebody else meanwhile.
        since: from when on it must be noticed.
    """

    kind: ClassVar[str]
    may_be_hidden: ClassVar[bool] = True
    counts_clients: ClassVar[bool] = False
    since = 0.0

    def __init__(self, lane: Lane) -> None:
        self.lane, self.chance = lane, lane.chance

    @property
    def stated_s(self) -> float:
        """Within what time it must be noticed."""
        return CLOSED_S

    @abstractmethod
    def inject(self) -> None:
        """Let it happen."""

    def noticed_after(self) -> float | None:
        """Return how long after ``since`` clients, an operator or a probe could tell; None if they cannot yet."""
        return self.lane.sign_after(self.since)

    def _now_if(self, noticed: bool) -> float | None:  # noqa: FBT001
        return time.monotonic() - self.since if noticed else None

    @abstractmethod
    def undo(self) -> None:
        """Put right what the system cannot put right itself."""

    def problems(self) -> list[str]:
        """Say what else must have been seen, and was not."""
        return []


class _LinkLost(Fault):
    """What ends a link. A product that is checked is sent again first, over a new one if that can be made."""

    @property
    def stated_s(self) -> float:
        return CLOSED_S + (CONNECT_TIMEOUT_S if self.lane.level == "masked" else 0.0)


class _LinkHangs(_LinkLost):
    """What lets nothing come over a link that stays: it is given up after the request timeout."""

    @property
    def stated_s(self) -> float:
        return REQUEST_TIMEOUT_S + super().stated_s


class WorkerKilled(_LinkLost):
    """SIGKILL; the worker stays away for a while."""

    kind = "worker killed"

    def inject(self) -> None:
        self.worker = self.lane.used()
        self.worker.command.kill()

    def undo(self) -> None:
        self.worker.command.start()
        self.worker.command.await_ready()


class WorkerRestarted(WorkerKilled):
    """SIGKILL, and another process of the same command at once."""

    kind = "worker killed and restarted"

    def inject(self) -> None:
        super().inject()
        self.worker.command.start()

    def undo(self) -> None:
        self.worker.command.await_ready()


class WorkerHung(_LinkHangs):
    """SIGSTOP: its connections stay open, and nothing comes."""

    kind = "worker hung"

    def inject(self) -> None:
        self.worker = self.lane.used()
        self.worker.command.signal(signal.SIGSTOP)

    def undo(self) -> None:
        self.worker.command.signal(signal.SIGCONT)


class OtherModel(Fault):
    """The worker is restarted with another model: it is refused, by the model's digest, until the right one is back."""

    kind = "worker restarted with another model"
    may_be_hidden = False

    @property
    def stated_s(self) -> float:
        """It is tried again every second, once it is there."""
        return RETRY_S + CONNECT_TIMEOUT_S

    def inject(self) -> None:
        (worker,) = self.lane.workers
        self.command = worker.command
        words = [str(self.lane.site.other) if word == str(self.lane.model) else word for word in self.command.words]
        self.command.kill()
        self.command.start(words)
        self.command.await_ready()
        self.since = time.monotonic()

    def noticed_after(self) -> float | None:
        return self.lane.sign_after(self.since, "start both with the same model")

    def undo(self) -> None:
        self.command.kill()
        self.command.start()
        self.command.await_ready()


def _link(lane: Lane) -> Proxy:
    proxy = lane.used().proxy
    assert proxy is not None
    return proxy


class LinkCut(_LinkLost):
    """The connection ends, between messages or within one, and none can be made for a while."""

    kind = "link cut and restored"

    def inject(self) -> None:
        self.proxy = _link(self.lane)
        self.proxy.cut(torn=self.chance.random() < 0.5)

    def undo(self) -> None:
        self.proxy.restore()


class LinkSilent(_LinkHangs):
    """Nothing passes, and no connection ends; afterwards what was held back passes, or those connections are gone."""

    kind = "link silent and restored"

    def inject(self) -> None:
        self.proxy = _link(self.lane)
        self.proxy.silence()

    def undo(self) -> None:
        self.proxy.restore(drop=self.chance.random() < 0.5)


class LinkLies(Fault):
    """One bit of one product is turned. The worker is out of use then until the enclave is started again."""

    kind = "a bit of a product turned"
    may_be_hidden = False

    def inject(self) -> None:
        self.proxy = _link(self.lane)
        self.proxy.lie()

    def noticed_after(self) -> float | None:
        return self.lane.sign_after(self.since, "integrity_error")

    def undo(self) -> None:
        self.proxy.restore()
        restart(self.lane)

    def problems(self) -> list[str]:
        return [] if self.proxy.lied.is_set() else ["no product passed in which a bit could be turned"]


class EnclaveKilled(Fault):
    """SIGKILL of `tsqp serve`. Its workers must be rid of it, and serve the next one."""

    kind = "enclave killed and restarted"
    may_be_hidden = False
    counts_clients = True

    def inject(self) -> None:
        self.lane.down()
        self.lane.server.kill()

    def noticed_after(self) -> float | None:
        return self._now_if(all(freed(worker) for worker in self.lane.workers))

    def undo(self) -> None:
        self.lane.serve()
        self.lane.server.await_ready()
        self.lane.up()


def restart(lane: Lane) -> None:
    """Stop the server as one does, and start it again."""
    lane.down()
    lane.server.ask_to_end()
    code = lane.server.await_end()
    lane.serve()
    lane.server.await_ready()
    lane.up()
    assert code == 0, f"{lane.server.name} ended with exit code {code}"


def freed(worker: WorkerAt, clients: int = 0) -> bool:
    """Tell whether a worker has sockets, regions and seats for so many clients only."""
    return all(held <= clients for held in worker.held())


class DeviceFull(Fault):
    """The device has no memory for a product."""

    kind = "device out of memory"

    def inject(self) -> None:
        self.lane.used().command.signal(signal.SIGUSR1)

    def noticed_after(self) -> float | None:
        return self.lane.sign_after(self.since, "out_of_memory")

    def undo(self) -> None:
        """Nothing: it was one product."""


class HalfWritten(Fault):
    """A client of shared memory dies in the middle of writing a message, or what it writes is none."""

    kind = "half-written message in shared memory"
    may_be_hidden = False
    counts_clients = True

    def inject(self) -> None:
        (self.worker,) = self.lane.workers
        self.before = self.worker.held()
        address = self.chance.choice([each for each in self.worker.addresses if "shm:" in each])
        words = ["-m", "faults.scribbler", address, str(self.chance.randrange(1 << 30))]
        with subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, env=self.lane.site.environment
        ) as client:
            assert client.stdout is not None
            self.what = client.stdout.readline().decode().strip()
            client.kill()
            self.since = time.monotonic()

    def noticed_after(self) -> float | None:
        held = zip(self.worker.held(), self.before, strict=True)
        return self._now_if(all(now <= before for now, before in held))

    def undo(self) -> None:
        """Nothing: the client is dead."""

    def problems(self) -> list[str]:
        return [] if self.what else ["the client that writes halves did not come to it"]
