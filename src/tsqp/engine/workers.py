"""An engine's workers: all that can be used are, each with a level of its own, and a step is divided over them.

Nothing of one level is used by another. Where a link fails, a worker is away until it has been brought back, and the
others go on; after a lie it is out of use as long as this process lives.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from tsqp.config import EnclaveConfig
from tsqp.enclave.connect import Wrap
from tsqp.enclave.waiting import Impatient
from tsqp.engine import notices
from tsqp.engine.addresses import check_each, place, shared
from tsqp.engine.health import Health
from tsqp.engine.liars import Liars
from tsqp.engine.memory import MaskRoom
from tsqp.engine.replica import Replica, given_up
from tsqp.engine.scheduler import Segment
from tsqp.engine.steps import Outcome, step
from tsqp.errors import ConfigError, HostileError, InternalError, TransportError, TsqpError, bare
from tsqp.levels import Model
from tsqp.loaded import OnStep, Stepper
from tsqp.meter import Meter
from tsqp.model.llama import Rows

_log = logging.getLogger(__name__)

Revive = Callable[[Callable[[], bool]], None]


class Workers:
    """A model at its level, on all workers that can be used.

    One thread, the engine's, calls ``open``, ``settle``, ``compute``, ``blame``, ``look``, ``recover`` and ``close``.
    All else is for any thread. One worker alone is brought back by that thread too, several by ``Health``.

    Args:
        model: from ``levels.open_model``.
        configs: the settings for each worker, from ``one_each``.
        room: how large the mask pool of each of so many workers may be.
        rows_each: another worker is used for each so many rows of a step; see ``shares.divide``.
        on_notice: told in a sentence what the user should know.
        revive: starts the worker again where it is this process's own and has ended; see ``launch.OwnWorker``.

    Attributes:
        lies: how often a worker or a dealer sent what it must not.
        liars: who is out of use for good.
        given_up: set while nobody wants what is waited for: a worker that does not answer is given up soon then.
    """

    def __init__(
        self,
        model: Model,
        configs: Sequence[EnclaveConfig],
        room: Callable[[int], MaskRoom] = lambda _workers: MaskRoom(),
        rows_each: int = 1,
        on_notice: Callable[[str], None] = lambda _sentence: None,
        revive: Revive | None = None,
    ) -> None:
        self._model, self._room, self._rows_each, self._on_notice = model, room, rows_each, on_notice
        self._revive, self._revived = revive, place(configs[0])
        self._shared = shared(configs[0])
        self.lies = self._steps = 0
        self.given_up, self._closing = threading.Event(), threading.Event()
        # Guards what follows, and states of replicas.
        self._lock = threading.Lock()
        self.liars = Liars()
        self._replicas = [self._made(config) for config in configs]
        # Retired, and not closed yet.
        self._leaving: list[Replica] = []
        self._past = Meter()
        self._fitted = len(configs)
        self._told = ""
        self._health = Health(model, self._all, self._bring_back, self._sweep)

    @property
    def stepper(self) -> Stepper:
        """Computes steps on a worker in use; for measurements.

        Raises:
            InternalError: none is in use.
        """
        for replica in self._serving():
            return replica.stepper
        raise InternalError("no worker is in use.")

    @property
    def count(self) -> int:
        """How many workers were given; at the level `local` this process counts as one."""
        return len(self._replicas)

    def usable(self) -> int:
        """Return how many workers are in use."""
        return sum(replica.state in ("serving", "ready") for replica in self._all())

    def states(self) -> tuple[tuple[str, bool, int], ...]:
        """Return of each worker its name, whether it is in use, and how many rows it has computed."""
        return tuple((each.name, each.state in ("serving", "ready"), each.rows) for each in self._all())

    def pool(self) -> tuple[int, int]:
        """Return how many rows of mask products are held and wanted by all; none where nothing is masked, or open."""
        pools = [replica.pool() for replica in self._all()]
        return sum(held for held, _ in pools), sum(wanted for _, wanted in pools)

    def meter(self) -> Meter:
        """Return the costs of all openings so far."""
        with self._lock:
            total = self._past
            for replica in (*self._replicas, *self._leaving):
                total = total.plus(replica.meter())
            return total

    def change(self, configs: Sequence[EnclaveConfig]) -> None:
        """Use these workers from now on, and no others: new ones are opened while the engine runs.

        Those that are given no more have no share of the next step, and are closed once the one that runs is over;
        their requests go on with others. Who has lied stays out of use, whether it is given again or not.

        Args:
            configs: as in the beginning, with the same settings but for addresses and keys.

        Raises:
            TsqpError: they cannot be used, as ``addresses.check_each``, or the mask pools of so many do not fit. Then
                nothing has changed.
        """
        check_each(configs)
        if shared(configs[0]) != self._shared:
            raise ConfigError("an engine's workers cannot be replaced by others with other settings: start it anew.")
        self._room(len(configs))
        with self._lock:
            known = {replica.config: replica for replica in self._replicas}
            replicas = [known.get(config) or self._made(config) for config in configs]
            for replica in self._replicas:
                if replica not in replicas:
                    replica.retired = True
                    self._leaving.append(replica)
            self._replicas = replicas
        self._health.start()
        self._health.wake()

    def open(self, on_step: OnStep) -> None:
        """Use the first worker that can be used, and say why those before it cannot; others are opened meanwhile.

        Raises:
            TsqpError: none can; where there is one only, its own error.
        """
        replicas = self._all()
        room = self._room(len(replicas))
        for replica in replicas:
            try:
                replica.open(room, self._retries(replica), on_step, self._on_notice)
            except TsqpError as error:  # noqa: PERF203  one try for each worker
                if len(replicas) == 1:
                    raise
                self._refuse(replica, error)
            else:
                replica.serve()
                if any(each.error for each in replicas):
                    self._announce()
                if len(replicas) > 1:
                    self._health.start()
                return
        kinds = {type(replica.error) for replica in replicas if replica.error}
        raise notices.nobody(replicas, kinds.pop() if len(kinds) == 1 else TransportError)

    def settle(self) -> bool:
        """Between two steps: take into use who was brought back, and close who was retired.

        Returns:
            Whether there was any.
        """
        with self._lock:
            ready = [replica for replica in self._replicas if replica.state == "ready"]
            leaving = [replica for replica in self._leaving if replica.state in ("serving", "ready")]
            for replica in ready:
                replica.serve()
            for replica in leaving:
                replica.lose(TransportError("it was retired."))
            refit, self._fitted = self._fitted != len(self._replicas), len(self._replicas)
        for replica in leaving:
            replica.close()
        if refit:
            room = self._room(self.count)
            for replica in self._all():
                replica.fit(room)
        if ready or (leaving and self._serving()):
            self._announce()
        return bool(ready or leaving)

    def compute(self, segments: Sequence[Segment], rows: Callable[[Sequence[Segment]], Rows]) -> list[Outcome]:
        """Compute a step, divided over the workers in use; no mask pool is filled meanwhile.

        Args:
            segments: of the step.
            rows: makes a group's rows.

        Raises:
            InternalError: no worker is in use.
            HostileError: so it became, as dealers lied while the pools were filled.
        """
        error: TsqpError = InternalError("no worker is in use.")
        with ExitStack() as paused:
            for replica in self._serving():
                try:
                    paused.enter_context(replica.stepper.paused())
                except TsqpError as raised:  # noqa: PERF203  one try for each worker
                    error = raised
                    self.blame(replica, raised)
            replicas = self._serving()
            if not replicas:
                raise error
            self._steps += 1
            outcomes = step(replicas, segments, rows, self._rows_each, self._steps)
        for outcome in outcomes:
            if isinstance(outcome.result, TsqpError):
                self.blame(outcome.replica, outcome.result)
        return outcomes

    def look(self) -> None:
        """Look whether a step could be computed, while none is; who could not compute it is out of use then."""
        for replica in self._serving():
            try:
                self._look(replica)
            except InternalError as error:  # noqa: PERF203  what fills the pool has ended; another opening has another
                self._tell(str(error))
                replica.close()
                replica.lose(error)
                self._health.wake()
            except TsqpError as error:
                self.blame(replica, error)

    def _look(self, replica: Replica) -> None:
        replica.stepper.check()
        if not self._health.is_running:
            replica.stepper.look()
        elif silence := replica.silence:  # others need not wait until it is asked once more
            replica.stepper.lose()
            raise silence

    def blame(self, replica: Replica, error: TsqpError) -> None:
        """Take note that a share or a look failed. After a lie whoever may have told it is out of use, dealers too."""
        if isinstance(error, HostileError):
            self._distrust(replica, error)
        elif isinstance(error, TransportError):
            with self._lock:
                replica.lose(error)
            if self._health.is_running:
                if self._serving():
                    self._announce()
                self._health.wake()

    def nobody(self) -> TsqpError | None:
        """Return why nothing can be computed until ``recover``; None where something can."""
        if self._serving():
            return None
        if not self._usable():
            return self._gone()
        return notices.for_now(self._all())

    def recover(self, is_over: Callable[[], bool]) -> None:
        """Serve again, where nobody does.

        Args:
            is_over: tells, before and while a worker is opened, whether to give up.

        Raises:
            TransportError: no worker can be used now.
            HostileError: none can be used any more.
        """
        if self._health.is_running:
            self._health.wait_for_round(is_over)
        elif replicas := self._usable():
            self._bring_back(replicas[0], is_over)
        self.settle()
        if not self._serving():
            raise self._gone()

    def stop(self) -> None:
        """Wait for nobody any more."""
        self._closing.set()
        self.given_up.set()

    def close(self) -> None:
        """Close everything."""
        self.stop()
        self._health.close()
        for replica in (*self._all(), *self._leaving):
            replica.close()

    def _all(self) -> Sequence[Replica]:
        with self._lock:
            return tuple(self._replicas)

    def _serving(self) -> list[Replica]:
        return [replica for replica in self._all() if replica.state == "serving"]

    def _usable(self) -> list[Replica]:
        return [replica for replica in self._all() if replica.state != "lied"]

    def _made(self, config: EnclaveConfig) -> Replica:
        replica = Replica(self._model, config, self._impatient)
        replica.error = self.liars.why(config)
        if replica.error is not None:
            replica.state = "lied"
        return replica

    def _impatient(self, replica: Replica) -> Wrap:
        """Return what wraps a worker's link: of its step nobody may want the answer, or it is not to be opened."""

        def is_over() -> bool:
            nobody_waits = self.given_up.is_set() if replica.state == "serving" else replica.retired
            return self._closing.is_set() or nobody_waits

        return lambda link: Impatient(link, is_over)

    def _retries(self, replica: Replica) -> int:
        """Return how often a worker is sent a product again: never where another can compute the step instead."""
        return replica.config.retries if self.count == 1 else 0

    def _bring_back(self, replica: Replica, is_over: Callable[[], bool]) -> None:
        """Open a worker that is away, over a new link if that is all it lacks; else its ``error`` says why not."""
        try:
            stop = given_up(is_over)
            stop("", 0.0)
            if self._revive and place(replica.config) == self._revived:
                self._revive(is_over)
            if not replica.reopen():
                replica.open(self._room(self.count), self._retries(replica), stop)
        except Exception as error:  # noqa: BLE001  a bug there must not end the engine
            self._refuse(replica, error)
            return
        with self._lock:
            if replica.state == "away" and not replica.retired:
                replica.state = "ready"

    def _refuse(self, replica: Replica, error: Exception) -> None:
        """Take note why a worker that is away cannot be opened."""
        if not isinstance(error, TsqpError):
            # Only its type: a message may quote what was computed.
            _log.error("opening a worker failed (%s)", type(error).__name__)
            error = InternalError(f"opening it failed ({type(error).__name__}).")
        with self._lock:
            replica.error = bare(error)
            if isinstance(error, HostileError):
                self.lies += 1
                replica.state = "lied"
                self.liars.add(replica.config, error)
        if replica.state == "lied":
            replica.close()

    def _distrust(self, liar: Replica, error: TsqpError) -> None:
        # With dealers nobody knows who lied, and without them no worker can go on.
        together = [*self._all(), *self._leaving] if liar.config.dealers else [liar]
        with self._lock:
            self.lies += 1
            if liar.config.dealers:
                self.liars.add_everybody(error)
            ours = [replica for replica in together if replica is liar or replica.state != "away"]
            for replica in together:
                replica.distrust(error)
                self.liars.add(replica.config, error)
        for replica in ours:
            replica.close()
        if self._serving():
            self._announce()
        self._health.wake()

    def _sweep(self) -> None:
        """Close what was away when it was retired or not trusted any more, in the thread that would have opened it."""
        with self._lock:
            over = [replica for replica in self._leaving if replica.state in ("away", "lied")]
            self._leaving = [replica for replica in self._leaving if replica not in over]
            for replica in over:
                self._past = self._past.plus(replica.meter())
            over += [replica for replica in self._replicas if replica.state == "lied"]
        for replica in over:
            replica.close()

    def _gone(self) -> TsqpError:
        """Return the error for no worker at all, and tell the user, who hears of no error otherwise."""
        error = notices.nobody(self._all())
        self._tell(str(error))
        return error

    def _announce(self) -> None:
        self._tell(notices.serving(self._all()))

    def _tell(self, sentence: str) -> None:
        """Tell the user, once, until there is something else to tell."""
        if sentence != self._told:
            self._told = sentence
            self._on_notice(sentence)
