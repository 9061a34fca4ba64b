"""What a user sees when the worker is absent, dies, hangs, or is something else altogether."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
import zmq
from tiny_models import random_ids
from workers import free_port, linked

from tsqp.config import EnclaveConfig
from tsqp.enclave.remote_ops import OpenOps
from tsqp.errors import (
    DeviceMemoryError,
    InputError,
    ProtocolError,
    TransportClosedError,
    TransportError,
    TransportTimeoutError,
)
from tsqp.launch import local_worker
from tsqp.levels import open_model, runnable
from tsqp.model.architecture import read_config
from tsqp.model.llama import Llama
from tsqp.model.overlap import Pending
from tsqp.wire import messages

QUICK = EnclaveConfig(connect_timeout_s=0.5, request_timeout_s=2.0)


@contextmanager
def own_worker(directory: Path, scheme: str = "shm") -> Iterator[tuple[str, psutil.Process]]:
    """A worker that a test may kill."""
    before = set(psutil.Process().children())
    with local_worker(["--model", str(directory), "--device", "cpu"], scheme) as url:
        (process,) = set(psutil.Process().children()) - before
        yield url, process


@contextmanager
def llama(url: str, directory: Path, config: EnclaveConfig = QUICK) -> Iterator[Llama]:
    with linked(url, directory, config) as link:
        yield Llama(read_config(directory), link.ops)


def test_no_worker_gives_up_after_the_stated_time_and_names_host_and_port(tiny_llama: Path) -> None:
    address = f"localhost:{free_port()}"
    with (
        pytest.raises(TransportTimeoutError, match=rf"{address} within 0.5 s.*tsqp worker"),
        llama(address, tiny_llama),
    ):
        pass


def test_a_server_that_is_no_worker(tiny_llama: Path) -> None:
    """Something that accepts connections but does not speak ZeroMQ."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(TransportError, match=address), llama(address, tiny_llama):
            pass


@pytest.mark.parametrize(
    ("version", "upgrade"), [(2, "upgrade the worker"), (9, "upgrade this side")], ids=["older", "newer"]
)
def test_another_protocol_version_is_named(tiny_llama: Path, version: int, upgrade: str) -> None:
    """A worker of another version answers in its own way; only version and id are common."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def answer() -> None:
            identity, header = router.recv_multipart()
            request_id = msgspec.msgpack.decode(header)["id"]
            router.send_multipart([identity, msgspec.msgpack.encode({"v": version, "id": request_id, "who": "knows"})])

        thread = threading.Thread(target=answer)
        thread.start()
        with (
            pytest.raises(ProtocolError, match=f"version {version}, this side speaks 3: {upgrade}"),
            llama(f"127.0.0.1:{port}", tiny_llama),
        ):
            pass
        thread.join()


def test_our_worker_names_both_versions_to_a_client_of_another_one(tiny_llama: Path) -> None:
    with own_worker(tiny_llama, "ipc") as (url, _), zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, 10_000)
        dealer.connect(url)
        dealer.send(msgspec.msgpack.encode({"op": "hello", "v": 7, "id": 5, "new_field": 1}))
        failure = msgspec.msgpack.decode(dealer.recv(), type=messages.AnyReply)
    assert isinstance(failure, messages.Failure)
    assert (failure.id, failure.code) == (5, "version")
    assert "version 7" in failure.message
    assert "speaks 3" in failure.message


class _KillBefore:
    """Ends the worker just before the given linear group is sent."""

    def __init__(self, ops: OpenOps, group: str, process: psutil.Process, number: int) -> None:
        self._ops, self._group, self._process, self._number = ops, group, process, number
        self.state, self.embedding, self.matmul, self.abandon = ops.state, ops.embedding, ops.matmul, ops.abandon

    def linear(self, group: str, x_MK: torch.Tensor) -> Pending:
        if group == self._group:
            self._process.send_signal(self._number)
        return self._ops.linear(group, x_MK)

    def linear_chain(self, groups: tuple[str, ...], x_MK: torch.Tensor, residual_MD: torch.Tensor) -> Pending | None:
        if self._group in groups:
            self._process.send_signal(self._number)
        return self._ops.linear_chain(groups, x_MK, residual_MD)


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (signal.SIGKILL, TransportClosedError, "closed the connection or died"),
        (signal.SIGSTOP, TransportTimeoutError, "linear layers.1.o to layers.2.qkv: .* did not answer within 2 s"),
    ],
    ids=["killed", "hung"],
)
@pytest.mark.parametrize("scheme", ["shm", "ipc"])
def test_a_worker_lost_in_the_middle_of_a_prefill(
    tiny_llama: Path, scheme: str, number: int, error: type[Exception], message: str
) -> None:
    with own_worker(tiny_llama, scheme) as (url, process), linked(url, tiny_llama, QUICK) as link:
        model = Llama(read_config(tiny_llama), _KillBefore(link.ops, "layers.1.o", process, number))
        try:
            with pytest.raises(error, match=message):
                model.prefill(random_ids(1, 8))
        finally:
            if number == signal.SIGSTOP:
                process.send_signal(signal.SIGCONT)


def test_the_worker_survives_a_request_it_has_no_memory_for(tiny_llama: Path) -> None:
    """The worker's address space is capped: a product of 1 GB is refused by the allocator, and the worker goes on."""
    with own_worker(tiny_llama) as (url, process), llama(url, tiny_llama) as model:
        ops = model._ops
        cap = process.memory_info().vms + (256 << 20)
        process.rlimit(psutil.RLIMIT_AS, (cap, cap))
        with pytest.raises(DeviceMemoryError, match=r"out of memory during matmul.*shorten the prompt"):
            ops.matmul(torch.zeros(1 << 14, 1), torch.zeros(1, 1 << 14))
        assert ops.linear("head", torch.zeros(1, 48))().shape == (1, 101)


def test_wrong_shapes_are_refused_by_name(tiny_llama: Path) -> None:
    with own_worker(tiny_llama) as (url, _), llama(url, tiny_llama) as model:
        with pytest.raises(InputError, match=r"linear layers\.0\.qkv expects floats of shape \[M, 48\]"):
            model._ops.linear("layers.0.qkv", torch.zeros(2, 47))()
        with pytest.raises(InputError, match="outside the vocabulary"):
            model._ops.embedding(torch.tensor([101]))()


def test_a_worker_ends_with_the_process_that_started_it(tiny_llama: Path) -> None:
    """The parent is killed, so it cannot tidy up; its worker notices that the pipe is gone."""
    script = (
        "import sys, time; from tsqp.launch import local_worker\n"
        f"with local_worker(['--model', {str(tiny_llama)!r}, '--device', 'cpu']):\n"
        "    print('up', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        (child,) = psutil.Process(parent.pid).children()
        os.kill(parent.pid, signal.SIGKILL)
        child.wait(30)
    assert not child.is_running()


def test_prefill_needs_an_address_at_open(tiny_llama: Path) -> None:
    model = open_model(str(tiny_llama), "open")
    with pytest.raises(InputError, match="address"), runnable("open", model, QUICK):
        pass
