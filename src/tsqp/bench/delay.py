"""A link with an injected delay, to measure what overlap hides: a relay between enclave and worker over shared memory.

Only the datagrams beside the region pass through it, each held back for a while in either direction; tensors stay where
they are. So it adds latency and neither copies nor limits bandwidth.

``python -m tsqp.bench.delay LISTEN WORKER MILLISECONDS`` serves one enclave at a time; paths of UNIX sockets.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from tsqp.errors import InternalError
from tsqp.paths import private_socket_directory
from tsqp.transport.sockets import owner_only
from tsqp.transport.urls import parse

# Longer than those of any request and reply here. Twice as much would be mapped and unmapped for each one.
_MAX_DATAGRAM = 1 << 16
_TIMER_SLACK = Path("/proc/self/timerslack_ns")
_MAX_DESCRIPTORS = 4
_START_S = 20.0
_POLL_S = 0.02


class _Direction:
    """Datagrams on their way from one socket to the other, with the time at which each is due."""

    def __init__(self, source: socket.socket, target: socket.socket, delay_s: float) -> None:
        self.source = source
        self._target = target
        self._delay_s = delay_s
        self._held: deque[tuple[float, bytes, list[int]]] = deque()

    @property
    def due(self) -> float:
        """When the next one is due; infinity if there is none."""
        return self._held[0][0] if self._held else float("inf")

    def take(self) -> bool:
        """Take one datagram that is here, and descriptors that come with it; False where the sender is gone."""
        data, descriptors, flags, _ = socket.recv_fds(self.source, _MAX_DATAGRAM, _MAX_DESCRIPTORS)
        if flags & socket.MSG_TRUNC:
            raise InternalError(f"a datagram of more than {_MAX_DATAGRAM} bytes does not pass the delayed link.")
        self._held.append((time.perf_counter() + self._delay_s, data, list(descriptors)))
        return bool(data)

    def pass_on(self) -> None:
        """Send what is due."""
        while self._held and self.due <= time.perf_counter():
            _, data, descriptors = self._held.popleft()
            socket.send_fds(self._target, [data], descriptors)
            for descriptor in descriptors:
                socket.close(descriptor)


def relay(listen: str, worker: str, delay_s: float) -> None:
    """Serve enclaves one after the other, for ever.

    Args:
        listen: path of the socket for the enclave.
        worker: path of the worker's socket.
        delay_s: each way.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        with owner_only():
            listener.bind(listen)
        listener.listen()
        while True:
            enclave, _ = listener.accept()
            with enclave, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as onward:
                onward.connect(worker)
                with contextlib.suppress(OSError):
                    _between(enclave, onward, delay_s)


def _between(enclave: socket.socket, worker: socket.socket, delay_s: float) -> None:
    """Relay until one side is gone."""
    ways = {enclave: _Direction(enclave, worker, delay_s), worker: _Direction(worker, enclave, delay_s)}
    while True:
        left = min(way.due for way in ways.values()) - time.perf_counter()
        ready, _, _ = select.select(list(ways), [], [], None if left == float("inf") else max(0.0, left))
        if not all(ways[source].take() for source in ready):
            return
        for way in ways.values():
            way.pass_on()


@contextlib.contextmanager
def delayed(worker: str, delay_s: float) -> Iterator[str]:
    """Run a relay for the time of a ``with`` block; yield its URL.

    Args:
        worker: the worker's URL, ``shm://`` with a socket.
        delay_s: each way.
    """
    with private_socket_directory() as directory:
        path = Path(directory) / "delayed"
        words = [sys.executable, "-m", "tsqp.bench.delay", str(path), parse(worker).path, str(delay_s * 1e3)]
        with subprocess.Popen(words) as process:
            try:
                for _ in range(int(_START_S / _POLL_S)):
                    if path.exists():
                        break
                    time.sleep(_POLL_S)
                yield f"shm://{path}"
            finally:
                process.kill()


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        _TIMER_SLACK.write_text("1")  # else the system adds up to 0.05 ms to each delay
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # a link does not wait for a core
    relay(sys.argv[1], sys.argv[2], float(sys.argv[3]) / 1e3)
