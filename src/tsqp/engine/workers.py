"""The level, opened on one of several workers, and on another when that one is lost or has lied.

Each opening is a level of its own: links, vectors of the checks, mask keys and pool are made anew, the codes are read
and compared with the manifest again, and what one opening had is closed before the next begins. After a lie a worker is
out of use as long as this process lives.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from tsqp.config import WORKER_LEVELS, EnclaveConfig, EngineConfig
from tsqp.enclave.waiting import Impatient
from tsqp.engine.health import Health
from tsqp.errors import ConfigError, HostileError, InternalError, TransportError, TransportTimeoutError, TsqpError, bare
from tsqp.levels import Model, check_peers, runnable
from tsqp.loaded import OnStep, Runnable, Stepper
from tsqp.meter import Meter
from tsqp.transport.base import ClientTransport
from tsqp.transport.urls import parse

_log = logging.getLogger(__name__)

Revive = Callable[[Callable[[], bool]], None]


def one_each(config: EnclaveConfig, engine: EngineConfig) -> tuple[EnclaveConfig, ...]:
    """Return the settings for each worker, in order; one without a worker where there is none.

    Raises:
        ConfigError: another number of keys than of workers, or one worker twice.
        TsqpError: an address, a key or a dealer cannot be used.
    """
    if config.level not in WORKER_LEVELS:
        return (config,)
    addresses = engine.workers or ((config.worker,) if config.worker else ())
    keys = engine.worker_keys or ((config.worker_key,) if config.worker_key else ())
    if keys and not addresses:
        raise ConfigError("a worker's key was given but no worker: give its address too (--worker).")
    if keys and len(keys) != len(addresses):
        raise ConfigError(
            f"{len(addresses)} workers and {len(keys)} worker keys: give one key for each, in order (--worker-key)."
        )
    if not addresses:
        return (config,)
    places = [parse(address).url for address in addresses]
    twice = next((address for at, address in enumerate(addresses) if places[at] in places[:at]), None)
    if twice is not None:
        raise ConfigError(f"the worker {twice} is given twice: once it had lied, it would be used again.")
    each = tuple(
        replace(config, worker=address, worker_key=key)
        for address, key in zip(addresses, keys or [None] * len(addresses), strict=True)
    )
    for settings in each:
        check_peers(config.level, settings)
    return each


class Workers:
    """A model at its level, on one worker at a time. Its attributes, ``meter`` and ``pool`` are for any thread.

    Args:
        model: from ``levels.open_model``.
        configs: the settings for each worker, from ``one_each``; the first that can be used is.
        head_rows: how many rows of the head the mask pool keeps, where there is one.
        on_notice: told in a sentence what the user should know.
        revive: starts the worker again where it is this process's own and has ended; see ``launch.OwnWorker``.

    Attributes:
        lies: how often a worker or a dealer sent what it must not.
        health: of those that stand by, where there are several.
        given_up: set while nobody wants what is waited for: a worker that does not answer is given up soon then.
    """

    def __init__(
        self,
        model: Model,
        configs: Sequence[EnclaveConfig],
        head_rows: int = 0,
        on_notice: Callable[[str], None] = lambda _sentence: None,
        revive: Revive | None = None,
    ) -> None:
        self._model, self._configs, self._head_rows, self._on_notice = model, configs, head_rows, on_notice
        self._revive = revive or (lambda _is_over: None)
        self.lies = 0
        self.given_up = threading.Event()
        self._level = ExitStack()
        self._loaded: Runnable | None = None
        self._past = Meter()
        # The worker that is used, or was last; and why each one was not used when it was tried last.
        self._at = 0
        self._refusals: dict[int, TsqpError] = {}
        self._told = ""
        self._lock = threading.Lock()
        self.health = Health(model, self._configs, self._standby)

    @property
    def stepper(self) -> Stepper:
        """Computes steps on the worker in use.

        Raises:
            ConfigError: the level cannot generate.
            InternalError: none is in use.
        """
        if self._loaded is None:
            raise InternalError("no worker is in use.")
        return _stepper(self._loaded, self._configs[self._at].level)

    @property
    def is_open(self) -> bool:
        """Whether a worker is in use."""
        return self._loaded is not None

    def watch(self) -> None:
        """Ask those that stand by from now on, if there are any."""
        if len(self._configs) > 1:
            self.health.start()

    @property
    def count(self) -> int:
        """How many workers were given; at the level `local` this process counts as one."""
        return len(self._configs)

    def usable(self) -> int:
        """Return how many workers can be used now, as far as is known: the one in use, and those that answer."""
        with self._lock:
            serves = self._loaded is not None and self._at not in self._refusals
        return serves + len(self.health.answering & self._standby())

    def pool(self) -> tuple[int, int]:
        """Return how many rows of mask products are held and wanted; none where nothing is masked, or open."""
        with self._lock:
            pool = self._loaded.stepper.pool if self._loaded and self._loaded.stepper else None
            return (pool.held, pool.wanted) if pool else (0, 0)

    def meter(self) -> Meter:
        """Return the costs of all openings so far."""
        with self._lock:
            return self._past.plus(self._loaded.meter) if self._loaded else replace(self._past)

    def open(self, on_step: OnStep) -> None:
        """Use the first worker that can be used, and say why those before it cannot.

        Raises:
            TsqpError: none can; where there is one only, its own error.
        """
        for at in self._in_turn(0):
            try:
                self._open(at, on_step, self._on_notice)
            except TsqpError as error:  # noqa: PERF203  one try for each worker
                if len(self._configs) == 1:
                    raise
                self._refuse(at, error)
            else:
                if self._refusals:
                    self._tell(f"serving with worker {self._name(at)}. {self._reasons()}")
                return
        kinds = {type(error) for error in self._refusals.values()}
        raise self._nobody(kinds.pop() if len(kinds) == 1 else TransportError)

    def look(self) -> None:
        """Look whether a step could be computed, while none is.

        Raises:
            TsqpError: it could not; to be given to ``blame``.
        """
        try:
            self.stepper.look()
        except InternalError as error:  # of what fills the pool, which has ended: another opening has another
            self._tell(str(error))
            self._refuse(self._at, error)
            self._close_level()
            raise

    def blame(self, error: TsqpError) -> TsqpError | None:
        """Take note that a step or a look failed. After a lie whoever may have told it is out of use, dealers too.

        Returns:
            Why nothing can be computed until ``recover``; None where the error was of that step alone.
        """
        if isinstance(error, HostileError):
            self.lies += 1
            # With dealers nobody knows who lied, and without them no worker can go on.
            together = range(len(self._configs)) if self._configs[self._at].dealers else (self._at,)
            self._refusals |= dict.fromkeys(together, bare(error))
        elif isinstance(error, TransportError):
            self._refusals[self._at] = bare(error)
        elif self.is_open:
            return None
        if not self._usable():
            return self._gone()
        return TransportError(f"no worker is in use for now; one is being opened. {self._reasons()}")

    def recover(self, is_over: Callable[[], bool]) -> bool:
        """Serve again: over a new link to the same worker, unless that one hangs, or on the next that can be used.

        Args:
            is_over: asked before each worker, and while one is opened, whether to give up.

        Returns:
            Whether the level was opened anew: then nothing that was computed before may be used again.

        Raises:
            TransportError: no worker can be used now.
            HostileError: none can be used any more.
        """
        first = self._at
        try:
            if self._reopened(is_over):
                return False
        except Exception as error:  # noqa: BLE001  a bug there must not end the engine
            self._refuse(self._at, error)
            if self._usable() == {self._at}:
                raise self._gone() from None
            first += 1
        self._close_level()

        def stop(_name: str = "", _done: float = 0.0) -> None:
            if is_over():
                raise TransportError("opening it was given up, as nobody waits for it any more.")

        for at in self._in_turn(first):
            try:
                stop()
                self._revive(is_over)
                self._open(at, stop)
            except Exception as error:  # noqa: BLE001, PERF203  as above; one try for each worker
                self._refuse(at, error)
            else:
                self._tell(f"serving with worker {self._name(at)} now. {self._reasons()}".strip())
                return True
        raise self._gone()

    def _reopened(self, is_over: Callable[[], bool]) -> bool:
        """Open the lost link to the worker in use, and tell whether that is all there was to do."""
        if self._loaded is None or self._at not in self._usable():
            return False
        lost = self._refusals.get(self._at)
        if isinstance(lost, TransportTimeoutError) and len(self._usable()) > 1:
            raise lost  # it had its time, and others need not wait for it once more
        self._revive(is_over)
        if not self.stepper.reopen():
            return False
        self._refusals.pop(self._at, None)
        self._tell(f"serving with worker {self._name(self._at)} again.")
        return True

    def close(self) -> None:
        """Close everything."""
        self.health.close()
        self._close_level()

    def _open(
        self,
        at: int,
        on_step: OnStep = lambda _name, _done: None,
        on_notice: Callable[[str], None] = lambda _sentence: None,
    ) -> None:
        config = self._configs[at]
        with ExitStack() as stack:
            loaded = stack.enter_context(
                runnable(
                    config.level,
                    self._model,
                    config,
                    wrap=lambda _peer: self._impatient,
                    on_step=on_step,
                    on_notice=on_notice,
                )
            )
            stepper = _stepper(loaded, config.level)
            if stepper.pool is not None:
                with stepper.paused():  # after which the pool is filled up to it
                    stepper.pool.keep_head(self._head_rows)
            self._level = stack.pop_all()
        with self._lock:
            self._loaded, self._at = loaded, at
        self._refusals.pop(at, None)

    def _impatient(self, link: ClientTransport) -> ClientTransport:
        return Impatient(link, self.given_up.is_set)

    def _close_level(self) -> None:
        try:
            self._level.close()
        finally:
            with self._lock:
                if self._loaded is not None:
                    self._past = self._past.plus(self._loaded.meter)
                    self._loaded = None

    def _in_turn(self, first: int) -> list[int]:
        """Return who may be tried: those that stand by and answer, the least loaded first, then others in order."""
        count = len(self._configs)
        usable = [at % count for at in range(first, first + count) if at % count in self._usable()]
        return sorted(usable, key=self.health.order)

    def _standby(self) -> set[int]:
        """Return who is not in use and may be."""
        with self._lock:
            return self._usable() - ({self._at} if self._loaded else set())

    def _usable(self) -> set[int]:
        return {at for at in range(len(self._configs)) if not isinstance(self._refusals.get(at), HostileError)}

    def _refuse(self, at: int, error: Exception) -> None:
        if not isinstance(error, TsqpError):
            # Only its type: a message may quote what was computed.
            _log.error("opening a worker failed (%s)", type(error).__name__)
            error = InternalError(f"opening it failed ({type(error).__name__}).")
        self.lies += isinstance(error, HostileError)
        self._refusals[at] = bare(error)

    def _nobody(self, kind: type[TsqpError] = TransportError) -> TsqpError:
        """Return the error for no worker at all: of a kind that may pass, or, where all have lied, of a lie."""
        usable = self._usable()
        sentence = f"no usable worker is left{', for now' if usable else ''}. {self._reasons()}"
        return (kind if usable else type(self._refusals[self._at]))(sentence)

    def _gone(self) -> TsqpError:
        """Return the same, and tell the user, who hears of no error otherwise."""
        error = self._nobody()
        self._tell(str(error))
        return error

    def _reasons(self) -> str:
        """Say of each worker that is not used why."""
        reasons: dict[str, list[str]] = {}
        for at, error in sorted(self._refusals.items()):
            reasons.setdefault(str(error), []).append(self._name(at))
        return " ".join(f"With worker {', '.join(names)}: {reason}" for reason, names in reasons.items())

    def _tell(self, sentence: str) -> None:
        """Tell the user, once, until there is something else to tell."""
        if sentence != self._told:
            self._told = sentence
            self._on_notice(sentence)

    def _name(self, at: int) -> str:
        return self._configs[at].worker or "of this process"


def _stepper(loaded: Runnable, level: str) -> Stepper:
    if loaded.stepper is None:
        raise ConfigError(f"the level {level} cannot generate: choose open, verified, masked or local.")
    return loaded.stepper
