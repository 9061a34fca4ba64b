"""Whether the process at the other end of a region lives, where no socket tells.

Each side writes its process id, when that process started, its process-id namespace and a heartbeat. Processes of one
namespace look each other up: a crash is noticed within ``CRASH_NOTICED_S``, and a peer that is merely slow is never
taken for dead. Across namespaces, as between a container or a Gramine enclave and its host, a peer whose heartbeat
stood still for ``SILENCE_S`` counts as dead.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CRASH_NOTICED_S = 2.0
SILENCE_S = 10.0
_BEAT_S = 0.25
_WORD = (1 << 64) - 1
_LOOK_S = CRASH_NOTICED_S / 4
# Places after the parentheses of /proc/PID/stat: the state, and the start in ticks since boot (proc_pid_stat(5)).
_STATE, _START = 0, 19


@dataclass(frozen=True, slots=True)
class Identity:
    """A process: its id, when it started, and the namespace of the id; 0 where that is not known."""

    pid: int
    start: int
    namespace: int

    @property
    def is_visible(self) -> bool:
        """Whether this process can look it up: both have their ids from one namespace."""
        own = own_identity().namespace
        return own != 0 and own == self.namespace

    @property
    def is_alive(self) -> bool:
        """Whether the process exists, and is not another with the same id. Only for one that is visible."""
        return self.start != 0 and _started(self.pid) == self.start


def own_identity() -> Identity:
    """Return this process's identity."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return Identity(os.getpid(), _started(os.getpid()), namespace)


def _started(pid: int) -> int:
    """Return when a process started; 0 where there is none, or only its exit status."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123  read often
            fields = file.read().rpartition(b")")[2].split()
        return 0 if fields[_STATE] in (b"Z", b"X") else int(fields[_START])
    except (OSError, IndexError, ValueError):
        return 0


class Watch:
    """Tells whether a peer lives, looking seldom.

    Args:
        peer: who it says it is.
        heartbeat: reads its heartbeat.
    """

    def __init__(self, peer: Identity, heartbeat: Callable[[], int]) -> None:
        self._peer = peer
        self._visible = peer.is_visible
        self._heartbeat = heartbeat
        self._last_beat = heartbeat()
        self._seen = self._looked = time.monotonic()
        self._dead = False

    @property
    def is_dead(self) -> bool:
        """Whether the peer is gone, as far as was looked lately. It does not come back."""
        now = time.monotonic()
        if self._dead or now - self._looked < _LOOK_S:
            return self._dead
        if now - self._looked > SILENCE_S:
            self._seen = now  # nobody looked: its silence was not heard
        self._looked = now
        if self._visible:
            self._dead = not self._peer.is_alive
            return self._dead
        beat = self._heartbeat()
        if beat != self._last_beat:
            self._last_beat, self._seen = beat, now
        self._dead = now - self._seen > SILENCE_S
        return self._dead


class Pulse:
    """Calls a function several times within ``CRASH_NOTICED_S``, from a thread of its own, until it is stopped.

    Args:
        beat: given a number that grows from call to call, as a 64-bit word. It is counted here: a word that a peer can
            write to is stored, never counted on.
    """

    def __init__(self, beat: Callable[[int], None]) -> None:
        self._beat = beat
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tsqp-heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stopping.wait(_BEAT_S):
            number = (number + 1) & _WORD
            self._beat(number)

    def stop(self) -> None:
        """End the thread. May be called twice."""
        self._stopping.set()
        self._thread.join()
