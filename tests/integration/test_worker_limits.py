"""A worker whose memory a peer fills: it ends by itself with an exit code of its own, and a new one serves."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
from raw_zmtp import MORE, RawPeer, frame
from tiny_models import random_ids
from workers import free_port, linked

from tsqp.model.architecture import read_config
from tsqp.model.llama import Llama
from tsqp.reports import WorkerReady
from tsqp.worker.limits import MEMORY_EXIT_CODE

PATIENCE_S = 60.0
PART = frame(bytes(1 << 20), MORE)
# What a worker of a tiny model takes is far less, and what the test machine has is far more.
LIMIT_BYTES = 1 << 30


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], WorkerReady]]:
    words = [sys.executable, "-m", "tsqp", "worker", "--device", "cpu", "--json", "--exit-with-parent"]
    with subprocess.Popen(
        [*words, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, msgspec.json.decode(process.stdout.readline(), type=WorkerReady)
        finally:
            process.kill()


def send_without_end(address: str) -> int:
    """Send frames of one message until the other side is gone; return how many bytes were sent."""
    sent = 0
    with RawPeer(address) as peer, contextlib.suppress(ConnectionError):
        peer.shake_hands()
        while sent < 4 * LIMIT_BYTES:
            peer.send(PART)
            sent += len(PART)
    return sent


def test_a_message_without_end_ends_the_worker_and_a_new_one_serves(tiny_llama: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    arguments = ("--model", tiny_llama, "--listen", address, "--memory-limit", LIMIT_BYTES)
    with started(*arguments) as (process, ready):
        assert ready.memory_limit == LIMIT_BYTES
        send_without_end(address)
        assert process.wait(PATIENCE_S) == MEMORY_EXIT_CODE
        assert process.stderr is not None
        (sentence,) = process.stderr.read().splitlines()
        assert f"its limit is {LIMIT_BYTES >> 20} MB (--memory-limit)" in sentence
    with started(*arguments), linked(address, tiny_llama) as link:
        assert Llama(read_config(tiny_llama), link.ops).prefill(random_ids(1, 4)).isfinite().all()
