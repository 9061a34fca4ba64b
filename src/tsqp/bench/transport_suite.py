"""``tsqp bench transport``: round trips of messages, from 4 KB to what a layer moves, over every transport in turns.

A round trip of a size moves as much each way, so that the throughput of one transport by another's is their times'
ratio, inverted.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tsqp.bench.children import OnStep, free_port
from tsqp.bench.echo import EchoClient, Way, echo_client, serving
from tsqp.bench.formats import FORMATS, Echo, Format
from tsqp.bench.summary import heading, ratio, spread
from tsqp.errors import InternalError, SetupError, TsqpError
from tsqp.launch import DEFAULT_SCHEME
from tsqp.measurements import Ratio, TransportPoint, TransportReport, TransportRow
from tsqp.paths import private_socket_directory
from tsqp.transport.keys import create, read_public

# A small message, a megabyte, one layer's input at 128 tokens (3072 floats each), and what is far larger than a cache.
SIZES = (4096, 1 << 20, 128 * 3072 * 4, 8 << 20)
_WARM_UP = 2
# Each turn begins with one round trip that is not counted, so that sleeping processes are awake; before it, a server
# that still looks for its next message gives up and leaves the cores to the others.
_TRIPS_PER_TURN = 4
_PAUSE_S = 0.002
_START_S = 30.0
_POLL_S = 0.05
_FAST, _MEGABYTE, _LARGE = SIZES[0], SIZES[1], SIZES[-1]
_ENCRYPTED = "tcp, encrypted"
# Of the throughput in clear, at a megabyte.
_LEAST_ENCRYPTED = 0.25
_USED = "filled and summed"
_NAMES: dict[Way, str] = {"copied": "copied", "in place": "in place", "used": _USED}
_DETAILS: dict[Way, str] = {
    "copied": "copied in and out",
    "in place": "handed over where it lies; writing and using it are not timed",
    "used": "each side writes every word and adds up every word, where they lie",
}

# Seconds of one round trip of that many bytes.
Time = Callable[[int], float]


@dataclass(slots=True)
class _Subject:
    """A transport that is measured, or what is missing for it."""

    name: str
    settings: str
    time: Time | None
    missing: str = ""
    taken: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in SIZES})


def run(rounds: int, on_step: OnStep) -> TransportReport:
    """Measure every transport at every size.

    Args:
        rounds: turns of each, after some to warm up; four round trips of a turn count.
        on_step: told the fraction done.

    Raises:
        TsqpError: a server does not start, or answers wrongly.
    """
    with ExitStack() as stack:
        subjects = [*_ours(stack), *_others(stack)]
        running = [(subject, subject.time) for subject in subjects if subject.time is not None]
        turns = rounds + _WARM_UP
        for place, size in enumerate(SIZES):
            for turn in range(turns):
                on_step("benchmark", (place * turns + turn) / (len(SIZES) * turns))
                for subject, seconds in running:
                    time.sleep(_PAUSE_S)
                    seconds(size)
                    taken = [seconds(size) for _ in range(_TRIPS_PER_TURN)]
                    subject.taken[size] += taken if turn >= _WARM_UP else []
        on_step("benchmark", 1.0)
    rows = [_row(subject) for subject in subjects]
    return TransportReport(
        **heading(f"tsqp bench transport --rounds {rounds}"), rounds=rounds, rows=rows, ratios=ratios(rows)
    )


def _row(subject: _Subject) -> TransportRow:
    points = [
        TransportPoint(
            bytes=size, median_s=statistics.median(taken), p10_s=spread(taken, 0.1), p90_s=spread(taken, 0.9)
        )
        for size, taken in subject.taken.items()
        if taken
    ]
    return TransportRow(name=subject.name, settings=subject.settings, points=points, missing=subject.missing)


def ratios(rows: list[TransportRow]) -> list[Ratio]:
    """Compare every transport with ZeroMQ over tcp; where words are written and added up, both do that."""
    medians = {(row.name, point.bytes): point.median_s for row in rows for point in row.points}
    limits = {("shm, copied", _FAST): 0.3, (f"shm, {_USED}", _LARGE): 0.3}
    found = []
    for (name, size), median_s in medians.items():
        baseline = f"tcp, {_USED}" if name.endswith(_USED) else "tcp"
        if name != baseline:
            value, limit = median_s / medians[baseline, size], limits.get((name, size))
            found.append(ratio(f"{size_text(size)}: {name} / {baseline}", value, at_most=limit))
    if (_ENCRYPTED, _MEGABYTE) in medians:
        kept = medians["tcp", _MEGABYTE] / medians[_ENCRYPTED, _MEGABYTE]
        found.append(ratio(f"{size_text(_MEGABYTE)}: throughput, {_ENCRYPTED} / tcp", kept, at_least=_LEAST_ENCRYPTED))
    return found


def size_text(size: int) -> str:
    """Write a number of bytes for people."""
    return f"{size / (1 << 20):.3g} MB" if size >= 1 << 20 else f"{size / (1 << 10):.3g} KB"


def _ours(stack: ExitStack) -> Iterator[_Subject]:
    """Start an echo server per transport of protocol 3."""
    directory = stack.enter_context(private_socket_directory())
    urls = {"tcp": f"tcp://127.0.0.1:{free_port()}", "ipc": f"ipc://{directory}/ipc"}
    for name, url in urls.items():
        stack.enter_context(serving(url))
        client = stack.enter_context(echo_client(url))
        settings = "ZeroMQ, MessagePack header, raw frames"
        yield _Subject(name, settings, _timed(client, "copied"))
        if name == "tcp":
            yield _Subject(f"tcp, {_USED}", f"{settings}; {_DETAILS['used']}", _timed(client, "used"))
    yield _encrypted(directory, stack)
    if DEFAULT_SCHEME != "shm":
        return
    shared = {
        "shm": (f"shm://{directory}/shm", "shared memory arranged over a UNIX socket"),
        "named shm": (f"shm:///dev/shm/tsqp-bench-{os.getpid()}", "a region in /dev/shm, nothing but open and mmap"),
    }
    for name, (url, settings) in shared.items():
        try:
            stack.enter_context(serving(url))
            client = stack.enter_context(echo_client(url))
        except TsqpError as error:
            yield _Subject(name, settings, None, str(error))
            continue
        for way, details in _DETAILS.items():
            yield _Subject(f"{name}, {_NAMES[way]}", f"{settings}; {details}", _timed(client, way))


def _encrypted(directory: Path, stack: ExitStack) -> _Subject:
    """Start an echo server with a key."""
    public, secret = create(directory, "echo")
    url = f"tcp://127.0.0.1:{free_port()}"
    stack.enter_context(serving(url, secret))
    client = stack.enter_context(echo_client(url, read_public(public)))
    return _Subject(_ENCRYPTED, "the same with a key: CURVE", _timed(client, "copied"))


def _timed(client: EchoClient, way: Way) -> Time:
    return lambda size: client.seconds(size, way)


def _others(stack: ExitStack) -> Iterator[_Subject]:
    """Start a server per other format, where what it needs is installed."""
    for name, known in FORMATS.items():
        yield _other(name, known, stack)


def _other(name: str, known: Format, stack: ExitStack) -> _Subject:
    try:
        return _Subject(name, known.settings, stack.enter_context(_client(name, known)))
    except ImportError:
        return _Subject(name, known.settings, None, f"needs {known.needs}")


@contextlib.contextmanager
def _client(name: str, known: Format) -> Iterator[Time]:
    port = free_port()
    with ExitStack() as stack:
        echo = stack.enter_context(known.call(port))
        server = subprocess.Popen([sys.executable, "-m", "tsqp.bench.formats", name, str(port)])
        stack.callback(server.wait)
        stack.callback(server.kill)
        _wait_for(port, name)
        inputs = {size: torch.randn(size // 4) for size in SIZES}
        yield lambda size: _seconds(name, echo, inputs[size])


def _seconds(name: str, echo: Echo, x: torch.Tensor) -> float:
    started = time.perf_counter()
    y = echo(x)
    elapsed = time.perf_counter() - started
    if not torch.equal(x, y):
        raise InternalError(f"{name} did not return what it was sent.")
    return elapsed


def _wait_for(port: int, name: str) -> None:
    """Wait until a server listens."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(_POLL_S)
    raise SetupError(f"the {name} server did not come up within {_START_S:g} s.")
