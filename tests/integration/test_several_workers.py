"""An engine with several workers: one is lost, one lies, all are gone, one comes back; real processes and sockets."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from attacks.lies import LIES
from attacks.test_over_sockets import HostileServer
from engine_answers import Answer
from fake_engine import byte_tokenizer
from hostile import HostilePeer, Material, claiming, laid_out, on
from tiny_models import tiny_checkpoint
from workers import free_port, packed_tiny

from tsqp.arith import native
from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.enclave.mask_pool import pool_rows
from tsqp.engine.api import Finished, Generation, Sampling
from tsqp.engine.loop import GenerationEngine, open_engine
from tsqp.errors import HostileError, IntegrityError, TransportError
from tsqp.launch import local_worker
from tsqp.levels import Model
from tsqp.model.architecture import read_config
from tsqp.paths import private_socket_directory
from tsqp.transport.keys import ephemeral
from tsqp.wire import messages

PROMPT = tuple(range(2, 32))
LONG_PROMPT = tuple(range(2, 100)) * 2
TOKENS = 12
LIE = on("layers.1.down", claiming(LIES["a word off by 1"]))
_PATIENCE_S = 120


def until(holds: Callable[[], bool]) -> None:
    for _ in range(_PATIENCE_S * 20):
        if holds():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it did not come to be in time")


@dataclass
class Running:
    """An engine, and what it told its user."""

    engine: GenerationEngine
    notices: list[str]

    def ask(self, prompt: tuple[int, ...] = PROMPT, tokens: int = TOKENS) -> Answer:
        answer = Answer()
        self.engine.submit(
            Generation(
                prompt_ids=prompt,
                max_tokens=tokens,
                sampling=Sampling(temperature=0),
                ignore_end=True,
                owner="ada",
            ),
            answer.take,
        )
        return answer

    def until_ready(self) -> None:
        until(lambda: self.engine.stats().ready)

    def until_nobody_is_left(self, *words: str) -> str:
        """Wait for a reason that has these words, and return it."""
        until(lambda: all(word in self.engine.stats().reason for word in ("no usable worker", *words)))
        assert not self.engine.stats().ready
        return self.engine.stats().reason


class Site:
    """A model and places for its workers: processes that can be ended and started again, and peers that lie."""

    def __init__(self, material: Material, floats: Path, stack: ExitStack) -> None:
        self.material, self.floats = material, floats
        self._stack = stack
        self._directory = stack.enter_context(private_socket_directory())
        self._processes: dict[str, psutil.Process] = {}

    def start(self, level: str, address: str | None = None) -> str:
        """Start a worker process; return its address."""
        address = address or f"127.0.0.1:{free_port()}"
        directory = self.floats if level == "open" else self.material.directory
        words = ["--model", str(directory), "--device", "cpu", "--threads", "1", "--listen", address]
        before = set(psutil.Process().children())
        self._stack.enter_context(local_worker(words))
        (self._processes[address],) = set(psutil.Process().children()) - before
        return address

    def kill(self, address: str) -> None:
        self._processes[address].kill()
        self._processes[address].wait()

    def host(self, name: str = "liar") -> HostilePeer:
        """Serve a worker in this process, honest until told otherwise."""
        peer = HostilePeer(f"ipc://{self._directory}/{name}", self.material.dispatcher())
        self._stack.callback(HostileServer(peer, peer.address).close)
        return peer

    def run(self, level: str, *addresses: str, **settings: object) -> Running:
        given = {"connect_timeout_s": 1.0, "request_timeout_s": 30.0, **settings}
        notices: list[str] = []
        engine = open_engine(
            self.model(level),
            EnclaveConfig(level=level, **given),  # type: ignore[arg-type]
            EngineConfig(workers=addresses, kv_memory=1 << 20, reuse_prefixes="on"),
            on_notice=lambda sentence: None if sentence == native.notice() else notices.append(sentence),
        )
        return Running(self._stack.enter_context(engine), notices)

    def model(self, level: str) -> Model:
        if level == "open":
            return Model(self.floats, read_config(self.floats), byte_tokenizer(), None)
        packed = self.material.packed
        return Model(self.material.directory, packed.config, byte_tokenizer(), packed)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    floats = tiny_checkpoint(tmp_path_factory.mktemp("several") / "tiny")
    return floats, packed_tiny(floats, floats.parent / "packed")


@pytest.fixture
def site(directories: tuple[Path, Path]) -> Iterator[Site]:
    floats, packed = directories
    with ExitStack() as stack:
        yield Site(Material.read(packed), floats, stack)


def local_ids(site: Site, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    """What every packed level must generate."""
    run = site.run("local")
    answer = run.ask(prompt)
    assert isinstance(answer.end, Finished)
    return answer.ids


@pytest.mark.parametrize("level", ["open", "verified", "masked"])
def test_when_the_first_worker_is_lost_the_second_serves(site: Site, level: str) -> None:
    first, second = site.start(level), site.start(level)
    run = site.run(level, first, second)
    before = run.ask()
    assert isinstance(before.end, Finished)
    sent = run.engine.stats().bytes_sent
    asked = run.ask(tokens=400)
    until(lambda: len(asked.ids) > 2)
    site.kill(first)
    assert isinstance(asked.error, TransportError)
    assert first in str(asked.error)
    run.until_ready()
    after = run.ask()
    assert isinstance(after.end, Finished)
    assert after.ids == before.ids
    assert len(run.notices) == 1
    assert f"serving with worker {second} now" in run.notices[0]
    assert f"With worker {first}: " in run.notices[0]
    assert run.engine.stats().integrity_failures == 0
    assert run.engine.stats().bytes_sent > sent


@pytest.mark.parametrize("level", ["verified", "masked"])
def test_when_the_first_worker_lies_the_second_serves_and_the_liar_is_never_asked_again(site: Site, level: str) -> None:
    liar, second = site.host(), site.start(level)
    run = site.run(level, liar.address, second)
    honest = run.ask()
    assert isinstance(honest.end, Finished)
    liar.tamper = LIE
    asked = [run.ask(), run.ask()]
    for answer in asked:
        assert isinstance(answer.error, IntegrityError)
        assert liar.address in str(answer.error)
    assert run.engine.stats().integrity_failures == 1
    run.until_ready()
    received, links = len(liar.journal), liar.links
    liar.tamper = lambda exchange: [exchange.reply]
    again = run.ask()
    assert isinstance(again.end, Finished)
    assert again.ids == honest.ids == local_ids(site)
    site.kill(second)
    assert isinstance(run.ask().error, TransportError)
    reason = run.until_nobody_is_left("for now", "not the product asked for", second)
    assert f"With worker {liar.address}: linear layers.1.down" in reason
    with pytest.raises(TransportError, match="for now"):
        run.ask()
    assert (len(liar.journal), liar.links) == (received, links)
    assert run.engine.stats().integrity_failures == 1
    site.start(level, second)
    run.until_ready()
    assert run.ask().end == again.end
    assert (len(liar.journal), liar.links) == (received, links)


def test_nothing_secret_goes_from_a_worker_that_lied_to_the_next(site: Site) -> None:
    """Vectors of the checks, mask keys and pool are new, and the old ones are gone; so are prefixes."""
    liar = site.host()
    run = site.run("masked", liar.address, site.start("masked"))
    assert isinstance(run.ask(LONG_PROMPT).end, Finished)
    assert isinstance(run.ask(LONG_PROMPT).end, Finished)
    reused = run.engine.stats().reused_tokens
    assert reused == 128  # or what follows could not fail
    checks, key = secrets_of(run.engine)
    pool = weakref.ref(run.engine.stepper.pool)
    wanted = run.engine.stats().pool_wanted
    assert wanted == sum(pool_rows(site.material.groups, 256, 256).values())
    liar.tamper = LIE
    assert isinstance(run.ask().error, IntegrityError)
    run.until_ready()
    assert run.engine.stats().pool_wanted == wanted
    new_checks, new_key = secrets_of(run.engine)
    assert len(new_checks & checks) == 0
    assert new_key != key
    gc.collect()
    assert pool() is None
    assert isinstance(run.ask(LONG_PROMPT).end, Finished)
    assert run.engine.stats().reused_tokens == reused


def secrets_of(engine: GenerationEngine) -> tuple[set[bytes], bytes]:
    """The secret vectors of all checks, and the key of the enclave's masks."""
    products = engine.stepper.llama.ops._products  # type: ignore[attr-defined]
    vectors = {bytes(check._s._values_N.numpy()) for check in products._checkers.values()}
    return vectors, products._pool._source._key.seed()


def test_a_link_that_is_lost_and_opened_again_keeps_what_was_made(site: Site) -> None:
    """No lie: the same checks and masks go on, and only the link is new."""
    only = site.start("masked")
    run = site.run("masked", only)
    assert isinstance(run.ask(LONG_PROMPT).end, Finished)
    before = secrets_of(run.engine)
    site.kill(only)
    assert isinstance(run.ask().error, TransportError)
    run.until_nobody_is_left("for now", only)
    site.start("masked", only)
    run.until_ready()
    assert secrets_of(run.engine) == before
    assert isinstance(run.ask(LONG_PROMPT).end, Finished)
    assert run.engine.stats().reused_tokens == 128


def test_the_codes_of_each_worker_are_read_and_compared_with_the_manifest(site: Site) -> None:
    """A second worker with other codes is out of use before it has seen a product; a third one is used."""
    liar, other, third = site.host(), site.host("other"), site.host("third")
    codes = {name: codes_NK.clone() for name, codes_NK in site.material.codes.items()}
    codes["layers.1.o"][0, 0] ^= 1
    other.dispatcher.service._codes = laid_out(codes)  # type: ignore[attr-defined]
    run = site.run("masked", liar.address, other.address, third.address)
    assert not other.journal
    liar.tamper = LIE
    assert isinstance(run.ask().error, IntegrityError)
    run.until_ready()
    assert {type(sent.header) for sent in other.journal} == {messages.Hello, messages.Codes}
    asked_for = {sent.group for sent in third.journal if isinstance(sent.header, messages.Codes)}
    assert asked_for == set(site.material.codes)
    answer = run.ask()
    assert isinstance(answer.end, Finished)
    assert answer.ids == local_ids(site)
    assert run.engine.stats().integrity_failures == 2
    assert any("the codes of layers.1.o" in notice and other.address in notice for notice in run.notices)


def test_when_all_workers_have_lied_nothing_is_served_any_more(site: Site) -> None:
    liars = [site.host(), site.host("second")]
    run = site.run("verified", *(liar.address for liar in liars))
    for count, liar in enumerate(liars, 1):
        liar.tamper = LIE
        assert isinstance(run.ask().error, IntegrityError)
        assert run.engine.stats().integrity_failures == count
        if liar is liars[0]:
            run.until_ready()
    reason = run.until_nobody_is_left(*(liar.address for liar in liars))
    assert "for now" not in reason
    with pytest.raises(IntegrityError, match="no usable worker is left"):
        run.ask()


def test_a_wrong_product_with_dealers_stops_everything(site: Site) -> None:
    """Nobody knows whether worker or dealer lied, and no worker can go on without dealers."""
    liar, second = site.host(), site.host("second")
    key = ephemeral()
    dealer = HostilePeer(f"ipc://{site._directory}/dealer", site.material.dispatcher("masks"))
    site._stack.callback(HostileServer(dealer, dealer.address, key).close)
    run = site.run(
        "masked", liar.address, second.address, dealers=(dealer.address,), dealer_keys=(key.public.decode(),)
    )
    assert isinstance(run.ask().end, Finished)
    liar.tamper = LIE
    error = run.ask().error
    assert isinstance(error, IntegrityError)
    assert dealer.address in str(error)
    reason = run.until_nobody_is_left()
    assert f"With worker {liar.address}, {second.address}: " in reason
    received = len(dealer.journal)
    with pytest.raises(HostileError, match="no usable worker is left"):
        run.ask()
    assert not second.journal
    assert len(dealer.journal) == received


def test_a_dealer_that_was_lost_is_met_again_when_it_is_back(site: Site) -> None:
    worker = site.host("worker")
    key = ephemeral()
    dealer = HostilePeer(f"ipc://{site._directory}/dealer", site.material.dispatcher("masks"))
    server = HostileServer(dealer, dealer.address, key)
    run = site.run(
        "masked",
        worker.address,
        dealers=(dealer.address,),
        dealer_keys=(key.public.decode(),),
        mask_pool=0,
        request_timeout_s=2.0,
    )
    assert isinstance(run.ask().end, Finished)
    server.close()
    assert isinstance(run.ask().error, TransportError)
    run.until_nobody_is_left("for now", f"no TSQP dealer answered at {dealer.address}")
    site._stack.callback(HostileServer(dealer, dealer.address, key).close)
    run.until_ready()
    assert isinstance(run.ask().end, Finished)


@pytest.mark.parametrize("level", ["open", "masked"])
def test_when_all_are_gone_it_says_so_and_serves_again_when_one_is_back(site: Site, level: str) -> None:
    first, second = site.start(level), site.start(level)
    run = site.run(level, first, second)
    before = run.ask()
    assert isinstance(before.end, Finished)
    site.kill(second)
    site.kill(first)
    assert isinstance(run.ask().error, TransportError)
    reason = run.until_nobody_is_left("for now", f"worker {first}", f"worker {second}")
    with pytest.raises(TransportError, match="no usable worker is left"):
        run.ask()
    assert reason in run.notices
    assert run.notices.count(reason) == 1
    site.start(level, second)
    run.until_ready()
    after = run.ask()
    assert isinstance(after.end, Finished)
    assert after.ids == before.ids


@pytest.mark.parametrize("level", ["open", "verified"])
def test_a_worker_that_cannot_be_reached_does_not_prevent_the_start(site: Site, level: str) -> None:
    absent, present = f"127.0.0.1:{free_port()}", site.start(level)
    run = site.run(level, absent, present)
    assert run.notices[0].startswith(f"serving with worker {present}. With worker {absent}: no TSQP worker answered")
    assert isinstance(run.ask().end, Finished)


def test_without_any_worker_it_does_not_start_and_names_each(site: Site) -> None:
    absent = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    with pytest.raises(TransportError) as raised:
        site.run("masked", *absent)
    assert all(f"With worker {address}: no TSQP worker answered" in str(raised.value) for address in absent)


def test_an_engine_that_waits_for_a_worker_can_be_closed(site: Site) -> None:
    only = site.start("open")
    run = site.run("open", only)
    site.kill(only)
    assert isinstance(run.ask().error, TransportError)
    run.until_nobody_is_left()
    run.engine.close()
    assert not run.engine._thread.is_alive()
