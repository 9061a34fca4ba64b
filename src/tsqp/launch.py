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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO

from tsqp import errors
from tsqp.errors import SetupError, TransportError, TsqpError
from tsqp.paths import private_socket_directory

DEFAULT_SCHEME = "shm" if sys.platform == "linux" else "ipc"
_STOP_TIMEOUT_S = 10.0
_SHOWN_LINES = 5
_LOOK_S = 0.25
# The end of a link is heard before the end of the process.
_DYING_S = 1.0


@dataclass(frozen=True, slots=True)
class OwnWorker:
    """A worker for this process alone.

    Attributes:
        url: where it listens.
        revive: starts it again if it has ended, given a function that tells whether to give up while it loads. It
            raises the worker's own ``TsqpError`` if it does not come up, and ``TransportError`` if it is given up.
    """

    url: str
    revive: Callable[[Callable[[], bool]], None]


@contextmanager
def own_worker(
    arguments: Sequence[str],
    scheme: str = DEFAULT_SCHEME,
    environment: Mapping[str, str] | None = None,
    command: str = "worker",
) -> Iterator[OwnWorker]:
    """Run ``tsqp worker`` or ``tsqp dealer`` for this process alone, for the time of a ``with`` block.

    Args and errors are those of ``local_worker``.
    """
    with private_socket_directory() as directory, ExitStack() as running:
        url = f"{scheme}://{directory}/{command}"
        words = [sys.executable, "-m", "tsqp", command, "--listen", url, "--json", "--exit-with-parent", *arguments]
        process = running.enter_context(worker_process(words, environment))

        def revive(is_over: Callable[[], bool]) -> None:
            nonlocal process
            try:
                process.wait(_DYING_S)
            except subprocess.TimeoutExpired:
                return
            running.close()
            process = running.enter_context(worker_process(words, environment, is_over))

        yield OwnWorker(url, revive)


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
    with own_worker(arguments, scheme, environment, command) as worker:
        yield worker.url


@contextmanager
def worker_process(
    words: Sequence[str],
    environment: Mapping[str, str] | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[subprocess.Popen[str]]:
    """Run a worker's command line for the time of a ``with`` block, which begins when the worker is ready.

    Args:
        words: the command. It prints one line of JSON, that it is ready or an ``ErrorReport``, and ends when its
            standard input closes or by SIGTERM.
        environment: instead of this process's own.
        is_over: tells, while it loads, whether to give up.

    Raises:
        TsqpError: the worker's own, if it does not come up.
        SetupError: this system starts no processes, as within an enclave.
        TransportError: it was given up.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = None
        try:
            with _uninterrupted():
                process = _started(words, log, environment)
            _await_ready(process, log, is_over)
            yield process
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


def _started(words: Sequence[str], log: IO[str], environment: Mapping[str, str] | None) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise SetupError(
            f"no worker can be started here ({error.strerror}): give the address of one that runs, --worker "
            "(LLAMA_GPU_ENDPOINT)."
        ) from error


def _await_ready(process: subprocess.Popen[str], log: IO[str], is_over: Callable[[], bool]) -> None:
    """Wait for the worker's first line, which says that it is ready or why it is not."""
    while process.stdout and not select.select([process.stdout], [], [], _LOOK_S)[0]:
        if is_over():
            raise TransportError("the local worker was not waited for, as nobody needs it any more.")
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
    process.send_signal(signal.SIGCONT)  # one that is stopped hears nothing else
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
