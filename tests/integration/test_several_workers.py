"""An engine with several workers: one is lost, one lies, all are gone, one is back; real processes and sockets."""

from __future__ import annotations

import gc
import weakref

import pytest
from attacks.test_over_sockets import HostileServer
from hostile import HostilePeer, laid_out
from sites import LIE, LONG_PROMPT, Site, local_ids, secrets_of, until
from workers import free_port

from tsqp.enclave.mask_pool import pool_rows
from tsqp.engine.api import Failed, Finished
from tsqp.errors import HostileError, IntegrityError, TransportError
from tsqp.transport.keys import ephemeral
from tsqp.wire import messages

HOW = {"killed": Site.kill, "stopped": Site.terminate, "hanging": Site.stop}


@pytest.mark.parametrize(
    ("level", "how"), [("open", "killed"), ("masked", "killed"), ("masked", "stopped"), ("masked", "hanging")]
)
def test_when_a_worker_is_lost_running_requests_go_on_with_the_others(site: Site, level: str, how: str) -> None:
    first, second = site.start(level), site.start(level)
    run = site.run(level, first, second, request_timeout_s=3.0)
    run.until_in_use(2)
    undisturbed = [run.ask(tokens=300), run.ask(LONG_PROMPT, tokens=300)]
    assert all(isinstance(answer.end, Finished) for answer in undisturbed)
    asked = [run.ask(tokens=300), run.ask(LONG_PROMPT, tokens=300)]
    until(lambda: all(len(answer.ids) > 2 for answer in asked))
    HOW[how](site, first)
    assert [answer.end for answer in asked] == [answer.end for answer in undisturbed]
    assert [answer.ids for answer in asked] == [answer.ids for answer in undisturbed]
    assert run.notices[0] == f"serving with workers {first}, {second}."
    assert run.notices[1].startswith(f"serving with worker {second}. With worker {first}: ")
    assert run.engine.stats().integrity_failures == 0
    assert run.engine.stats().ready
    if how == "hanging":
        site.resume(first)
        run.until_in_use(2)
        again = run.ask(), run.ask(LONG_PROMPT)
        assert all(isinstance(answer.end, Finished) for answer in again)


@pytest.mark.parametrize("level", ["verified", "masked"])
def test_a_lie_ends_who_used_the_liar_and_nobody_else_and_it_is_never_asked_again(site: Site, level: str) -> None:
    liar, second = site.host(), site.start(level)
    run = site.run(level, liar.address, second)
    run.until_in_use(2)
    honest = run.ask()
    assert isinstance(honest.end, Finished)
    asked = [run.ask(tokens=400), run.ask(tokens=400)]
    until(lambda: all(len(answer.ids) > 2 for answer in asked))
    liar.tamper = LIE
    ends = [answer.end for answer in asked]
    ((lied, other),) = [
        (one, two) for one, two in (ends, ends[::-1]) if isinstance(one, Failed) and isinstance(two, Finished)
    ]
    assert isinstance(lied.error, IntegrityError)
    assert liar.address in str(lied.error)
    assert other.completion_tokens == 400
    ids = [answer.ids for answer in asked]
    assert max(ids, key=len)[: min(map(len, ids))] == min(ids, key=len)
    assert run.engine.stats().integrity_failures == 1
    assert (run.engine.stats().ready, run.engine.stats().workers_usable) == (True, 1)
    received, links = len(liar.journal), liar.links
    liar.tamper = lambda exchange: [exchange.reply]
    again = run.ask()
    assert isinstance(again.end, Finished)
    assert again.ids == honest.ids == local_ids(site)
    site.kill(second)
    assert isinstance(run.fails(), TransportError)
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
    run.until_in_use(2)
    assert isinstance(run.ask(LONG_PROMPT).end, Finished)
    assert isinstance(run.ask(LONG_PROMPT).end, Finished)
    reused = run.engine.stats().reused_tokens
    assert reused == 128  # or what follows could not fail
    checks, key = secrets_of(run.engine)
    pool = weakref.ref(run.engine.stepper.pool)
    wanted = sum(pool_rows(site.material.groups, 256, 256).values())
    assert run.engine.stats().pool_wanted == 2 * wanted
    liar.tamper = LIE
    assert isinstance(run.ask().error, IntegrityError)
    assert run.engine.stats().pool_wanted == wanted
    new_checks, new_key = secrets_of(run.engine)
    assert len(new_checks & checks) == 0
    assert new_key != key
    gc.collect()
    assert pool() is None
    assert isinstance(run.ask(LONG_PROMPT).end, Finished)
    assert run.engine.stats().reused_tokens == reused


def test_a_link_that_is_lost_and_opened_again_keeps_what_was_made(site: Site) -> None:
    """No lie: the same checks and masks go on, and only the link is new."""
    only = site.start("masked")
    run = site.run("masked", only)
    assert isinstance(run.ask(LONG_PROMPT).end, Finished)
    before = secrets_of(run.engine)
    site.kill(only)
    assert isinstance(run.fails(), TransportError)
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
    run.until_in_use(2)
    assert run.engine.stats().integrity_failures == 1
    assert {type(sent.header) for sent in other.journal} - {messages.Stats} == {messages.Hello, messages.Codes}
    asked_for = {sent.group for sent in third.journal if isinstance(sent.header, messages.Codes)}
    assert asked_for == set(site.material.codes)
    liar.tamper = LIE
    assert isinstance(run.ask().error, IntegrityError)
    answer = run.ask()
    assert isinstance(answer.end, Finished)
    assert answer.ids == local_ids(site)
    assert run.engine.stats().integrity_failures == 2
    assert any("the codes of layers.1.o" in notice and other.address in notice for notice in run.notices)


def test_when_all_workers_have_lied_nothing_is_served_any_more(site: Site) -> None:
    liars = [site.host(), site.host("second")]
    run = site.run("verified", *(liar.address for liar in liars))
    run.until_in_use(2)
    for count, liar in enumerate(liars, 1):
        liar.tamper = LIE
        assert isinstance(run.ask().error, IntegrityError)
        assert run.engine.stats().integrity_failures == count
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
    run.until_in_use(2)
    assert isinstance(run.ask().end, Finished)
    liar.tamper = LIE
    error = run.ask().error
    assert isinstance(error, IntegrityError)
    assert dealer.address in str(error)
    reason = run.until_nobody_is_left()
    assert f"With worker {liar.address}, {second.address}: " in reason
    received, products = len(dealer.journal), len(second.journal)
    with pytest.raises(HostileError, match="no usable worker is left"):
        run.ask()
    assert (len(dealer.journal), len(second.journal)) == (received, products)


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
    assert isinstance(run.fails(), TransportError)
    run.until_nobody_is_left("for now", f"no TSQP dealer answered at {dealer.address}")
    site._stack.callback(HostileServer(dealer, dealer.address, key).close)
    run.until_ready()
    assert isinstance(run.ask().end, Finished)


@pytest.mark.parametrize("level", ["open", "masked"])
def test_when_all_are_gone_it_says_so_and_serves_again_when_one_is_back(site: Site, level: str) -> None:
    first, second = site.start(level), site.start(level)
    run = site.run(level, first, second)
    run.until_in_use(2)
    before = run.ask()
    assert isinstance(before.end, Finished)
    site.kill(second)
    site.kill(first)
    assert isinstance(run.fails(), TransportError)
    reason = run.until_nobody_is_left("for now", f"worker {first}", f"worker {second}")
    with pytest.raises(TransportError, match="no usable worker is left"):
        run.ask()
    assert reason in run.notices
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
    assert isinstance(run.fails(), TransportError)
    run.until_nobody_is_left()
    run.engine.close()
    assert not run.engine._thread.is_alive()
