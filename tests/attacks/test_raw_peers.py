"""Peers that speak ZMTP by hand, or not at all: whatever they send, an honest client beside them is served."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from raw_zmtp import COMMAND, MORE, RawPeer, frame, greeting, header, ready
from tiny_models import random_ids
from workers import free_port, linked

from tsqp.enclave.connect import Link
from tsqp.model.architecture import read_config
from tsqp.model.llama import Llama
from tsqp.reports import WorkerReady
from tsqp.transport.keys import create
from tsqp.wire import messages

PATIENCE_S = 60.0
LIMIT_BYTES = 1 << 24
HELLO = frame(messages.encode(messages.Hello(id=1, software="raw")))
MANY_FRAMES = 100_000


@dataclass(frozen=True)
class Site:
    """A running worker: its address, process and standard error, and the model that it holds."""

    address: str
    process: subprocess.Popen[str]
    log: Path
    model: Path

    def peer(self) -> RawPeer:
        return RawPeer(self.address)

    def serves(self, link: Link | None = None) -> None:
        """Prove that an honest client is served, over a link of its own unless one is given."""
        if link is None:
            with linked(self.address, self.model) as fresh:
                self.serves(fresh)
            return
        assert Llama(read_config(self.model), link.ops).prefill(random_ids(1, 4)).isfinite().all()

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")


def start(stack: ExitStack, model: Path, directory: Path, *arguments: object) -> Site:
    address = f"127.0.0.1:{free_port()}"
    words = [sys.executable, "-m", "tsqp", "worker", "--device", "cpu", "--json", "--exit-with-parent"]
    words += ["--model", str(model), "--listen", address, *map(str, arguments)]
    log = stack.enter_context((directory / "log").open("w"))
    environment = {**os.environ, "TSQP_MAX_MESSAGE_BYTES": str(LIMIT_BYTES)}
    process = stack.enter_context(
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    )
    stack.callback(process.kill)
    assert process.stdout is not None
    msgspec.json.decode(process.stdout.readline(), type=WorkerReady)
    return Site(address, process, directory / "log", model)


@pytest.fixture(scope="module")
def site(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ExitStack() as stack:
        running = start(stack, tiny_llama, tmp_path_factory.mktemp("worker"))
        yield running
        assert running.process.poll() is None


GARBAGE = {
    "nothing": b"",
    "zeros": bytes(64),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00" + bytes(range(256)),
    "half a greeting": greeting()[:20],
    "greeting of another mechanism": greeting(b"PLAIN"),
    "greeting and garbage": greeting() + bytes(range(255, 0, -1)),
    "an endless command": greeting() + header(1 << 62, COMMAND),
    "a handshake of the wrong kind": greeting() + frame(b"\x05ERROR\x00", COMMAND),
    "a socket that may not connect": greeting() + frame(b"\x05READY\x0bSocket-Type\x00\x00\x00\x03PUB", COMMAND),
    "a property longer than its command": greeting() + frame(b"\x05READY\x0bSocket-Type\xff\xff\xff\xff", COMMAND),
}
AFTERWARDS = {
    "half a header": b"\x02\x00\x00",
    "half a frame": header(1000) + bytes(10),
    "half a message": frame(b"first", MORE),
    "an unknown command": frame(b"\x07UNKNOWN", COMMAND),
    "a command longer than it is": frame(b"\xff", COMMAND),
    "unknown flags": b"\xf8\x00",
    "no frame in it": frame(b""),
    "only delimiters": frame(b"", MORE) * 5 + frame(b""),
    "a hello and half a second one": HELLO + HELLO[:-3],
}


@pytest.mark.parametrize("sent", GARBAGE.values(), ids=list(GARBAGE))
def test_garbage_in_the_place_of_a_handshake(site: Site, sent: bytes) -> None:
    with site.peer() as peer:
        peer.send(sent)
        site.serves()
    site.serves()


@pytest.mark.parametrize("sent", AFTERWARDS.values(), ids=list(AFTERWARDS))
def test_garbage_and_truncated_frames_after_it(site: Site, sent: bytes) -> None:
    with site.peer() as peer:
        peer.shake_hands().send(sent)
        site.serves()
    site.serves()


@pytest.mark.parametrize("size", [LIMIT_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_a_frame_above_the_limit_ends_that_connection(site: Site, size: int) -> None:
    with site.peer() as peer:
        peer.shake_hands().send(header(size))
        assert peer.is_closed()
    site.serves()


def test_a_message_of_very_many_frames_is_refused_as_one_of_few(site: Site) -> None:
    with site.peer() as peer, linked(site.address, site.model) as link:
        peer.shake_hands().send(frame(b"", MORE) + frame(b"x", MORE) * MANY_FRAMES + frame(b"x"))
        peer.send(bytes([MORE]), HELLO[1:], frame(b"x", MORE) * MANY_FRAMES, frame(b"x"))
        site.serves(link)
        peer.send(HELLO)
        answers = peer.receive_until(b"welcome")
    assert b"at most 2 are allowed" in answers


def test_connections_that_never_finish_a_handshake_keep_nobody_out(site: Site) -> None:
    with ExitStack() as stack:
        for number in range(200):
            peer = stack.enter_context(site.peer())
            peer.send(greeting()[: number % 64], *([ready()[:5]] if number % 3 == 0 else []))
        site.serves()


def test_a_flood_of_hellos_without_taking_an_answer_keeps_nobody_out(site: Site) -> None:
    over = threading.Event()

    def flood(peer: RawPeer) -> None:
        with contextlib.suppress(OSError):
            while not over.is_set():
                peer.send(HELLO * 100)

    with ExitStack() as stack:
        link = stack.enter_context(linked(site.address, site.model))
        peers = [stack.enter_context(site.peer()).shake_hands() for _ in range(3)]
        threads = [threading.Thread(target=flood, args=(peer,)) for peer in peers]
        try:
            for thread in threads:
                thread.start()
            for _ in range(3):
                site.serves(link)
            site.serves()
        finally:
            over.set()
            for peer in peers:
                peer.cut()
            for thread in threads:
                thread.join()


def test_more_connections_than_descriptors_are_said_and_keep_nobody_out_that_is_there(site: Site) -> None:
    before = resource.prlimit(site.process.pid, resource.RLIMIT_NOFILE)
    used = len(list(Path(f"/proc/{site.process.pid}/fd").iterdir()))
    with ExitStack() as stack:
        link = stack.enter_context(linked(site.address, site.model))
        resource.prlimit(site.process.pid, resource.RLIMIT_NOFILE, (used + 20, before[1]))
        stack.callback(resource.prlimit, site.process.pid, resource.RLIMIT_NOFILE, before)
        for _ in range(60):
            stack.enter_context(site.peer()).send(greeting())
        deadline = time.monotonic() + PATIENCE_S
        while "no file descriptor is left" not in site.said():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        site.serves(link)
    site.serves()


def test_with_an_allow_list_none_of_them_gets_a_frame_in(tiny_llama: Path, tmp_path: Path) -> None:
    _, secret = create(tmp_path, "worker")
    public, _ = create(tmp_path, "enclave")
    with ExitStack() as stack:
        site = start(stack, tiny_llama, tmp_path, "--key", secret, "--allow", public)
        with site.peer() as peer:
            peer.send(greeting(b"CURVE"))
            assert peer.receive(64)[12:17] == b"CURVE"
            peer.send(frame(bytes(LIMIT_BYTES), MORE))
            assert peer.is_closed()
        with site.peer() as peer:
            peer.send(greeting(), ready(), frame(b"x", MORE))
            assert peer.is_closed()
