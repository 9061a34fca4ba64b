"""The same lies over real sockets and real processes: nothing above depends on the links being in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest
import torch
from attacks.lies import LIES
from attacks.test_malformed import FORMS, sending
from hostile import PROMPT, SETUPS, HostilePeer, Material, Tamper, claiming, on
from torch import Tensor
from workers import running_worker

from tsqp.config import EnclaveConfig
from tsqp.errors import IntegrityError, ProtocolError, TransportTimeoutError
from tsqp.levels import Model, runnable
from tsqp.paths import private_socket_directory
from tsqp.transport.base import Buffer, ClientTransport, Delivery, Incoming
from tsqp.transport.keys import KeyPair, ephemeral
from tsqp.transport.server import Server
from tsqp.transport.urls import parse
from tsqp.wire import codec

DOWN = "layers.1.down"


class HostileServer:
    """A hostile peer behind a socket, served by a thread.

    Args:
        peer: answers.
        url: where it listens.
        key: its own; None for a link in clear.
    """

    def __init__(self, peer: HostilePeer, url: str, key: KeyPair | None = None) -> None:
        self._peer = peer
        self._server = Server([parse(url)], 1 << 24, key=key)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            incoming = self._server.receive(0.05)
            if incoming:
                self._answer(incoming)

    def _answer(self, incoming: Incoming) -> None:
        replies = self._peer.answer(tuple(bytes(frame) for frame in incoming.frames))
        for reply in replies:
            assert not isinstance(reply, Exception)
            incoming.reply(reply)

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._server.close()


class Hosts:
    """One hostile worker and some hostile dealers, each behind an ipc socket; dealers' links are encrypted."""

    def __init__(self, material: Material, dealers: int | None, stack: ExitStack) -> None:
        self.material = material
        self.dealers = dealers
        self._directory = stack.enter_context(private_socket_directory())
        self._stack = stack
        self.worker, _ = self._host("worker", None)
        hosted = [self._host(f"dealer-{index}", ephemeral()) for index in range(dealers or 0)]
        self.helpers = [peer for peer, _ in hosted]
        self.keys = tuple(key.public.decode() for _, key in hosted if key)

    def _host(self, name: str, key: KeyPair | None) -> tuple[HostilePeer, KeyPair | None]:
        url = f"ipc://{self._directory}/{name}"
        peer = HostilePeer(url, self.material.dispatcher("exact" if name == "worker" else "masks"))
        server = HostileServer(peer, url, key)
        self._stack.callback(server.close)
        return peer, key

    def run(self, **options: float) -> Tensor:
        model = Model(self.material.directory, self.material.packed.config, None, self.material.packed)
        config = EnclaveConfig(
            worker=self.worker.address,
            dealers=tuple(helper.address for helper in self.helpers),
            dealer_keys=self.keys,
            mask_pool=None if self.dealers is None else 4,
            **{"request_timeout_s": 30.0, **options},  # type: ignore[arg-type]
        )
        with runnable("verified" if self.dealers is None else "masked", model, config) as loaded:
            loaded.prepare(lambda _done: None)
            assert loaded.predict_all is not None
            return loaded.predict_all(PROMPT)


@contextmanager
def hosted(material: Material, dealers: int | None) -> Iterator[Hosts]:
    with ExitStack() as stack:
        yield Hosts(material, dealers, stack)


@pytest.mark.parametrize("dealers", SETUPS.values(), ids=SETUPS)
def test_honest_peers_behind_sockets_are_exact(material: Material, dealers: int | None, local_logits: Tensor) -> None:
    with hosted(material, dealers) as hosts:
        assert torch.equal(hosts.run(), local_logits)


@pytest.mark.parametrize("dealers", SETUPS.values(), ids=SETUPS)
@pytest.mark.parametrize("lie", ["a word off by 1", "a word off by 2^31", "rows swapped", "another layer's"])
def test_a_worker_behind_a_socket_that_lies_is_found(material: Material, dealers: int | None, lie: str) -> None:
    with hosted(material, dealers) as hosts:
        hosts.worker.tamper = on(DOWN, claiming(LIES[lie]))
        with pytest.raises(IntegrityError, match=DOWN) as raised:
            hosts.run()
        assert hosts.worker.received[-1].group == DOWN
        assert all(peer.address in str(raised.value) for peer in (hosts.worker, *hosts.helpers))


@pytest.mark.parametrize(("dealers", "liar"), [(1, 0), (2, 0), (2, 1)])
def test_a_dealer_behind_a_socket_that_lies_is_found(material: Material, dealers: int, liar: int) -> None:
    with hosted(material, dealers) as hosts:
        hosts.helpers[liar].tamper = on(DOWN, claiming(LIES["a word off by 1"]))
        with pytest.raises(IntegrityError, match=DOWN) as raised:
            hosts.run()
        assert hosts.worker.received[-1].group == DOWN
        assert all(peer.address in str(raised.value) for peer in (hosts.worker, *hosts.helpers))


@pytest.mark.parametrize("dealers", [None, 0], ids=["verified", "masked"])
@pytest.mark.parametrize(
    "form", ["a row less", "two frames", "a frame cut by a byte", "another id", "an empty header", "a header of zeros"]
)
def test_a_worker_behind_a_socket_that_breaks_the_protocol_is_refused(
    material: Material, dealers: int | None, form: str
) -> None:
    with hosted(material, dealers) as hosts:
        hosts.worker.tamper = on(DOWN, sending(FORMS[form]))
        with pytest.raises(ProtocolError):
            hosts.run()
        assert hosts.worker.received[-1].group == DOWN


@pytest.mark.parametrize("dealers", [None, 0], ids=["verified", "masked"])
def test_a_worker_behind_a_socket_that_falls_silent_is_asked_again_in_the_same_words(
    material: Material, dealers: int | None
) -> None:
    """Twice, then never: the second attempt is the last of one retry, and holds the same bytes."""
    silent: Tamper = on(DOWN, lambda _exchange: [])
    with hosted(material, dealers) as hosts:
        hosts.worker.tamper = silent
        with pytest.raises(TransportTimeoutError, match=DOWN):
            hosts.run(request_timeout_s=0.5)
        attempts = [sent.frames[1] for sent in hosts.worker.received if sent.group == DOWN and len(sent.frames) > 1]
        assert len(attempts) == 2
        assert attempts[0] == attempts[1]


class Meddler:
    """A host between the enclave and a real worker process, changing what comes back.

    Args:
        link: to the real worker.
        target: the linear group whose products it changes.
    """

    def __init__(self, link: ClientTransport, target: str) -> None:
        self._link = link
        self._target = target
        self._meddling = False
        self.peer = link.peer

    def send(self, frames: Sequence[Buffer]) -> None:
        header = codec.decode_request([bytes(frame) for frame in frames]).header
        self._meddling = len(frames) > 1 and getattr(header, "group", "") == self._target
        self._link.send(frames)

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:
        return self._link.allocate(size, kept=kept)

    def discard(self, slot: memoryview) -> None:
        self._link.discard(slot)

    def receive(self, timeout_s: float) -> Delivery:
        """Change a word where it lies: in memory that the enclave shares, if it does."""
        delivery = self._link.receive(timeout_s)
        if self._meddling:
            memoryview(delivery.frames[1])[-1] ^= 0x80
        return delivery

    def close(self) -> None:
        self._link.close()


@pytest.fixture(scope="module")
def process(material: Material) -> Iterator[str]:
    with running_worker(material.directory, "shm") as url:
        yield url


@pytest.mark.parametrize("level", ["verified", "masked"])
@pytest.mark.parametrize("target", [None, "layers.0.qkv", "head"])
def test_a_host_that_meddles_with_a_real_process_is_found(
    material: Material, process: str, level: str, target: str | None, local_logits: Tensor
) -> None:
    """A real worker over shared memory; one bit of one product changes on its way, or (None) nothing does."""
    model = Model(material.directory, material.packed.config, None, material.packed)
    config = EnclaveConfig(worker=process)
    with runnable(level, model, config, wrap=lambda _peer: lambda link: Meddler(link, target or "")) as loaded:
        assert loaded.predict_all is not None
        if target is None:
            assert torch.equal(loaded.predict_all(PROMPT), local_logits)
            return
        with pytest.raises(IntegrityError, match=target):
            loaded.predict_all(PROMPT)
