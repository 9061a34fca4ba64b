"""Many clients of one worker process: each gets its own replies, and none holds up the others or the worker's end."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from workers import packed_tiny

from tsqp.enclave.session import Session
from tsqp.launch import worker_process
from tsqp.model.packed import open_codes
from tsqp.transport.client import open_client
from tsqp.transport.urls import parse
from tsqp.wire import codec, messages

ROOT = Path(__file__).parents[2]
LOAD = ROOT / "benchmarks/client_load.py"
PATIENCE_S = 60.0
QKV, HEAD = "layers.0.qkv", "head"
INPUTS = 48


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_tiny(tiny_llama, tmp_path_factory.mktemp("many") / "packed")


@contextmanager
def started(packed: Path, urls: list[str], **options: object) -> Iterator[subprocess.Popen[str]]:
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    listen = [part for url in urls for part in ("--listen", url)]
    words = [sys.executable, "-m", "tsqp", "worker", "--model", str(packed), "--device", "cpu", "--json"]
    with worker_process([*words, "--exit-with-parent", *listen, *flags]) as process:
        yield process


@contextmanager
def session(url: str) -> Iterator[Session]:
    opened = Session(open_client(parse(url), 1 << 26), PATIENCE_S)
    try:
        yield opened
    finally:
        opened.close()


def stats(asking: Session) -> messages.StatsResult:
    return asking.result(asking.submit(lambda i: messages.Stats(id=i)), messages.StatsResult)[0]


def linear(group: str, rows: int) -> messages.LinearExact:
    return messages.LinearExact(id=0, group=group, x=messages.TensorSpec("int32", (rows, INPUTS)))


class Raw:
    """A client that sends what it likes, and reads when it likes."""

    def __init__(self, url: str, context: zmq.Context[Any]) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 1)
        self.socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        self.socket.connect(url)

    def ask(self, header: messages.AnyRequest, request_id: int, *frames: bytes) -> None:
        self.socket.send_multipart([messages.encode(msgspec.structs.replace(header, id=request_id)), *frames])

    def read(self) -> tuple[messages.AnyReply, Sequence[Any]]:
        return codec.decode_reply(self.socket.recv_multipart())


def step(group: str, rows: int) -> dict[str, Any]:
    header = {"op": "linear_exact", "group": group, "x": {"dtype": "int32", "shape": [rows, INPUTS]}}
    return {"header": header, "fill": "words"}


def words(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 31), 1 << 31, (rows, INPUTS), generator=generator).to(torch.int32)


def product(packed: Path, group: str, x_MK: torch.Tensor) -> torch.Tensor:
    return (x_MK.long() @ open_codes(packed).read(group).long().T).to(torch.int32)


def test_64_sessions_at_once_get_their_own_replies(packed: Path, tmp_path: Path) -> None:
    """From one process that has no torch; the worker knows them all, and none is refused."""
    url = f"ipc://{tmp_path}/worker"
    groups = {QKV: 2, HEAD: 1}
    steps = [step(group, rows) for group, rows in groups.items()]
    job = json.dumps({"clients": 64, "steps": steps, "rounds": 4, "seed": 0})
    with started(packed, [url]), session(url) as asking:
        asking.hello(PATIENCE_S)
        done = subprocess.run(
            [sys.executable, str(LOAD), url],
            input=f"{job}\n\n",
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout.splitlines()[-1])
        found = stats(asking)
    assert report["failures"] == []
    assert report["served"] == [4 * len(steps)] * 64
    assert found.product_requests == 64 * 4 * len(steps)
    assert found.products < found.product_requests
    assert (found.refused, found.waiting, found.waiting_bytes) == (0, 0, 0)
    load = runpy.run_path(str(LOAD))
    for client, digest in enumerate(report["digests"]):
        whole = sha256()
        for group, rows in groups.items():
            spec = messages.TensorSpec("int32", (rows, INPUTS))
            frame = load["filled"](spec, "words", client % load["_FRAMES"])
            whole.update(codec.frame_of(product(packed, group, codec.tensor_of(spec, frame))))
        assert digest == whole.hexdigest()


def test_a_client_that_is_stopped_or_dies_holds_nobody_up(packed: Path, tmp_path: Path) -> None:
    url, rows = f"ipc://{tmp_path}/worker", 4096
    job = json.dumps({"clients": 8, "steps": [step(HEAD, rows)], "seconds": 600, "seed": 0})
    with started(packed, [url]), session(url) as asking:
        asking.hello(PATIENCE_S)
        words_ = [sys.executable, str(LOAD), url]
        with subprocess.Popen(words_, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as load:
            try:
                assert load.stdin is not None
                load.stdin.write(f"{job}\n\n")
                load.stdin.flush()
                until(lambda: stats(asking).product_requests > 16)
                load.send_signal(signal.SIGSTOP)
                for seed in range(8):
                    assert torch.equal(asked(asking, words(4, seed)), product(packed, QKV, words(4, seed)))
                until(lambda: stats(asking).waiting == 0)
            finally:
                load.kill()
        until(lambda: stats(asking).clients == 1)


def asked(asking: Session, x_MK: torch.Tensor) -> torch.Tensor:
    header = linear(QKV, len(x_MK))
    request_id = asking.submit(lambda i: msgspec.structs.replace(header, id=i), [codec.frame_of(x_MK)])
    reply, (frame,) = asking.result(request_id, messages.Result)
    return codec.tensor_of(reply.y, frame)


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_was_taken_in_is_answered_after_sigterm(packed: Path, tmp_path: Path) -> None:
    """Sixteen replies of 4 MB to a client that reads none before the worker is told to stop."""
    ipc, shm, rows = f"ipc://{tmp_path}/zmq", f"shm://{tmp_path}/shm", 10000
    x_MK = words(rows, 1)
    want = product(packed, HEAD, x_MK)
    with started(packed, [ipc, shm]) as process, zmq.Context() as context, session(shm) as asking:
        asking.hello(PATIENCE_S)
        raw = Raw(ipc, context)
        for number in range(16):
            raw.ask(linear(HEAD, rows), number, bytes(codec.frame_of(x_MK)))
        until(lambda: stats(asking).product_requests == 16)
        process.send_signal(signal.SIGTERM)
        for number in range(16):
            reply, (frame,) = raw.read()
            assert isinstance(reply, messages.Result)
            assert reply.id == number
            assert torch.equal(codec.tensor_of(reply.y, frame), want)
        raw.socket.close()
        assert process.wait(PATIENCE_S) == 0
