"""Workers that stand by are asked whether they could be used, before one of them is needed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

from tsqp.config import EnclaveConfig
from tsqp.enclave.connect import meet
from tsqp.enclave.session import Expected
from tsqp.enclave.waiting import Impatient
from tsqp.errors import TsqpError
from tsqp.levels import Model, expected_of, worker_peer
from tsqp.wire import messages

_log = logging.getLogger(__name__)

_CHECK_S = 5.0


class Health:
    """A thread that asks each worker on standby who it is and how much waits there, over a link of its own.

    Nothing that depends on a prompt or a secret is sent, and what comes is believed for order and display only: who is
    taken into use is met anew and checked.

    Args:
        model: what all serve.
        configs: the settings for each worker.
        standby: returns the numbers of those that are not in use and may be.
    """

    def __init__(self, model: Model, configs: Sequence[EnclaveConfig], standby: Callable[[], AbstractSet[int]]) -> None:
        self._model, self._configs, self._standby = model, configs, standby
        self._expected: Expected | None = None
        # How many requests wait there, by the number of each that answered last time; the others' reasons.
        self._waiting: dict[int, int] = {}
        self._reasons: dict[int, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tsqp-health", daemon=True)

    def start(self) -> None:
        """Ask from now on."""
        self._thread.start()

    @property
    def answering(self) -> frozenset[int]:
        """Which of those on standby answered as they should when they were asked last."""
        return frozenset(self._waiting.copy())

    def order(self, at: int) -> tuple[bool, int]:
        """Return what sorts workers: those that answer first, and the one first where least waits."""
        waiting = self._waiting.get(at)
        return waiting is None, waiting or 0

    def close(self) -> None:
        """Ask no more. What is being asked is given up soon."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while not self._over.is_set():
            standby = self._standby()
            for at in range(len(self._configs)):
                if self._over.is_set():
                    return
                if at in standby:
                    self._check(at)
                else:
                    self._waiting.pop(at, None)
                    self._reasons.pop(at, None)
            self._over.wait(_CHECK_S)

    def _check(self, at: int) -> None:
        try:
            waiting = self._ask(self._configs[at])
        except Exception as error:  # noqa: BLE001  a bug here must not end the asking
            self._waiting.pop(at, None)
            reason = str(error) if isinstance(error, TsqpError) else f"asking it failed ({type(error).__name__})."
            if self._reasons.get(at) != reason and not self._over.is_set():
                self._reasons[at] = reason
                _log.warning("worker %s stands by and cannot be used: %s", self._configs[at].worker, reason)
            return
        if at not in self._waiting:
            _log.info("worker %s stands by and can be used", self._configs[at].worker)
        self._reasons.pop(at, None)
        self._waiting[at] = waiting

    def _ask(self, config: EnclaveConfig) -> int:
        """Return how many requests wait at a worker, by its own account.

        Raises:
            TsqpError: it is not there, or does not serve this model at this level.
        """
        self._expected = self._expected or expected_of(self._model, config)
        peer = worker_peer(config, config.level, lambda link: Impatient(link, self._over.is_set))
        session, _ = meet(peer, config, self._expected)
        try:
            number = session.submit(lambda i: messages.Stats(id=i))
            reply, _ = session.result(number, messages.StatsResult, config.connect_timeout_s)
            return max(0, reply.waiting)
        finally:
            session.close()
