"""Starts the demonstration worker as a separate process, for the time of one demonstration."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tsqp.launch import DEFAULT_SCHEME, worker_process
from tsqp.paths import private_socket_directory


@dataclass(frozen=True, slots=True)
class DemoWorker:
    """Where a demonstration worker answers, and where it publishes what it sees."""

    url: str
    view: str


@contextmanager
def demo_worker(arguments: Sequence[str], scheme: str = DEFAULT_SCHEME) -> Iterator[DemoWorker]:
    """Run a demonstration worker for this process alone; it ends with it. Its sockets lie in a private directory.

    Args:
        arguments: further options of ``python -m tsqp.serve.demo_worker``.
        scheme: ``shm`` or ``ipc``.

    Raises:
        TsqpError: the worker's own, if it does not come up.
    """
    with private_socket_directory() as directory:
        found = DemoWorker(url=f"{scheme}://{directory}/worker", view=f"ipc://{directory}/view")
        words = [sys.executable, "-m", "tsqp.serve.demo_worker", "--listen", found.url, "--view", found.view]
        with worker_process([*words, *arguments]):
            yield found
