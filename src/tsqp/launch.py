"""Starts a worker as a separate process on this machine, for the time of one command.

A new interpreter, never a fork: a forked child hangs in its first parallel region once the parent has run one. The
worker watches its standard input and ends when this process does, however that happens.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
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
    with private_socket_directory() as directory, tempfile.TemporaryFile("w+") as log:
        url = f"{scheme}://{directory}/{command}"
        words = [sys.executable, "-m", "tsqp", command, "--listen", url, "--json", "--exit-with-parent", *arguments]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        try:
            _await_ready(process, log)
            yield url
        finally:
            _stop(process)


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
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
