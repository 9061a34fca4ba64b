"""The echo that benchmarks of the transports use, over every kind of endpoint, both ways."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tsqp.bench.echo import echo_client, round_trip, serving
from tsqp.errors import InputError, SetupError


@pytest.mark.parametrize("kind", ["tcp", "ipc", "shm", "named"])
def test_echoes_come_back(kind: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        tcp = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    named = f"shm:///dev/shm/tsqp-test-{os.getpid()}-echo"
    url = {"tcp": tcp, "named": named}.get(kind, f"{kind}://{tmp_path}/echo")
    with serving(url):
        for in_place in (False, True):
            for size in (4, 4096, 1 << 20):
                assert 0 < round_trip(url, size, in_place, repeats=3) < 10
        with echo_client(url) as client, pytest.raises(InputError, match="an echo of 3 bytes: at least 4"):
            client.seconds(3, in_place=True)


def test_a_server_that_does_not_start_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SetupError, match="did not start; it says above why"), serving("tcp://192.0.2.1:1"):
        pass
    assert "cannot listen on 192.0.2.1:1" in capfd.readouterr().err
