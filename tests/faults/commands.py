"""``tsqp`` commands as processes that may be killed, stopped and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_START_S = 120.0
_END_S = 60.0
_LOOK_S = 0.02
_SHOWN = 2000


class StartError(Exception):
    """A command did not come up."""


class Command:
    """One command, and the process that runs it now, if one does.

    Args:
        name: for people.
        words: the command line after the interpreter.
        ready: what it prints once it is.
        log: where its output goes, that of all its processes.
        environment: its own.
    """

    def __init__(
        self, name: str, words: Sequence[str], ready: bytes, log: Path, environment: Mapping[str, str]
    ) -> None:
        self.name, self.words, self.log = name, list(words), log
        self._ready, self._environment = ready, environment
        self._began = 0
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def lives(self) -> bool:
        """Whether a process runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """The id of the process that runs."""
        assert self.process is not None
        return self.process.pid

    def start(self, words: Sequence[str] | None = None) -> None:
        """Start a process, with other words perhaps; do not wait until it is ready."""
        assert not self.lives
        with self.log.open("ab") as log:
            self._began = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, *(words or self.words)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self._environment),
                start_new_session=True,
            )

    def await_ready(self) -> None:
        """Wait until it says that it is ready.

        Raises:
            StartError: it ended instead, or takes too long.
        """
        deadline = time.monotonic() + _START_S
        while self._ready not in (said := self.said(self._began)):
            if not self.lives or time.monotonic() > deadline:
                raise StartError(f"{self.name} did not start: {said.decode(errors='replace')[-_SHOWN:]}")
            time.sleep(_LOOK_S)

    def said(self, since: int = 0) -> bytes:
        """Return its output from a byte on."""
        with self.log.open("rb") as log:
            log.seek(since)
            return log.read()

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process without a word, and wait until it has."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def ask_to_end(self) -> None:
        """Ask the process to end."""
        self.signal(signal.SIGTERM)

    def await_end(self) -> int:
        """Wait until it has; return its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(_END_S)
        finally:
            self.process.kill()

    def files(self) -> int:
        """Return how many descriptors it has open."""
        return int(psutil.Process(self.pid).num_fds())

    def sockets(self) -> int:
        """Return how many of them are sockets."""
        found = 0
        for each in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                found += each.readlink().name.startswith("socket:")
        return found

    def regions(self) -> int:
        """Return how many regions of clients it has mapped."""
        return Path(f"/proc/{self.pid}/maps").read_bytes().count(b"/memfd:tsqp")

    def memory_bytes(self) -> int:
        """Return its resident memory."""
        return int(psutil.Process(self.pid).memory_info().rss)
