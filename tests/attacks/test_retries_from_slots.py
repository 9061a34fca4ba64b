"""Links over shared memory that fail: what is sent again lies in memory that the worker can change.

Words to send stay in the slot where they were written until the reply is taken, so that a retry needs no copy made
before. It sends the same words, or what the worker itself has put there, and never those of another message.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hostile import PROMPT, Material
from torch import Tensor

from tsqp.config import EnclaveConfig
from tsqp.enclave.connect import Peer, meet, meet_again
from tsqp.enclave.products import ExactWorker
from tsqp.enclave.session import Session
from tsqp.errors import IntegrityError, SetupError, TransportClosedError
from tsqp.levels import Model, runnable
from tsqp.transport.base import Buffer, ClientTransport, Delivery, Incoming
from tsqp.transport.datagrams import MAX_INLINE_BYTES
from tsqp.transport.server import Server
from tsqp.transport.shm import ShmClient, ShmListener
from tsqp.transport.urls import parse
from tsqp.wire import codec, messages

LIMIT_BYTES = 1 << 20
PATIENCE_S = 30.0
GROUP = "layers.1.down"
ROWS = 512
# Long enough that its tensors do not travel in datagrams.
IDS = torch.arange(128).view(1, 128) * 7 % 101


class Host:
    """An honest worker behind a server in a thread, which may be stopped and started again.

    Attributes:
        words: what it was asked to multiply, by group.
        before: called with a request that is not answered yet; may end the link.
    """

    def __init__(self, material: Material, url: str) -> None:
        self.url = url
        self.words: list[tuple[str, bytes]] = []
        self.before: Callable[[Incoming], None] = lambda _incoming: None
        self._dispatcher = material.dispatcher()
        self._stopping = threading.Event()
        self.start()

    def start(self) -> None:
        self._stopping.clear()
        self.server = Server([parse(self.url)], LIMIT_BYTES)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            incoming = self.server.receive(0.02)
            if incoming is None:
                continue
            header = codec.decode_request([bytes(frame) for frame in incoming.frames]).header
            if isinstance(header, messages.LinearExact):
                self.words.append((header.group, bytes(incoming.frames[1])))
            self.before(incoming)
            incoming.reply(self._dispatcher.answer(incoming.frames))

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self.server.close()

    def drop_all(self) -> None:
        """End every link."""
        (listener,) = self.server._listeners
        assert isinstance(listener, ShmListener)
        listener._guests.drop_all()

    def restart(self, after_s: float) -> None:
        self.stop()
        time.sleep(after_s)
        self.start()


@contextmanager
def hosting(material: Material, url: str) -> Iterator[Host]:
    host = Host(material, url)
    try:
        yield host
    finally:
        host.stop()


class Watched:
    """A link that notes its slots and the frames it sent, and fails when told to."""

    def __init__(self, link: ClientTransport) -> None:
        self.link = link
        self.peer = link.peer
        self.kept: list[memoryview] = []
        self.long: list[Buffer] = []
        self.broken = False
        self.before: Callable[[Sequence[Buffer]], None] = lambda _frames: None

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:
        slot = self.link.allocate(size, kept=kept)
        if kept and slot is not None:
            self.kept.append(slot)
        return slot

    def discard(self, slot: memoryview) -> None:
        self.link.discard(slot)

    def send(self, frames: Sequence[Buffer]) -> None:
        self.before(frames)
        self.long += [frame for frame in frames if len(frame) > MAX_INLINE_BYTES]
        self.link.send(frames)

    def receive(self, timeout_s: float) -> Delivery:
        if self.broken:
            raise TransportClosedError("the link failed.")
        return self.link.receive(timeout_s)

    def close(self) -> None:
        self.link.close()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"shm://{tmp_path}/worker"


@pytest.fixture
def host(material: Material, url: str) -> Iterator[Host]:
    with hosting(material, url) as host:
        yield host


class Enclave:
    """An ``ExactWorker`` and its links, oldest first."""

    def __init__(self, material: Material, url: str, retries: int) -> None:
        self.links: list[Watched] = []
        groups = {group.name: group for group in material.groups}
        self.features = groups[GROUP].in_features
        config = EnclaveConfig(max_message_bytes=LIMIT_BYTES, request_timeout_s=PATIENCE_S)
        peer = Peer(address=url, wrap=self._wrap)

        def open_session() -> Session:
            return (meet_again if self.links else meet)(peer, config, material.expected("exact"))[0]

        self.exact = ExactWorker(open_session, groups, retries)

    def _wrap(self, link: ClientTransport) -> Watched:
        self.links.append(Watched(link))
        return self.links[-1]

    def start(self, fill: int) -> Callable[[], Tensor]:
        """Send words that are all alike; call the result for the product."""

        def write(x_MK: Tensor) -> None:
            x_MK.fill_(fill)

        answered = self.exact.start(GROUP, ROWS, write)

        def collect() -> Tensor:
            answer = answered()
            y_MN = answer.claim.unverified().clone()
            answer.release()
            return y_MN

        return collect

    def words(self, fill: int) -> bytes:
        return bytes(codec.frame_of(torch.full((ROWS, self.features), fill, dtype=torch.int32)))

    @property
    def inner(self) -> ShmClient:
        link = self.links[0].link
        assert isinstance(link, ShmClient)
        return link

    def await_consumed(self, count: int) -> None:
        """Wait until the worker has given the memory of so many messages back."""
        deadline = time.monotonic() + PATIENCE_S
        while self.inner._link._counters[8] < count:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@contextmanager
def enclave_of(material: Material, url: str, retries: int = 1) -> Iterator[Enclave]:
    enclave = Enclave(material, url, retries)
    try:
        yield enclave
    finally:
        enclave.exact.close()


def expected(material: Material, fill: int) -> Tensor:
    x_MK = torch.full((ROWS, material.codes[GROUP].shape[1]), fill, dtype=torch.int64)
    return (x_MK @ material.codes[GROUP].long().T).to(torch.int32)


def test_words_are_written_once_into_a_slot_that_is_kept_until_the_reply_is_taken(
    material: Material, host: Host
) -> None:
    with enclave_of(material, host.url) as enclave:
        for fill in range(1, 20):
            assert torch.equal(enclave.start(fill)(), expected(material, fill))
        (link,) = enclave.links
        assert len(link.kept) == 19
        assert all(frame is slot for frame, slot in zip(link.long, link.kept, strict=True))
        enclave.await_consumed(20)
        assert enclave.inner.allocate(18_000) is not None
        assert enclave.inner._link._spans.used == 18_048
        assert not enclave.inner._link._kept


def test_a_retry_sends_the_words_that_left_at_first_though_the_worker_was_done_with_them(
    material: Material, host: Host
) -> None:
    """The reply to the first is there but never taken; words sent after it must lie elsewhere."""
    with enclave_of(material, host.url) as enclave:
        first = enclave.start(1)
        enclave.await_consumed(2)
        second = enclave.start(2)
        enclave.await_consumed(3)
        enclave.links[0].broken = True
        assert torch.equal(first(), expected(material, 1))
        assert torch.equal(second(), expected(material, 2))
        assert [words for _, words in host.words] == [enclave.words(fill) for fill in (1, 2, 1, 2)]
        assert len(enclave.links) == 2


def test_a_slot_is_read_once_and_all_retries_send_the_same(material: Material, host: Host) -> None:
    with enclave_of(material, host.url, retries=2) as enclave:
        first = enclave.start(1)
        enclave.await_consumed(2)
        enclave.links[0].broken = True

        def meddle(_incoming: Incoming) -> None:
            if len(host.words) == 2:
                host.before = lambda _incoming: None
                enclave.links[0].kept[0][:8] = b"changed!"
                host.drop_all()

        host.before = meddle
        assert torch.equal(first(), expected(material, 1))
        assert [words for _, words in host.words] == [enclave.words(1)] * 3


def test_a_worker_that_changes_the_words_gets_back_what_it_wrote_and_is_found(
    material: Material, url: str, local_logits: Tensor
) -> None:
    """It writes to the slot and breaks the link: the second attempt is its own words, and fails the check."""
    model = Model(material.directory, material.packed.config, None, material.packed)
    config = EnclaveConfig(worker=url, max_message_bytes=LIMIT_BYTES, mask_pool=0)
    foreign = bytes(range(256)) * (IDS.numel() * 4)
    with hosting(material, url) as host:

        def meddle(incoming: Incoming) -> None:
            if len(host.words) > 5 and len(incoming.frames) > 1:
                host.before = lambda _incoming: None
                frame = memoryview(incoming.frames[1])
                frame[:] = foreign[: len(frame)]
                host.drop_all()

        with runnable("masked", model, config) as loaded:
            assert loaded.predict_all is not None
            assert torch.equal(loaded.predict_all(PROMPT), local_logits)
            host.words.clear()
            host.before = meddle
            with pytest.raises(IntegrityError) as failure:
                loaded.predict_all(IDS)
            sent = len(host.words)
            with pytest.raises(IntegrityError, match="out of use"):
                loaded.predict_all(PROMPT)
    (group, first), (again, second) = host.words[-2:]
    assert group == again
    assert group in str(failure.value)
    assert first != second == foreign[: len(first)]
    assert len(host.words) == sent, "nothing is sent after it"


def test_without_retries_nothing_is_sent_again_though_another_product_opened_the_link_anew(
    material: Material, host: Host
) -> None:
    """Its slot was not kept."""
    with enclave_of(material, host.url, retries=0) as enclave:
        first, second = enclave.start(1), enclave.start(2)
        enclave.await_consumed(3)
        enclave.links[0].broken = True
        with pytest.raises(TransportClosedError):
            first()
        assert torch.equal(enclave.start(3)(), expected(material, 3))
        with pytest.raises(TransportClosedError, match="was lost with the request"):
            second()
        assert torch.equal(enclave.start(4)(), expected(material, 4)), "the new link is not given up for it"
        assert len(enclave.links) == 2
        assert [words for _, words in host.words] == [enclave.words(fill) for fill in (1, 2, 3, 4)]


def test_more_than_there_is_room_for_waits_until_replies_are_taken(material: Material, host: Host) -> None:
    """Kept slots take room longer than a worker needs it; collected in order, all get through."""
    with enclave_of(material, host.url) as enclave:
        count = 3 * LIMIT_BYTES // len(enclave.words(0))
        products = [enclave.start(fill) for fill in range(count)]
        assert enclave.inner._link.has_unsent
        for fill, collect in enumerate(products):
            assert torch.equal(collect(), expected(material, fill))
        assert len(enclave.links) == 1


def test_what_is_abandoned_keeps_no_room(material: Material, host: Host) -> None:
    with enclave_of(material, host.url) as enclave:
        for _ in range(3):
            enclave.start(1)
            enclave.start(2)
            enclave.exact.abandon()
        assert torch.equal(enclave.start(3)(), expected(material, 3))
        enclave.await_consumed(8)
        assert enclave.inner.allocate(18_000) is not None
        assert enclave.inner._link._spans.used == 18_048


def test_in_a_named_region_nothing_is_kept(material: Material) -> None:
    """Its seat may be another client's once the link is lost: what may be sent again is private memory."""
    with hosting(material, f"shm:///dev/shm/tsqp-test-{os.getpid()}-retry") as host:
        for retries in (0, 1):
            with enclave_of(material, host.url, retries=retries) as enclave:
                first, second = enclave.start(1), enclave.start(2)
                assert not enclave.links[0].kept
                enclave.links[0].broken = retries > 0
                assert torch.equal(first(), expected(material, 1))
                assert torch.equal(second(), expected(material, 2))
                assert [words for _, words in host.words[-2:]] == [enclave.words(fill) for fill in (1, 2)]


@pytest.mark.parametrize("over", ["socket", "named", "ipc"])
def test_a_worker_that_is_started_again_is_met_again(
    material: Material, tmp_path: Path, over: str, local_logits: Tensor
) -> None:
    """The socket, or the region, is missing for a while; one retry bridges that, as libzmq does over ipc and tcp."""
    url = f"{'ipc' if over == 'ipc' else 'shm'}://{tmp_path}/worker"
    if over == "named":
        url = f"shm:///dev/shm/tsqp-test-{os.getpid()}-restart"
    model = Model(material.directory, material.packed.config, None, material.packed)
    config = EnclaveConfig(worker=url, max_message_bytes=LIMIT_BYTES, mask_pool=0)
    links: list[Watched] = []

    def wrapped(link: ClientTransport) -> Watched:
        links.append(Watched(link))
        return links[-1]

    with hosting(material, url) as host, ExitStack() as stack:
        loaded = stack.enter_context(runnable("masked", model, config, wrap=lambda _peer: wrapped))
        restarting = threading.Thread(target=partial(host.restart, 0.5))

        def die(frames: Sequence[Buffer]) -> None:
            if getattr(codec.decode_request([bytes(frame) for frame in frames]).header, "group", "") == GROUP:
                links[0].before = lambda _frames: None
                restarting.start()

        links[0].before = die
        assert loaded.predict_all is not None
        assert torch.equal(loaded.predict_all(PROMPT), local_logits)
        restarting.join()
        assert len(links) > 1


def test_a_worker_that_does_not_come_back_is_a_closed_link_and_one_that_was_never_there_a_mistake(
    material: Material, url: str
) -> None:
    config = EnclaveConfig(max_message_bytes=LIMIT_BYTES, connect_timeout_s=0.2)
    expect = material.expected("exact")
    with pytest.raises(SetupError, match=r"cannot connect to .*No such file.*Is the worker running"):
        meet(Peer(address=url), config, expect)
    started = time.monotonic()
    with pytest.raises(TransportClosedError, match=r"was lost, and nobody has answered there for 0\.2 s since"):
        meet_again(Peer(address=url), config, expect)
    assert time.monotonic() - started < PATIENCE_S
