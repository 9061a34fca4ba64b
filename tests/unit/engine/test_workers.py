"""Which worker is used when: with levels that a test opens and breaks, and no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import zmq

from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine import workers as module
from tsqp.engine.workers import Workers, one_each
from tsqp.errors import (
    AbsentPeerError,
    ConfigError,
    HostileError,
    InputError,
    IntegrityError,
    InternalError,
    ModelMismatchError,
    ProtocolError,
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
        reopening: what opening a lost link again does.
        events: what happened, in order.
        progress: called while one is being opened.
        looking: what looking does.
    """

    errors: dict[str, Exception] = field(default_factory=dict)
    reopening: Callable[[], bool] = lambda: True
    events: list[str] = field(default_factory=list)
    progress: Callable[[], None] = lambda: None
    looking: Callable[[], object] = lambda: None

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
        stepper = Stepper(cast("Llama", None), reopen=self._reopen, look=self._look)
        yield Runnable(cast("Any", None), Meter(bytes_sent=100), stepper=stepper)
        self.events.append(f"close {name}")

    def _reopen(self) -> bool:
        return self.reopening()

    def _look(self) -> None:
        self.looking()


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    places = Places()
    monkeypatch.setattr(module, "runnable", places.runnable)
    return places


def made(count: int, notices: list[str] | None = None, **settings: Any) -> Workers:
    """Make ``count`` workers, named a:1, b:1 and so on; none is open."""
    each = [EnclaveConfig(level="verified", worker=f"{letter}:1", **settings) for letter in "abcde"[:count]]
    return Workers(cast("Model", None), each, on_notice=(notices if notices is not None else []).append)


def opened(count: int, notices: list[str] | None = None, **settings: Any) -> Workers:
    workers = made(count, notices, **settings)
    workers.open(lambda _name, _done: None)
    return workers


def never() -> bool:
    return False


def failing(error: Exception) -> Callable[[], bool]:
    def fail() -> bool:
        raise error

    return fail


def test_the_first_that_can_be_used_is_and_the_user_hears_of_the_others(places: Places) -> None:
    places.errors = {"a:1": AbsentPeerError("nobody is at a."), "b:1": LIE}
    notices: list[str] = []
    workers = opened(3, notices)
    assert places.events == ["try a:1", "try b:1", "try c:1", "open c:1"]
    assert notices == ["serving with worker c:1. With worker a:1: nobody is at a. With worker b:1: a product is wrong."]
    assert workers.lies == 1


def test_one_worker_alone_fails_with_its_own_error(places: Places) -> None:
    error = ModelMismatchError("another model.")
    places.errors = {"a:1": error}
    with pytest.raises(ModelMismatchError) as raised:
        opened(1)
    assert raised.value is error


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


def test_a_lost_link_is_opened_again_before_another_worker_is_tried(places: Places) -> None:
    notices: list[str] = []
    workers = opened(2, notices)
    workers.blame(LOST)
    assert workers.recover(never) is False
    assert places.events == ["try a:1", "open a:1"]
    assert notices == ["serving with worker a:1 again."]
    assert workers._refusals == {}


def test_what_cannot_be_opened_again_is_closed_before_the_next_is_opened(places: Places) -> None:
    workers = opened(3)
    places.reopening = failing(LOST)
    places.errors = {"b:1": LOST}
    workers.blame(LOST)
    assert workers.recover(never) is True
    assert places.events == ["try a:1", "open a:1", "close a:1", "try b:1", "try c:1", "open c:1"]
    workers.blame(LOST)
    places.errors = {"a:1": LOST}
    assert workers.recover(never) is True
    assert places.events[6:] == ["close c:1", "try a:1", "try b:1", "open b:1"]
    workers.close()
    assert places.events[-1] == "close b:1"


def test_one_worker_alone_keeps_what_was_made_while_its_link_is_lost(places: Places) -> None:
    workers = opened(1)
    places.reopening = failing(AbsentPeerError("nobody is there."))
    for _ in range(3):
        with pytest.raises(TransportError, match=r"no usable worker is left, for now\. With worker a:1: nobody"):
            workers.recover(never)
        assert workers.is_open
    places.reopening = lambda: True
    assert workers.recover(never) is False
    assert places.events == ["try a:1", "open a:1"]


def test_where_the_link_was_not_lost_all_is_opened_anew(places: Places) -> None:
    """It was a dealer's, which belongs to the level and not to the link."""
    workers = opened(2)
    places.reopening = lambda: False
    workers.blame(LOST)
    assert workers.recover(never) is True
    assert places.events == ["try a:1", "open a:1", "close a:1", "try a:1", "open a:1"]


def test_who_lied_is_never_tried_again(places: Places) -> None:
    workers = opened(2)
    places.reopening = failing(AssertionError("the liar's link was opened again"))
    workers.blame(LIE)
    assert workers.recover(never) is True
    assert places.events == ["try a:1", "open a:1", "close a:1", "try b:1", "open b:1"]
    places.reopening = failing(LOST)
    places.errors = {"b:1": LOST}
    workers.blame(LOST)
    for _ in range(2):
        with pytest.raises(TransportError, match=r"for now\. With worker a:1: a product.* With worker b:1: the link"):
            workers.recover(never)
    assert "try a:1" not in places.events[5:]
    places.errors, places.reopening = {}, lambda: True
    workers.recover(never)
    workers.blame(ProtocolError("no message."))
    for _ in range(2):
        with pytest.raises(ProtocolError, match=r"no usable worker is left\. "):
            workers.recover(never)
    assert places.events[-1] == "close b:1"
    assert not workers.is_open
    assert workers.lies == 2


def test_a_lie_told_while_a_link_is_opened_again_counts_too(places: Places) -> None:
    workers = opened(2)
    places.reopening = failing(LIE)
    workers.blame(LOST)
    assert workers.recover(never) is True
    assert workers.lies == 1
    places.reopening = failing(LOST)
    places.errors = {"b:1": LOST}
    with pytest.raises(TransportError):
        workers.recover(never)
    assert places.events.count("try a:1") == 1


def test_with_dealers_a_lie_puts_all_out_of_use(places: Places) -> None:
    notices: list[str] = []
    workers = opened(3, notices, dealers=("d:1",))
    workers.blame(LIE)
    with pytest.raises(IntegrityError, match=r"With worker a:1, b:1, c:1: a product is wrong\."):
        workers.recover(never)
    assert places.events == ["try a:1", "open a:1", "close a:1"]
    assert len(notices) == 1


def test_it_says_the_same_only_once(places: Places) -> None:
    notices: list[str] = []
    workers = opened(2, notices)
    places.reopening = failing(LOST)
    places.errors = {"a:1": LOST, "b:1": LOST}
    for _ in range(3):
        with pytest.raises(TransportError):
            workers.recover(never)
    assert notices == ["no usable worker is left, for now. With worker a:1, b:1: the link is gone."]


def test_who_gives_up_tries_no_further_worker(places: Places) -> None:
    workers = opened(2)
    places.reopening = failing(LOST)
    with pytest.raises(TransportError):
        workers.recover(lambda: True)
    assert "try b:1" not in places.events


def test_who_gives_up_while_a_worker_is_opened_does_not_wait_for_the_rest(places: Places) -> None:
    workers = opened(2)
    workers.blame(LIE)
    over: list[bool] = []
    places.progress = lambda: over.append(True)
    with pytest.raises(TransportError, match="given up"):
        workers.recover(lambda: bool(over))
    assert places.events[2:] == ["close a:1", "try b:1"]


@pytest.mark.parametrize("lost", [LOST, LIE])
def test_a_worker_of_our_own_that_has_ended_is_started_before_it_is_used_again(places: Places, lost: TsqpError) -> None:
    """After a lie it never is."""
    config = EnclaveConfig(level="verified", worker="a:1")
    absent: list[TsqpError] = []

    def revive(is_over: Callable[[], bool]) -> None:
        places.events.append("revive")
        assert not is_over()
        for error in absent:
            raise error

    workers = Workers(cast("Model", None), [config], revive=revive)
    workers.open(lambda _name, _done: None)
    assert places.events == ["try a:1", "open a:1"]  # whoever made it has just started it
    workers.blame(lost)
    if lost is LIE:
        with pytest.raises(IntegrityError):
            workers.recover(never)
        assert places.events[2:] == ["close a:1"]
        return

    def reopening() -> bool:
        places.events.append("reopen")
        return True

    places.reopening = reopening
    assert workers.recover(never) is False
    absent.append(ConfigError("it does not start."))
    with pytest.raises(TransportError, match=r"for now\. With worker a:1: it does not start"):
        workers.recover(never)
    assert places.events[2:] == ["revive", "reopen", "revive"]
    absent.clear()
    places.reopening = lambda: False  # something else than the link was lost
    assert workers.recover(never) is True
    assert places.events[5:] == ["revive", "close a:1", "revive", "try a:1", "open a:1"]


def test_a_look_that_finds_a_bug_closes_all_and_the_same_worker_is_opened_anew(places: Places) -> None:
    notices: list[str] = []
    workers = opened(2, notices)
    workers.look()
    places.looking = failing(LOST)
    with pytest.raises(TransportError):
        workers.look()
    assert workers.is_open  # the link alone was lost
    places.looking = failing(InternalError("the pool cannot be filled."))
    with pytest.raises(InternalError) as raised:
        workers.look()
    told = workers.blame(raised.value)
    assert str(told) == "no worker is in use for now; one is being opened. With worker a:1: the pool cannot be filled."
    assert workers.recover(never) is True
    assert places.events == ["try a:1", "open a:1", "close a:1", "try a:1", "open a:1"]
    assert notices == ["the pool cannot be filled.", "serving with worker a:1 now."]


def test_a_bug_while_opening_is_an_error_of_that_worker_without_its_text(places: Places) -> None:
    workers = opened(2)
    places.reopening = failing(ValueError("words of a prompt"))
    places.errors = {"b:1": ValueError("words of a prompt"), "a:1": LOST}
    with pytest.raises(TransportError, match=r"With worker b:1: opening it failed \(ValueError\)") as raised:
        workers.recover(never)
    assert "words" not in str(raised.value)


@pytest.mark.usefixtures("places")
def test_who_asks_meanwhile_is_told_to_come_back_unless_all_have_lied() -> None:
    workers = opened(2)
    assert workers.blame(InputError("of one request.")) is None
    told = workers.blame(LIE)
    assert type(told) is TransportError
    assert str(told) == "no worker is in use for now; one is being opened. With worker a:1: a product is wrong."
    workers.recover(never)
    told = workers.blame(LIE)
    assert type(told) is IntegrityError
    assert str(told) == "no usable worker is left. With worker a:1, b:1: a product is wrong."


def test_a_bug_while_no_worker_is_in_use_does_not_pass_for_one_of_a_step(places: Places) -> None:
    workers = opened(2)
    places.reopening = failing(LOST)
    places.errors = {"b:1": LOST, "a:1": LOST}
    with pytest.raises(TransportError):
        workers.recover(never)
    assert isinstance(workers.blame(InternalError("a bug.")), TransportError)


def test_costs_are_those_of_all_openings(places: Places) -> None:
    workers = opened(2)
    workers.blame(LIE)
    assert workers.meter().bytes_sent == 100
    workers.recover(never)
    assert workers.meter().bytes_sent == 200
    workers.close()
    assert workers.meter().bytes_sent == 200
    assert places.events[-1] == "close b:1"


def test_errors_that_are_kept_hold_no_frames(places: Places) -> None:
    workers = opened(2)
    places.errors = {"b:1": LOST}
    places.reopening = failing(LOST)
    with pytest.raises(HostileError) as raised:
        failing(HostileError("a lie."))()
    workers.blame(raised.value)
    with pytest.raises(TransportError):
        workers.recover(never)
    assert len(workers._refusals) == 2
    assert all(error.__traceback__ is None for error in workers._refusals.values())


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

    monkeypatch.setattr(module, "runnable", baseline)
    with pytest.raises(ConfigError, match="the level verified cannot generate"):
        opened(1)
    assert places.events == []


def test_a_time_out_is_told_as_what_it_is(places: Places) -> None:
    workers = opened(2)
    places.reopening = failing(TransportTimeoutError("silence."))
    workers.blame(LOST)
    assert workers.recover(never) is True
    assert "With worker a:1: silence." in workers._told
