"""One of an engine's workers: the level that is opened on it, who may use that, and what it has cost.

Each opening is a level of its own: link, vectors of the checks, mask keys and pool are made anew, and the codes are
read and compared with the manifest again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

from tsqp.config import EnclaveConfig
from tsqp.enclave.connect import Wrap
from tsqp.engine.memory import MaskRoom
from tsqp.errors import ConfigError, InternalError, TransportError, TsqpError, bare
from tsqp.levels import Model, runnable
from tsqp.loaded import OnStep, Runnable, Stepper
from tsqp.meter import Meter

# Away: not in use, and whoever brings workers back has it. Ready: opened, and not touched until the engine takes it
# into use between two steps. Serving: the engine's. Lied: closed, and never opened again.
State = Literal["away", "ready", "serving", "lied"]


def nothing(_name: str, _done: float) -> None:
    """Report no progress."""


class Replica:
    """A worker, and the level that is opened on it.

    Args:
        model: what it serves.
        config: its settings.
        wrap: applied to its link.

    Attributes:
        config: as given.
        state: who may use it; see ``State``. ``Workers`` changes it.
        retired: it is to be closed, and not to be brought back.
        error: why it is not in use.
        silence: why it did not answer when it was asked last, beside its work.
        waiting: how many requests wait there, by its own account; None before it has answered.
        last_step: the number of the last step that it had a share of.
        rows: how many it has computed.
    """

    def __init__(self, model: Model, config: EnclaveConfig, wrap: Callable[[Replica], Wrap]) -> None:
        self._model, self.config = model, config
        self._wrap = wrap(self)
        self.state: State = "away"
        self.retired = False
        self.error: TsqpError | None = None
        self.silence: TsqpError | None = None
        self.waiting: int | None = None
        self.last_step = self.rows = 0
        self._lock = threading.Lock()
        self._level = ExitStack()
        self._loaded: Runnable | None = None
        self._past = self._told = Meter()

    @property
    def name(self) -> str:
        """Its address, for messages."""
        return self.config.worker or "of this process"

    @property
    def is_open(self) -> bool:
        """Whether there is a level, perhaps with a link that was lost."""
        return self._loaded is not None

    @property
    def stepper(self) -> Stepper:
        """Computes steps.

        Raises:
            ConfigError: the level cannot generate.
            InternalError: it is not open.
        """
        if self._loaded is None:
            raise InternalError(f"worker {self.name} is not open.")
        return _stepper(self._loaded, self.config.level)

    def order(self) -> tuple[bool, int, int]:
        """Return what sorts workers: those that answer, the least loaded, and who has had nothing to do longest."""
        return self.waiting is None, self.waiting or 0, self.last_step

    def open(
        self,
        room: MaskRoom,
        retries: int,
        on_step: OnStep = nothing,
        on_notice: Callable[[str], None] = lambda _sentence: None,
    ) -> None:
        """Open the level; what was open before is closed first.

        Args:
            room: for its mask pool, where there is one.
            retries: how often a product is sent again.
            on_step: told the fraction done of a named step; may raise, to give up.
            on_notice: told in a sentence what the user should know.

        Raises:
            TsqpError: it cannot be opened.
        """
        self.close()
        config = self.config
        if config.level == "masked":
            config = replace(config, mask_pool=room.rows, mask_memory=room.limit_bytes)
        config = replace(config, retries=retries)
        with ExitStack() as stack:
            loaded = stack.enter_context(
                runnable(
                    config.level,
                    self._model,
                    config,
                    wrap=lambda _peer: self._wrap,
                    on_step=on_step,
                    on_notice=on_notice,
                )
            )
            stepper = _stepper(loaded, config.level)
            with stepper.paused():  # after which the pool is filled up to its new size
                _fit(stepper, room)
            self._level = stack.pop_all()
        self._loaded = loaded

    def reopen(self) -> bool:
        """Open the link that was lost; all that was made for it stays, as no lie was told. Return whether it was lost.

        Raises:
            TsqpError: it cannot be opened.
        """
        return self._loaded is not None and self.stepper.reopen()

    def lose(self, error: TsqpError) -> None:
        """Take it out of use; the level stays, for when it comes back."""
        self._told = replace(self.meter())
        self.error, self.state = bare(error), "away"

    def distrust(self, error: TsqpError) -> None:
        """Take it out of use for ever; what was made for it is to be thrown away, by ``close``."""
        self.lose(error)
        self.state = "lied"

    def serve(self) -> None:
        """Take it into use."""
        self.error, self.state = None, "serving"

    def fit(self, room: MaskRoom) -> None:
        """Let its mask pool be of this size, where there is one."""
        if loaded := self._loaded:
            _fit(_stepper(loaded, self.config.level), room)

    def pool(self) -> tuple[int, int]:
        """Return how many rows of mask products are held and wanted; none where nothing is masked, or open."""
        loaded = self._loaded
        pool = loaded.stepper.pool if loaded and loaded.stepper else None
        return (pool.held, pool.wanted) if pool else (0, 0)

    def meter(self) -> Meter:
        """Return the costs of all openings, as of when it was in use last: what bringing it back costs is no step's."""
        if self.state != "serving":
            return self._told
        loaded = self._loaded
        return self._past.plus(loaded.meter) if loaded else self._past

    def close(self) -> None:
        """Close the level; the worker can be opened again. May be called twice, also at the same time."""
        with self._lock:
            try:
                self._level.close()
            finally:
                if self._loaded is not None:
                    self._past = self._past.plus(self._loaded.meter)
                    self._loaded = None


def _stepper(loaded: Runnable, level: str) -> Stepper:
    if loaded.stepper is None:
        raise ConfigError(f"the level {level} cannot generate: choose open, verified, masked or local.")
    return loaded.stepper


def _fit(stepper: Stepper, room: MaskRoom) -> None:
    if stepper.pool is not None:
        stepper.pool.resize(room.rows, room.head_rows, room.limit_bytes)


def given_up(is_over: Callable[[], bool]) -> OnStep:
    """Return what opening reports to: it raises once it is over."""

    def stop(_name: str, _done: float) -> None:
        if is_over():
            raise TransportError("opening it was given up, as nobody waits for it any more.")

    return stop
