"""Which workers and dealers an engine takes from a directory, and what it takes from no directory."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tsqp.cluster.publish import PATH, Publisher
from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine.directory import MAX_LIES, Follower, Pins, pins, read
from tsqp.engine.directory import chosen as chosen_of
from tsqp.engine.liars import Liars
from tsqp.errors import ConfigError, IntegrityError, ProtocolError, TransportError
from tsqp.transport.keys import ephemeral
from tsqp.wire import directory
from tsqp.wire.directory import MAX_BYTES, Directory, Entry

A, B, DEALER, OTHER = (ephemeral().public.decode() for _ in range(4))
MASKED = EnclaveConfig(level="masked")
VERIFIED = EnclaveConfig(level="verified")
MOST = 8
ANYBODY = Pins(frozenset(), ())


def of(*workers: Entry, dealers: tuple[Entry, ...] = ()) -> Directory:
    return Directory(version=1, workers=workers, dealers=dealers)


def chosen(found: Directory, config: EnclaveConfig, trusted: Pins, **more: Any) -> tuple[EnclaveConfig, ...]:
    return chosen_of(found, config, trusted, MOST, **more)


def addresses(configs: tuple[EnclaveConfig, ...]) -> list[str | None]:
    return [each.worker for each in configs]


def test_at_masked_any_worker_is_used_over_a_link_with_the_key_that_is_said() -> None:
    configs = chosen(of(Entry("tcp://10.0.0.1:1", A), Entry("tcp://10.0.0.2:1", B)), MASKED, ANYBODY)
    assert configs == (
        replace(MASKED, worker="tcp://10.0.0.1:1", worker_key=A),
        replace(MASKED, worker="tcp://10.0.0.2:1", worker_key=B),
    )


@pytest.mark.parametrize("level", ["open", "verified", "masked"])
def test_where_keys_are_pinned_only_who_is_said_to_hold_one_is_used(level: str) -> None:
    found = of(Entry("tcp://10.0.0.1:1", OTHER), Entry("tcp://10.0.0.2:1", A), Entry("tcp://127.0.0.1:1"))
    configs = chosen(found, EnclaveConfig(level=level), Pins(frozenset({A, B}), ()))
    assert [(each.worker, each.worker_key) for each in configs] == [("tcp://10.0.0.2:1", A)]


@pytest.mark.parametrize("level", ["open", "verified"])
def test_without_pinned_keys_nobody_is_used_where_workers_read_prompts(level: str) -> None:
    with pytest.raises(TransportError, match="none that may be used"):
        chosen(of(Entry("tcp://127.0.0.1:1", A)), EnclaveConfig(level=level), ANYBODY)


def test_no_link_in_clear_leaves_this_machine_unless_the_settings_say_so() -> None:
    found = of(Entry("tcp://10.0.0.1:1"), Entry("tcp://127.0.0.1:1"))
    assert addresses(chosen(found, MASKED, ANYBODY)) == ["tcp://127.0.0.1:1"]
    assert len(chosen(found, replace(MASKED, insecure="on"), ANYBODY)) == 2


def test_who_has_an_own_key_uses_no_link_in_clear() -> None:
    with pytest.raises(TransportError, match="none that may be used"):
        chosen(of(Entry("tcp://127.0.0.1:1")), replace(MASKED, own_key="own.key_secret"), ANYBODY)


def test_dealers_are_those_of_the_pinned_keys_in_their_order() -> None:
    dealers = (Entry("tcp://10.0.1.1:1", OTHER), Entry("tcp://10.0.1.2:1", B), Entry("tcp://10.0.1.3:1", DEALER))
    config = replace(MASKED, dealer_keys=("d.key", "b.key"))
    (only,) = chosen(of(Entry("tcp://10.0.0.1:1", A), dealers=dealers), config, Pins(frozenset(), (DEALER, B)))
    assert only.dealers == ("tcp://10.0.1.3:1", "tcp://10.0.1.2:1")
    assert only.dealer_keys == config.dealer_keys


def test_a_directory_without_a_pinned_dealer_gives_nothing_to_mask_with() -> None:
    found = of(Entry("tcp://10.0.0.1:1", A), dealers=(Entry("tcp://10.0.1.1:1", OTHER), Entry("tcp://10.0.1.2:1")))
    with pytest.raises(TransportError, match=f"no dealer with the key {re.escape(DEALER)}"):
        chosen(found, replace(MASKED, dealer_keys=("d.key",)), Pins(frozenset(), (DEALER,)))


def test_dealers_that_the_settings_place_stay_there() -> None:
    config = replace(MASKED, dealers=("10.9.9.9:1",), dealer_keys=("d.key",))
    found = of(Entry("tcp://10.0.0.1:1", A), dealers=(Entry("tcp://10.0.1.1:1", DEALER),))
    (only,) = chosen(found, config, Pins(frozenset(), (DEALER,)))
    assert only.dealers == ("10.9.9.9:1",)


def test_a_worker_with_the_key_or_the_place_of_a_dealer_is_not_used() -> None:
    dealers = (Entry("tcp://10.0.1.1:1", DEALER),)
    workers = (Entry("tcp://10.0.0.1:1", DEALER), Entry("tcp://10.0.0.2:1", A))
    config = replace(MASKED, dealer_keys=("d.key",))
    configs = chosen(of(*workers, dealers=dealers), config, Pins(frozenset(), (DEALER,)))
    assert addresses(configs) == ["tcp://10.0.0.2:1"]
    config = replace(MASKED, dealers=("10.0.0.2:1",), dealer_keys=("d.key",))
    assert addresses(chosen(of(Entry("tcp://10.0.0.3:1", A), *workers), config, Pins(frozenset(), (DEALER,)))) == [
        "tcp://10.0.0.3:1"
    ]


def test_of_many_workers_some_are_used_first_of_all_those_in_use() -> None:
    found = of(*(Entry(f"tcp://10.0.0.1:{port}", A) for port in range(1, 101)))
    configs = chosen(found, MASKED, ANYBODY, current={"tcp://10.0.0.1:77"})
    assert len(configs) == MOST
    assert configs[0].worker == "tcp://10.0.0.1:77"


def test_who_has_lied_takes_nobodys_place() -> None:
    found = of(*(Entry(f"tcp://10.0.0.1:{port}", A) for port in range(1, 21)))
    configs = chosen(found, MASKED, ANYBODY, has_lied=lambda each: each.worker != "tcp://10.0.0.1:20")
    assert addresses(configs) == ["tcp://10.0.0.1:20"]


@pytest.mark.parametrize(
    ("config", "engine", "problem"),
    [
        (EnclaveConfig(level="open"), EngineConfig(), "pin the workers' keys"),
        (EnclaveConfig(level="verified"), EngineConfig(), "pin the workers' keys"),
        (EnclaveConfig(level="local"), EngineConfig(), "has none"),
        (MASKED, EngineConfig(workers=("10.0.0.1:1",)), "exclude each other"),
        (replace(MASKED, worker="10.0.0.1:1"), EngineConfig(), "exclude each other"),
        (replace(MASKED, masks="dealers"), EngineConfig(), "pin their keys"),
    ],
)
def test_settings_that_would_let_a_directory_choose_who_is_trusted_are_refused(
    config: EnclaveConfig, engine: EngineConfig, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        pins(config, engine)


def test_pins_are_the_keys_of_the_settings() -> None:
    config = replace(VERIFIED, worker_key=A)
    assert pins(config, EngineConfig()) == Pins(frozenset({A}), ())
    config = replace(MASKED, dealer_keys=(DEALER,))
    assert pins(config, EngineConfig(worker_keys=(A, B))) == Pins(frozenset({A, B}), (DEALER,))


@dataclass
class FakeWorkers:
    """Takes changes, and counts lies."""

    lies: int = 0
    liars: Liars = field(default_factory=Liars)
    changes: list[list[str | None]] = field(default_factory=list)

    def change(self, configs: tuple[EnclaveConfig, ...]) -> None:
        self.changes.append(addresses(configs))


def followed(path: Path, workers: FakeWorkers) -> Follower:
    engine = EngineConfig(directory=str(path))
    return Follower(MASKED, engine, (), workers)  # type: ignore[arg-type]


def test_changes_are_passed_on_once(tmp_path: Path) -> None:
    (tmp_path / "pool").write_bytes(directory.encode(of(Entry("tcp://10.0.0.1:1", A), Entry("tcp://10.0.0.2:1", B))))
    workers = FakeWorkers()
    workers.liars.add(replace(MASKED, worker="10.0.0.2:1"), IntegrityError("wrong."))
    follower = followed(tmp_path / "pool", workers)
    follower._look()
    follower._look()
    follower.close()
    assert workers.changes == [["tcp://10.0.0.1:1"]]


def test_who_names_liars_without_end_is_followed_no_more(tmp_path: Path) -> None:
    (tmp_path / "pool").write_bytes(directory.encode(of(Entry("tcp://10.0.0.1:1", A))))
    workers = FakeWorkers(lies=MAX_LIES + 1)
    follower = followed(tmp_path / "pool", workers)
    with pytest.raises(IntegrityError, match="not followed any more"):
        follower._look()
    follower.close()
    assert workers.changes == []


def test_a_directory_is_read_from_a_file(tmp_path: Path) -> None:
    written = of(Entry("tcp://10.0.0.1:1", A))
    (tmp_path / "pool.json").write_bytes(directory.encode(written))
    assert read(str(tmp_path / "pool.json")) == written


def test_a_file_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="No such file"):
        read(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="no regular file"):
        read("/dev/zero")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="no regular file"):
        read(str(tmp_path / "fifo"))
    (tmp_path / "large").write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(ProtocolError, match="more than"):
        read(str(tmp_path / "large"))


@pytest.mark.parametrize("source", ["https://10.0.0.1/directory", "ftp://10.0.0.1/", "http://", "http://host:port/"])
def test_another_kind_of_address_is_refused(source: str) -> None:
    with pytest.raises((ConfigError, TransportError), match="the directory"):
        read(source)


def test_a_directory_is_read_from_who_publishes_it() -> None:
    publisher = Publisher("127.0.0.1", 0)
    try:
        written = of(Entry("tcp://10.0.0.1:1", A))
        publisher.text = directory.encode(written)
        assert read(publisher.url) == written
        with pytest.raises(TransportError, match="HTTP 404"):
            read(publisher.url.removesuffix(PATH) + "/other")
    finally:
        publisher.close()
    with pytest.raises(TransportError, match="cannot be read"):
        read(publisher.url)


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Serve whatever a function sends to each who connects; yield the URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                link, _ = server.accept()
                with link:
                    answer(link)

        serving = threading.Thread(target=serve, daemon=True)
        serving.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/directory"
        serving.join(60)
        assert not serving.is_alive()


def endlessly(part: bytes, pause_s: float = 0.0) -> Callable[[socket.socket], None]:
    def answer(link: socket.socket) -> None:
        pause = threading.Event()
        link.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:  # until the other side is gone
            link.sendall(part)
            pause.wait(pause_s)

    return answer


def once(text: bytes) -> Callable[[socket.socket], None]:
    def answer(link: socket.socket) -> None:
        link.recv(1 << 16)
        link.sendall(text)

    return answer


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        endlessly(b"\r\n" + b" " * (1 << 16)),
        endlessly(b"x: y\r\n"),
        endlessly(b"x", pause_s=0.05),
        endlessly(b"\r\n", pause_s=0.05),
        once(b""),
        once(b"\xff" * 100),
        once(HEAD + b"{"),
        once(HEAD + b'{"version":1,"workers":[{"address":"shm:///dev/shm/a"}]}'),
        once(b"HTTP/1.1 302 Found\r\nlocation: file:///etc/passwd\r\n\r\n"),
        once(b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n{}"),
        once(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n"),
        once(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff\r\nx"),
        once(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\nx"),
    ],
)
def test_whatever_a_server_sends_ends_soon_with_an_error_of_ours(answer: Callable[[socket.socket], None]) -> None:
    with answering(answer) as url, pytest.raises((TransportError, ProtocolError), match="directory"):
        read(url, timeout_s=1.0)
