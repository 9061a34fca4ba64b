"""Which worker is used when: with levels that a test opens and breaks, and no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import zmq

from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine import replica as replica_module
from tsqp.engine import workers as module
from tsqp.engine.addresses import one_each
from tsqp.engine.health import Health
from tsqp.engine.memory import MaskRoom
from tsqp.engine.replica import Replica
from tsqp.engine.workers import Workers
from tsqp.errors import (
    AbsentPeerError,
    BusyError,
    ConfigError,
    HostileError,
    InputError,
    IntegrityError,
    InternalError,
    ModelMismatchError,
    ProtocolError,
    SetupError,
    TransportClosedError,
    TransportError,
    TransportTimeoutError,
    TsqpError,
)
from tsqp.levels import Model
from tsqp.loaded import OnStep, Runnable, Stepper
from tsqp.meter import Meter
from tsqp.model.llama import Llama

LOST = TransportClosedError("the link is gone.")
LIE = IntegrityError("a product is wrong.")
KEYS = [zmq.curve_keypair()[0].decode() for _ in range(2)]


@dataclass
class Places:
    """Stands for ``runnable``: addresses that can be opened, or raise.

    Attributes:
        errors: what opening raises, by address.
        silent: who does not answer when asked how it is.
        reopening: what opening a lost link again does.
        events: what happened, in order.
        retries: with how many each was opened, in order.
        progress: called while one is being opened.
        pool: told the sizes of a worker's mask pool.
        looking, checking: what looking at a worker and at what fills its pool does.
    """

    errors: dict[str, Exception] = field(default_factory=dict)
    silent: dict[str, Exception] = field(default_factory=dict)
    reopening: Callable[[], bool] = lambda: True
    events: list[str] = field(default_factory=list)
    retries: list[int] = field(default_factory=list)
    progress: Callable[[], None] = lambda: None
    pool: Callable[..., object] = lambda *_room: None
    looking: Callable[[], object] = lambda: None
    checking: Callable[[], object] = lambda: None

    @contextmanager
    def runnable(
        self, _level: str, _model: Model, config: EnclaveConfig, *, on_step: OnStep, **_options: object
    ) -> Iterator[Runnable]:
        name = str(config.worker)
        self.events.append(f"try {name}")
        self.progress()
        on_step("reading the codes", 0.5)
        if error := self.errors.get(name):
            raise error
        self.events.append(f"open {name}")
        self.retries.append(config.retries)
        stepper = Stepper(
            cast("Llama", None),
            reopen=lambda: bool(self.reopening()),
            lose=lambda: self.events.append(f"lose {name}"),
            look=lambda: cast("None", self.looking()),
            check=lambda: cast("None", self.checking()),
            pool=cast("Any", SimpleNamespace(resize=lambda *room: self.pool(name, *room))),
        )
        yield Runnable(cast("Any", None), Meter(bytes_sent=100), stepper=stepper)
        self.events.append(f"close {name}")


class Rounds(Health):
    """Asks and opens when it is waited for, in the thread that waits."""

    runs = False
    places: Places

    @property
    def is_running(self) -> bool:
        return self.runs

    def start(self) -> None:
        self.runs = True

    def wake(self) -> None:
        """Do nothing before it is waited for."""

    def wait_for_round(self, is_over: Callable[[], bool]) -> None:
        if not is_over():
            self._round()

    def close(self) -> None:
        """There is no thread."""

    def _ask(self, config: EnclaveConfig) -> int:
        if error := self.places.silent.get(str(config.worker)):
            raise error
        return 0


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    places = Places()
    monkeypatch.setattr(replica_module, "runnable", places.runnable)
    monkeypatch.setattr(module, "Health", type("These", (Rounds,), {"places": places}))
    return places


def configs(letters: str, **settings: Any) -> list[EnclaveConfig]:
    return [EnclaveConfig(level="verified", worker=f"{letter}:1", insecure="on", **settings) for letter in letters]


def made(count: int, notices: list[str] | None = None, **settings: Any) -> Workers:
    """Make ``count`` workers, named a:1, b:1 and so on; none is open."""
    told = notices if notices is not None else []
    return Workers(cast("Model", None), configs("abcde"[:count], **settings), on_notice=told.append)


def opened(count: int, notices: list[str] | None = None, **settings: Any) -> Workers:
    """Open all that can be."""
    workers = made(count, notices, **settings)
    workers.open(lambda _name, _done: None)
    if count > 1:
        meanwhile(workers)
    return workers


def meanwhile(workers: Workers) -> None:
    """Let a round of asking and opening be over, and a step begin."""
    workers._health.wait_for_round(never)
    workers.settle()


def of(workers: Workers, letter: str) -> Replica:
    return of_place(workers, f"{letter}:1")


def of_place(workers: Workers, name: str) -> Replica:
    (found,) = (replica for replica in workers._replicas if replica.name == name)
    return found


def serving(workers: Workers) -> str:
    return "".join(replica.name[0] for replica in workers._serving())


def never() -> bool:
    return False


def failing(error: Exception) -> Callable[[], bool]:
    def fail() -> bool:
        raise error

    return fail


def test_all_that_can_be_used_are_and_the_user_hears_of_the_others(places: Places) -> None:
    places.errors = {"a:1": AbsentPeerError("nobody is at a."), "b:1": LIE}
    notices: list[str] = []
    workers = made(4, notices)
    workers.open(lambda _name, _done: None)
    assert serving(workers) == "c"  # which is enough to begin
    assert notices == ["serving with worker c:1. With worker a:1: nobody is at a. With worker b:1: a product is wrong."]
    meanwhile(workers)
    assert serving(workers) == "cd"
    assert notices[1].startswith("serving with workers c:1, d:1. With worker a:1: ")
    assert places.events.count("try b:1") == 1  # it has lied
    assert workers.lies == 1
    assert (workers.count, workers.usable()) == (4, 2)
    assert workers.states()[1:3] == (("b:1", False, 0), ("c:1", True, 0))


def test_one_worker_alone_is_asked_by_nobody_and_fails_with_its_own_error(places: Places) -> None:
    workers = opened(1, retries=2)
    assert not workers._health.is_running
    assert places.retries == [2]
    error = ModelMismatchError("another model.")
    places.errors = {"a:1": error}
    with pytest.raises(ModelMismatchError) as raised:
        opened(1)
    assert raised.value is error


def test_where_another_can_compute_a_step_no_product_is_sent_again(places: Places) -> None:
    opened(2, retries=2)
    assert places.retries == [0, 0]


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        ([LOST, ModelMismatchError("another model.")], TransportError),
        ([ModelMismatchError("another model."), ModelMismatchError("yet another.")], ModelMismatchError),
        ([LIE, ProtocolError("no message.")], IntegrityError),
    ],
)
def test_where_none_can_be_used_the_error_names_each(places: Places, errors: list[Exception], kind: type) -> None:
    places.errors = dict(zip(("a:1", "b:1"), errors, strict=True))
    notices: list[str] = []
    with pytest.raises(TsqpError) as raised:
        opened(2, notices)
    assert notices == []  # whoever opens shows the error
    assert type(raised.value) is kind
    assert f"With worker a:1: {errors[0]}" in str(raised.value)
    assert f"With worker b:1: {errors[1]}" in str(raised.value)


def test_who_is_lost_is_away_until_it_answers_and_keeps_what_was_made_for_it(places: Places) -> None:
    notices: list[str] = []
    workers = opened(2, notices)
    workers.blame(of(workers, "a"), LOST)
    assert workers.nobody() is None
    assert serving(workers) == "b"
    places.silent = {"a:1": AbsentPeerError("nobody is at a.")}
    meanwhile(workers)
    assert serving(workers) == "b"
    places.silent = {}
    meanwhile(workers)
    assert serving(workers) == "ab"
    assert places.events == ["try a:1", "open a:1", "try b:1", "open b:1"]
    assert notices == [
        "serving with workers a:1, b:1.",
        "serving with worker b:1. With worker a:1: the link is gone.",
        "serving with workers a:1, b:1.",
    ]


def test_what_cannot_be_opened_again_is_opened_anew_and_closed_before(places: Places) -> None:
    workers = opened(2)
    places.reopening = lambda: False  # it was a dealer's link, which belongs to the level
    workers.blame(of(workers, "a"), LOST)
    places.errors = {"a:1": LOST}
    meanwhile(workers)
    places.errors = {}
    meanwhile(workers)
    assert places.events[4:] == ["close a:1", "try a:1", "try a:1", "open a:1"]
    assert serving(workers) == "ab"
    workers.close()
    assert sorted(places.events[-2:]) == ["close a:1", "close b:1"]


def test_one_worker_alone_keeps_what_was_made_while_its_link_is_lost(places: Places) -> None:
    notices: list[str] = []
    workers = opened(1, notices)
    workers.blame(of(workers, "a"), LOST)
    places.reopening = failing(AbsentPeerError("nobody is there."))
    for _ in range(3):
        with pytest.raises(TransportError, match=r"no usable worker is left, for now\. With worker a:1: nobody"):
            workers.recover(never)
    places.reopening = lambda: True
    workers.recover(never)
    assert serving(workers) == "a"
    assert places.events == ["try a:1", "open a:1"]
    assert notices[1:] == ["serving with worker a:1."]


def test_where_the_link_was_not_lost_all_is_opened_anew(places: Places) -> None:
    workers = opened(1)
    places.reopening = lambda: False
    workers.blame(of(workers, "a"), LOST)
    workers.recover(never)
    assert places.events == ["try a:1", "open a:1", "close a:1", "try a:1", "open a:1"]


def test_who_lied_is_closed_at_once_and_never_tried_again(places: Places) -> None:
    notices: list[str] = []
    workers = opened(2, notices)
    places.reopening = failing(AssertionError("the liar's link was opened again"))
    workers.blame(of(workers, "a"), LIE)
    assert places.events[4:] == ["close a:1"]
    assert notices[-1] == "serving with worker b:1. With worker a:1: a product is wrong."
    meanwhile(workers)
    assert serving(workers) == "b"
    places.reopening = failing(LOST)
    workers.blame(of(workers, "b"), LOST)
    for _ in range(2):
        with pytest.raises(TransportError, match=r"for now\. With worker a:1: a product.* With worker b:1: the link"):
            workers.recover(never)
    places.reopening = lambda: True
    workers.recover(never)
    workers.blame(of(workers, "b"), ProtocolError("no message."))
    for _ in range(2):
        with pytest.raises(IntegrityError, match=r"no usable worker is left\. "):
            workers.recover(never)
    assert places.events[4:] == ["close a:1", "close b:1"]
    assert workers.lies == 2


def test_a_lie_told_while_a_link_is_opened_again_counts_too(places: Places) -> None:
    workers = opened(2)
    places.reopening = failing(LIE)
    workers.blame(of(workers, "a"), LOST)
    meanwhile(workers)
    meanwhile(workers)
    assert workers.lies == 1
    assert serving(workers) == "b"
    assert places.events[4:] == ["close a:1"]


def test_with_dealers_a_lie_puts_all_out_of_use(places: Places) -> None:
    notices: list[str] = []
    workers = opened(3, notices, dealers=("d:1",))
    workers.blame(of(workers, "b"), LIE)
    with pytest.raises(IntegrityError, match=r"With worker a:1, b:1, c:1: a product is wrong\."):
        workers.recover(never)
    assert sorted(places.events[6:]) == ["close a:1", "close b:1", "close c:1"]
    assert len(notices) == 2


def test_with_dealers_who_is_away_is_not_brought_back_after_a_lie(places: Places) -> None:
    workers = opened(2, dealers=("d:1",))
    workers.blame(of(workers, "a"), LOST)
    places.reopening = failing(AssertionError("it was opened"))
    workers.blame(of(workers, "b"), LIE)
    meanwhile(workers)
    assert sorted(places.events[4:]) == ["close a:1", "close b:1"]


def test_a_lie_told_while_another_is_opened_is_not_forgotten(places: Places) -> None:
    """With dealers it may have been theirs, so that who is ready a moment later is not used."""
    workers = opened(2, dealers=("d:1",))
    workers.blame(of(workers, "a"), LOST)
    places.reopening = lambda: False
    places.progress = lambda: workers.blame(of(workers, "b"), LIE)
    meanwhile(workers)
    assert serving(workers) == ""
    meanwhile(workers)
    assert places.events[-1] == "close a:1"


def test_it_says_the_same_only_once(places: Places) -> None:
    notices: list[str] = []
    workers = opened(1, notices)
    places.reopening = failing(LOST)
    workers.blame(of(workers, "a"), LOST)
    for _ in range(3):
        with pytest.raises(TransportError):
            workers.recover(never)
    assert notices == ["no usable worker is left, for now. With worker a:1: the link is gone."]


@pytest.mark.parametrize("count", [1, 2])
def test_who_gives_up_tries_nothing(places: Places, count: int) -> None:
    workers = opened(count)
    places.reopening = failing(AssertionError("the link was opened"))
    for replica in workers._serving():
        workers.blame(replica, LOST)
    with pytest.raises(TransportError):
        workers.recover(lambda: True)
    assert len(places.events) == 2 * count


def test_who_gives_up_while_a_worker_is_opened_does_not_wait_for_the_rest(places: Places) -> None:
    workers = opened(1)
    places.reopening = lambda: False
    workers.blame(of(workers, "a"), LOST)
    over: list[bool] = []
    places.progress = lambda: over.append(True)
    with pytest.raises(TransportError, match="given up"):
        workers.recover(lambda: bool(over))
    assert places.events[2:] == ["close a:1", "try a:1"]


@pytest.mark.parametrize("lost", [LOST, LIE])
def test_a_worker_of_our_own_that_has_ended_is_started_before_it_is_used_again(places: Places, lost: TsqpError) -> None:
    """After a lie it never is."""
    absent: list[TsqpError] = []

    def revive(is_over: Callable[[], bool]) -> None:
        places.events.append("revive")
        assert not is_over()
        for error in absent:
            raise error

    workers = Workers(cast("Model", None), configs("a"), revive=revive)
    workers.open(lambda _name, _done: None)
    assert places.events == ["try a:1", "open a:1"]  # whoever made it has just started it
    workers.blame(of(workers, "a"), lost)
    if lost is LIE:
        with pytest.raises(IntegrityError):
            workers.recover(never)
        assert places.events[2:] == ["close a:1"]
        return

    def reopening() -> bool:
        places.events.append("reopen")
        return True

    places.reopening = reopening
    workers.recover(never)
    workers.blame(of(workers, "a"), lost)
    absent.append(ConfigError("it does not start."))
    with pytest.raises(TransportError, match=r"for now\. With worker a:1: it does not start"):
        workers.recover(never)
    assert places.events[2:] == ["revive", "reopen", "revive"]
    absent.clear()
    places.reopening = lambda: False  # something else than the link was lost
    workers.recover(never)
    assert places.events[5:] == ["revive", "close a:1", "try a:1", "open a:1"]


def test_a_look_that_finds_a_bug_closes_all_and_the_same_worker_is_opened_anew(places: Places) -> None:
    notices: list[str] = []
    workers = opened(1, notices)
    workers.look()
    assert workers.nobody() is None
    places.checking = failing(InternalError("the pool cannot be filled."))
    workers.look()
    told = workers.nobody()
    assert str(told) == "no worker is in use for now; one is being opened. With worker a:1: the pool cannot be filled."
    workers.recover(never)
    assert places.events == ["try a:1", "open a:1", "close a:1", "try a:1", "open a:1"]
    assert notices == ["the pool cannot be filled.", "serving with worker a:1."]


def test_a_look_at_one_worker_alone_asks_it(places: Places) -> None:
    workers = opened(1)
    places.looking = failing(LOST)
    workers.look()
    assert serving(workers) == ""
    assert isinstance(workers.nobody(), TransportError)


def test_a_look_at_several_waits_for_none_and_loses_who_did_not_answer(places: Places) -> None:
    workers = opened(2)
    places.looking = failing(AssertionError("it was waited for"))
    workers.look()
    assert serving(workers) == "ab"
    places.silent = {"a:1": HostileError("no message.")}
    meanwhile(workers)
    assert serving(workers) == "ab"  # a step may be under way
    workers.look()
    assert serving(workers) == "b"
    assert places.events[4:] == ["lose a:1"]
    assert workers.lies == 0  # it was no lie in anything that was used
    places.silent = {}
    meanwhile(workers)
    assert serving(workers) == "ab"


@pytest.mark.parametrize(
    "error", [BusyError("it has 1 client, as many as it takes."), SetupError("all seats are taken.")]
)
def test_who_has_no_room_to_be_asked_is_used_on(places: Places, error: TsqpError) -> None:
    workers = opened(2)
    places.silent = {"a:1": error}
    meanwhile(workers)
    workers.look()
    assert serving(workers) == "ab"
    assert of(workers, "a").waiting is None  # so that others come first
    workers.blame(of(workers, "a"), LOST)
    meanwhile(workers)
    assert serving(workers) == "b"


def test_a_bug_while_opening_is_an_error_of_that_worker_without_its_text(places: Places) -> None:
    workers = opened(1)
    places.reopening = failing(ValueError("words of a prompt"))
    workers.blame(of(workers, "a"), LOST)
    with pytest.raises(TransportError, match=r"With worker a:1: opening it failed \(ValueError\)") as raised:
        workers.recover(never)
    assert "words" not in str(raised.value)


@pytest.mark.usefixtures("places")
def test_who_asks_meanwhile_is_told_to_come_back_unless_all_have_lied() -> None:
    workers = opened(2)
    workers.blame(of(workers, "a"), InputError("of one request."))
    workers.blame(of(workers, "a"), LIE)
    assert workers.nobody() is None
    workers.blame(of(workers, "b"), LOST)
    told = workers.nobody()
    assert type(told) is TransportError
    assert str(told).startswith(
        "no worker is in use for now; one is being opened. With worker a:1: a product is wrong."
    )
    workers.recover(never)
    workers.blame(of(workers, "b"), LIE)
    told = workers.nobody()
    assert type(told) is IntegrityError
    assert str(told) == "no usable worker is left. With worker a:1, b:1: a product is wrong."


def test_costs_are_those_of_all_openings(places: Places) -> None:
    workers = opened(2)
    assert workers.meter().bytes_sent == 200
    workers.blame(of(workers, "a"), LIE)
    assert workers.meter().bytes_sent == 200
    places.reopening = lambda: False
    workers.blame(of(workers, "b"), LOST)
    assert workers.meter().bytes_sent == 200
    workers.recover(never)
    assert workers.meter().bytes_sent == 300
    workers.close()
    assert workers.meter().bytes_sent == 300


def test_errors_that_are_kept_hold_no_frames(places: Places) -> None:
    workers = opened(2)
    places.reopening = failing(LOST)
    with pytest.raises(HostileError) as raised:
        failing(HostileError("a lie."))()
    workers.blame(of(workers, "a"), raised.value)
    with pytest.raises(TransportError) as lost:
        failing(TransportError("lost."))()
    workers.blame(of(workers, "b"), lost.value)
    errors = [replica.error for replica in workers._replicas]
    assert all(error is not None and error.__traceback__ is None for error in errors)


def test_workers_are_added_and_retired_between_steps(places: Places) -> None:
    notices: list[str] = []
    workers = opened(1, notices)
    workers.change(configs("ab"))
    assert serving(workers) == "a"
    meanwhile(workers)
    assert serving(workers) == "ab"
    workers.change(configs("bc"))
    assert "close a:1" not in places.events  # its step may be under way
    assert serving(workers) == "b"
    meanwhile(workers)
    assert serving(workers) == "bc"
    assert workers.count == 2
    assert places.events.count("close a:1") == 1
    assert notices[-1] == "serving with workers b:1, c:1."
    workers.change(configs("a"))
    assert workers.settle()
    assert serving(workers) == ""
    assert isinstance(workers.nobody(), TransportError)
    workers.recover(never)
    assert serving(workers) == "a"
    assert workers.meter().bytes_sent == 400
    assert workers._leaving == []


def test_mask_pools_are_of_the_size_for_so_many(places: Places) -> None:
    sizes: list[tuple[str, tuple[int, ...]]] = []

    def room(workers: int) -> MaskRoom:
        return MaskRoom(12 // workers, 6 // workers, 120 // workers, 110 // workers)

    workers = Workers(cast("Model", None), configs("a"), room)
    places.pool = lambda name, *given: sizes.append((name, given))
    workers.open(lambda _name, _done: None)
    assert sizes == [("a:1", (12, 6, 120))]
    workers.change(configs("ab"))
    workers.settle()
    assert sizes[1:] == [("a:1", (6, 3, 60))]  # before another has one
    meanwhile(workers)
    assert sizes[2:] == [("b:1", (6, 3, 60))]
    workers.change(configs("b"))
    workers.settle()
    assert sizes[3:] == [("b:1", (12, 6, 120))]


def test_who_is_retired_while_it_is_away_or_being_opened_is_not_used(places: Places) -> None:
    workers = opened(2)
    workers.blame(of(workers, "a"), LOST)
    places.reopening = failing(AssertionError("it was opened again"))
    workers.change(configs("bc"))
    places.progress = lambda: workers.change(configs("b"))
    meanwhile(workers)
    assert serving(workers) == "b"
    places.progress = lambda: None
    meanwhile(workers)
    assert sorted(places.events[4:]) == ["close a:1", "try c:1"]


def test_who_lied_stays_out_of_use_when_it_is_given_again(places: Places) -> None:
    workers = opened(2)
    workers.blame(of(workers, "a"), LIE)
    workers.change(configs("b"))
    meanwhile(workers)
    workers.change([*configs("b"), EnclaveConfig(level="verified", worker="tcp://a:1", insecure="on")])
    meanwhile(workers)
    assert serving(workers) == "b"
    assert places.events.count("try a:1") == 1
    assert str(of_place(workers, "tcp://a:1").error) == "a product is wrong."


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "needs at least one"),
        (configs("aa"), "given twice"),
        ([EnclaveConfig(level="open", worker="a:1", insecure="on")], "other settings"),
        ([*configs("b"), *configs("c", retries=7)], "must have the same settings"),
        (configs("bcd"), "no room for three"),
    ],
)
def test_workers_that_cannot_be_used_change_nothing(given: list[EnclaveConfig], message: str) -> None:
    def room(workers: int) -> MaskRoom:
        if workers > 2:
            raise ConfigError("no room for three")
        return MaskRoom()

    workers = Workers(cast("Model", None), configs("a"), room)
    workers.open(lambda _name, _done: None)
    with pytest.raises(ConfigError, match=message):
        workers.change(given)
    workers.settle()
    assert serving(workers) == "a"
    assert workers.count == 1


def each(config: EnclaveConfig | None = None, **settings: Any) -> list[tuple[str | None, str | None]]:
    made = one_each(config or EnclaveConfig(level="verified", insecure="on"), EngineConfig(**settings))
    return [(one.worker, one.worker_key) for one in made]


def test_each_worker_has_its_key_in_order() -> None:
    assert each(workers=("a:1", "b:1")) == [("a:1", None), ("b:1", None)]
    assert each(workers=("a:1", "b:1"), worker_keys=tuple(KEYS)) == [("a:1", KEYS[0]), ("b:1", KEYS[1])]
    one = EnclaveConfig(level="open", worker="a:1", worker_key=KEYS[0])
    assert each(one) == [("a:1", KEYS[0])]
    assert each(one, workers=("b:1",)) == [("b:1", KEYS[0])]
    assert each(one, worker_keys=(KEYS[1],)) == [("a:1", KEYS[1])]
    assert each(EnclaveConfig(level="masked")) == [(None, None)]
    assert each(EnclaveConfig(level="local", worker="a:1"), workers=("b:1", "b:1")) == [("a:1", None)]


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({}, {"workers": ("a:1", "b:1"), "worker_keys": (KEYS[0],)}, "2 workers and 1 worker keys: give one key"),
        ({"worker_key": KEYS[0]}, {"workers": ("a:1", "b:1")}, "2 workers and 1 worker keys"),
        ({}, {"workers": ("a:1",), "worker_keys": tuple(KEYS)}, "1 workers and 2 worker keys"),
        ({}, {"worker_keys": (KEYS[0],)}, "a worker's key was given but no worker"),
        ({"worker_key": KEYS[0]}, {}, "a worker's key was given but no worker"),
        ({}, {"workers": ("a:1", "tcp://a:1")}, "the worker tcp://a:1 is given twice"),
        ({}, {"workers": ("localhost:1", "127.0.0.1:1")}, "127.0.0.1:1 is given twice"),
        ({}, {"workers": ("a:1", "nowhere")}, "endpoint 'nowhere'"),
        ({}, {"workers": ("a:1", "b:1"), "worker_keys": (KEYS[0], "no-key")}, "key file"),
        ({"level": "masked", "dealers": ("ipc:///d",)}, {"workers": ("a:1", "ipc:///d")}, "same address as the worker"),
    ],
)
def test_workers_that_cannot_work_are_refused_before_anything_is_opened(
    config: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TsqpError, match=message):
        each(EnclaveConfig(**{"level": "verified", "insecure": "on", **config}), **settings)


def test_a_key_file_of_a_later_worker_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(TsqpError, match="cannot read the key file"):
        each(workers=("a:1", "b:1"), worker_keys=(KEYS[0], str(tmp_path / "absent.key")))


def test_a_level_that_cannot_generate_is_refused(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def baseline(*_arguments: object, **_options: object) -> Iterator[Runnable]:
        yield Runnable(cast("Any", None), Meter())

    monkeypatch.setattr(replica_module, "runnable", baseline)
    with pytest.raises(ConfigError, match="the level verified cannot generate"):
        opened(1)
    assert places.events == []


def test_a_time_out_is_told_as_what_it_is(places: Places) -> None:
    notices: list[str] = []
    workers = opened(1, notices)
    places.reopening = failing(TransportTimeoutError("silence."))
    workers.blame(of(workers, "a"), LOST)
    with pytest.raises(TransportError):
        workers.recover(never)
    assert "With worker a:1: silence." in notices[-1]
