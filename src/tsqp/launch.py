"""Starts a worker as a separate process on this machine, for the time of one command.

A new interpreter, never a fork: a forked child hangs in its first parallel region once the parent has run one. It has a
session of its own, so that Ctrl-C reaches this process alone, which may have answers to finish before its worker goes.
The worker watches its standard input and ends when this process does, however that happens.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

from tsqp import errors
from tsqp.errors import SetupError, TsqpError
from tsqp.paths import private_socket_directory

DEFAULT_SCHEME = "shm" if sys.platform == "linux" else "ipc"
_STOP_TIMEOUT_S = 10.0
_SHOWN_LINES = 5


@contextmanager
def local_worker(
    arguments: Sequence[str],
    scheme: str = DEFAULT_SCHEME,
    environment: Mapping[str, str] | None = None,
    command: str = "worker",
) -> Iterator[str]:
    """Run ``tsqp worker`` or ``tsqp dealer`` for this process alone; yield its URL.

    Args:
        arguments: further options of the command.
        scheme: ``shm`` or ``ipc``; the socket lies in a private directory.
        environment: instead of this process's own.
        command: ``worker`` or ``dealer``.

    Raises:
        TsqpError: the worker's own, if it does not come up.
    """
    with private_socket_directory() as directory:
        url = f"{scheme}://{directory}/{command}"
        words = [sys.executable, "-m", "tsqp", command, "--listen", url, "--json", "--exit-with-parent", *arguments]
        with worker_process(words, environment):
            yield url


@contextmanager
def worker_process(words: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Run a worker's command line for the time of a ``with`` block, which begins when the worker is ready.

    Args:
        words: the command. It prints one line of JSON, that it is ready or an ``ErrorReport``, and ends when its
            standard input closes or by SIGTERM.
        environment: instead of this process's own.

    Raises:
        TsqpError: the worker's own, if it does not come up.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = None
        try:
            with _uninterrupted():
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                    start_new_session=True,
                )
            _await_ready(process, log)
            yield
        finally:
            if process is not None:
                _stop(process)


@contextmanager
def ending_with_parent(hangup_fd: int) -> Iterator[None]:
    """End this process at once if its parent does during a ``with`` block: loading may take long, and nobody waits.

    Args:
        hangup_fd: a pipe from the parent, which closes when the parent ends.
    """
    ours, theirs = os.pipe()

    def watch() -> None:
        if ours not in select.select([hangup_fd, ours], [], [])[0]:
            os._exit(1)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        os.close(theirs)
        watching.join()
        os.close(ours)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off until the end of a ``with`` block: in the middle of starting a process it would lose it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    missed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: missed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if missed:
            signal.raise_signal(signal.SIGINT)


def _await_ready(process: subprocess.Popen[str], log: IO[str]) -> None:
    """Wait for the worker's first line, which says that it is ready or why it is not."""
    line = process.stdout.readline() if process.stdout else ""
    try:
        status = json.loads(line)
    except ValueError:
        process.wait()
        log.seek(0)
        tail = "".join(log.readlines()[-_SHOWN_LINES:]).strip()
        raise SetupError(
            f"the local worker ended with exit code {process.returncode} before it was ready: {tail}"
        ) from None
    if problem := status.get("error"):
        kind = getattr(errors, str(problem.get("type")), SetupError)
        raise (kind if issubclass(kind, TsqpError) else SetupError)(
            f"the local worker did not start: {problem.get('message')}"
        )


def _stop(process: subprocess.Popen[str]) -> None:
    """End the worker, if need be, or if Ctrl-C comes while it takes its time, by force."""
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()  # nothing, where it has ended
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
