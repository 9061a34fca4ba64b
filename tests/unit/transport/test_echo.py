"""The echo that benchmarks of the transports use, over every kind of endpoint, all ways."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch

from tsqp.bench.echo import EchoClient, Way, echo_client, round_trip, serving
from tsqp.errors import InputError, SetupError
from tsqp.transport.base import Buffer, Delivery
from tsqp.transport.keys import create, read_public


@pytest.mark.parametrize("kind", ["tcp", "ipc", "shm", "named"])
def test_echoes_come_back(kind: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        tcp = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    named = f"shm:///dev/shm/tsqp-test-{os.getpid()}-echo"
    url = {"tcp": tcp, "named": named}.get(kind, f"{kind}://{tmp_path}/echo")
    with serving(url):
        for way in get_args(Way):
            for size in (4, 4096, 1 << 20):
                assert 0 < round_trip(url, size, way, repeats=3) < 10
        with echo_client(url) as client, pytest.raises(InputError, match="an echo of 3 bytes: at least 4"):
            client.seconds(3, "in place")


def test_echoes_come_back_encrypted(tmp_path: Path) -> None:
    public, secret = create(tmp_path, "echo")
    url = f"ipc://{tmp_path}/echo"
    with serving(url, secret), echo_client(url, read_public(public)) as client:
        assert client.seconds(1 << 20, "copied") > 0


class Mirror:
    """A link to a peer that returns the words as they came, or one of them changed."""

    peer = "mirror"

    def __init__(self, change: float) -> None:
        self.change = change
        self.sent: bytes = b""

    def allocate(self, size: int, *, kept: bool = False) -> None:
        pass

    def discard(self, slot: memoryview) -> None:
        pass

    def send(self, frames: Sequence[Buffer]) -> None:
        self.sent = bytes(frames[1])

    def receive(self, timeout_s: float) -> Delivery:  # noqa: ARG002
        words = torch.frombuffer(bytearray(self.sent), dtype=torch.float32) + 1
        words[5] += self.change
        return Delivery([b"used", words.numpy().tobytes()])

    def close(self) -> None:
        pass


def test_every_word_of_an_answer_counts() -> None:
    assert EchoClient(Mirror(0.0)).seconds(4096, "used") > 0
    with pytest.raises(InputError, match="got 4096 bytes of other numbers"):
        EchoClient(Mirror(1.0)).seconds(4096, "used")


def test_a_server_that_does_not_start_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SetupError, match="did not start; it says above why"), serving("tcp://192.0.2.1:1"):
        pass
    assert "cannot listen on 192.0.2.1:1" in capfd.readouterr().err
