"""An engine that follows a directory, whoever writes it: files, and peers in this process behind real sockets."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from attacks.test_over_sockets import HostileServer
from hostile import HostilePeer
from sites import LIE, Running, Site, local_ids, until
from workers import free_port

from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine import directory as following
from tsqp.engine.api import Finished
from tsqp.engine.opening import open_engine
from tsqp.errors import ConfigError, HostileError, IntegrityError, PeerKeyError, TransportError
from tsqp.transport.keys import KeyPair, ephemeral
from tsqp.wire import directory
from tsqp.wire.directory import MAX_BYTES, MAX_PEERS, Directory, Entry

GARBAGE = (
    b"",
    b"{}",
    b"\xff" * 100,
    b" " * (4 * MAX_BYTES),
    b'{"version":1,"workers":[{"address":"shm:///dev/shm/tsqp-worker"}]}',
    b'{"version":1,"workers":[{"address":"ipc:///tmp/worker"}]}',
    b'{"version":1,"workers":[%s]}' % b",".join(b'{"address":"tcp://h:%d"}' % port for port in range(1, MAX_PEERS + 2)),
    b'{"version":1,"workers":[],"dealers":[]}',
)


class Pool:
    """A directory in a file, and what it may name: hostile peers that are honest until told otherwise."""

    def __init__(self, site: Site, path: Path, stack: ExitStack) -> None:
        self.site, self.path, self._stack = site, path, stack

    def host(self, key: KeyPair, serves: str = "exact") -> HostilePeer:
        peer = HostilePeer(f"tcp://127.0.0.1:{free_port()}", self.site.material.dispatcher(serves))  # type: ignore[arg-type]
        self._stack.callback(HostileServer(peer, peer.address, key).close)
        return peer

    def names(self, *workers: tuple[str, KeyPair], dealers: tuple[tuple[str, KeyPair], ...] = ()) -> None:
        entries = [tuple(Entry(where, key.public.decode()) for where, key in each) for each in (workers, dealers)]
        self.write(directory.encode(Directory(version=1, workers=entries[0], dealers=entries[1])))

    def write(self, text: bytes) -> None:
        new = self.path.with_suffix(".new")
        new.write_bytes(text)
        os.replace(new, self.path)  # noqa: PTH105  whole, or not at all

    def run(self, level: str, worker_keys: tuple[str, ...] = (), **settings: object) -> Running:
        given = {"connect_timeout_s": 1.0, "request_timeout_s": 30.0, **settings}
        engine = open_engine(
            self.site.model(level),
            EnclaveConfig(level=level, **given),  # type: ignore[arg-type]
            EngineConfig(directory=str(self.path), worker_keys=worker_keys, kv_memory=1 << 20),
        )
        return Running(self._stack.enter_context(engine), [])


@pytest.fixture
def pool(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(following, "LOOK_S", 0.1)
    return Pool(site, tmp_path / "pool.json", site._stack)


def finishes(run: Running) -> list[int]:
    answer = run.ask()
    assert isinstance(answer.end, Finished)
    return answer.ids


def settles_at(run: Running, workers: int) -> None:
    until(lambda: (run.engine.stats().workers, run.engine.stats().workers_usable) == (workers, workers))


def test_an_engine_follows_a_directory_and_nothing_that_is_none_changes_it(pool: Pool) -> None:
    keys = [ephemeral(), ephemeral()]
    first, second = map(pool.host, keys)
    pool.names((first.address, keys[0]))
    run = pool.run("masked")
    expected = local_ids(pool.site)
    assert finishes(run) == expected
    pool.names((first.address, keys[0]), (second.address, keys[1]))
    settles_at(run, 2)
    for text in GARBAGE:
        pool.write(text)
        assert finishes(run) == expected
    settles_at(run, 2)
    pool.path.unlink()
    assert finishes(run) == expected
    pool.names((second.address, keys[1]))
    settles_at(run, 1)
    seen = len(first.journal)
    assert finishes(run) == expected
    assert len(first.journal) == seen


def test_who_has_lied_is_not_used_again_though_the_directory_names_it_for_ever(pool: Pool) -> None:
    keys = [ephemeral(), ephemeral()]
    liar, honest = map(pool.host, keys)
    pool.names((liar.address, keys[0]))
    run = pool.run("masked")
    liar.tamper = LIE
    assert isinstance(run.fails(), IntegrityError)
    received = len(liar.journal)
    for workers in ([(honest.address, keys[1])], [(liar.address, keys[0]), (honest.address, keys[1])]):
        pool.names(*workers)
        run.until_ready()
        assert finishes(run) == local_ids(pool.site)
    # Not under another key either.
    pool.names((liar.address, keys[1]))
    assert finishes(run) == local_ids(pool.site)
    assert len(liar.journal) == received


def test_a_key_that_is_pinned_holds_whatever_the_directory_says(pool: Pool) -> None:
    """Who is said to hold it and does not gets nothing, and what its holder is used for goes on."""
    pinned, other = ephemeral(), ephemeral()
    holder, pretender = pool.host(pinned), pool.host(other)
    pool.names((pretender.address, other))
    with pytest.raises(TransportError, match="none that may be used"):
        pool.run("verified", (pinned.public.decode(),))
    pool.names((pretender.address, pinned))
    with pytest.raises(PeerKeyError):
        pool.run("verified", (pinned.public.decode(),))
    pool.names((holder.address, pinned))
    run = pool.run("verified", (pinned.public.decode(),))
    expected = finishes(run)
    pool.names((pretender.address, pinned), (holder.address, pinned))
    until(lambda: run.engine.stats().workers == 2)
    assert finishes(run) == expected
    assert pretender.journal == []


def test_a_dealer_is_who_holds_the_pinned_key_and_follows_to_its_new_address(pool: Pool) -> None:
    pinned, other, key = ephemeral(), ephemeral(), ephemeral()
    worker, dealer = pool.host(key), pool.host(pinned, "masks")
    false = pool.host(other, "masks")
    pins = {"dealer_keys": (pinned.public.decode(),)}
    pool.names((worker.address, key), dealers=((false.address, other),))
    with pytest.raises(TransportError, match="no dealer with the key"):
        pool.run("masked", **pins)
    pool.names((worker.address, key), dealers=((false.address, pinned),))
    with pytest.raises(HostileError):
        pool.run("masked", **pins)
    pool.names((worker.address, key), dealers=((false.address, other), (dealer.address, pinned)))
    run = pool.run("masked", **pins)
    expected = local_ids(pool.site)
    assert finishes(run) == expected
    moved = pool.host(pinned, "masks")
    pool.names((worker.address, key), dealers=((moved.address, pinned),))
    until(lambda: bool(moved.journal))
    until(lambda: run.engine.stats().ready)
    assert finishes(run) == expected
    assert false.journal == []


def test_after_a_lie_with_dealers_no_new_worker_is_used(pool: Pool) -> None:
    """The dealers may have told it, and the directory cannot make them be asked again."""
    pinned, *keys = (ephemeral() for _ in range(3))
    liar, fresh = map(pool.host, keys)
    dealer = pool.host(pinned, "masks")
    dealers = ((dealer.address, pinned),)
    pool.names((liar.address, keys[0]), dealers=dealers)
    run = pool.run("masked", dealer_keys=(pinned.public.decode(),))
    liar.tamper = LIE
    assert isinstance(run.fails(), IntegrityError)
    received = len(dealer.journal)
    pool.names((fresh.address, keys[1]), dealers=dealers)
    run.until_nobody_is_left()
    assert isinstance(run.fails(), HostileError)
    assert (fresh.journal, len(dealer.journal)) == ([], received)


@pytest.mark.parametrize("level", ["open", "verified"])
def test_without_pinned_keys_it_does_not_start_where_workers_read_prompts(pool: Pool, level: str) -> None:
    with pytest.raises(ConfigError, match="pin the workers' keys"):
        pool.run(level)
