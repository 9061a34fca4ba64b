"""A thread that asks an engine's workers how they are, and brings back those that are not in use, while others work."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch

from tsqp.config import EnclaveConfig
from tsqp.enclave.connect import meet
from tsqp.enclave.session import Expected
from tsqp.enclave.waiting import Impatient
from tsqp.engine.replica import Replica
from tsqp.errors import AbsentPeerError, BusyError, HostileError, TransportError, TsqpError
from tsqp.levels import Model, expected_of, worker_peer
from tsqp.wire import messages

_log = logging.getLogger(__name__)

_CHECK_S = 5.0
# Of these errors a worker's work suffers too; others, such as that it takes no more clients, are of being asked alone.
_SILENT = (TransportError, AbsentPeerError, HostileError)
_POLL_S = 0.1


class Health:
    """Asks each worker who it is and how much waits there, over a link of its own; where there is one only, does not.

    Nothing that depends on a prompt or a secret is sent, and what comes is believed for order and display only: who is
    taken into use is met anew and checked. One worker is opened at a time.

    Args:
        model: what all serve.
        replicas: returns the workers.
        bring_back: makes one that is away ready for use, or says why not; given a function that tells whether to stop.
        sweep: closes what nobody will use again.
    """

    def __init__(
        self,
        model: Model,
        replicas: Callable[[], Sequence[Replica]],
        bring_back: Callable[[Replica, Callable[[], bool]], None],
        sweep: Callable[[], None],
    ) -> None:
        self._model, self._replicas, self._bring_back, self._sweep = model, replicas, bring_back, sweep
        self._expected: Expected | None = None
        # Why each one did not answer, as it was logged last.
        self._told: WeakKeyDictionary[Replica, str] = WeakKeyDictionary()
        self._threads = torch.get_num_threads()
        self._changed = threading.Condition()
        # How many rounds have begun and ended, and whether the next one is not to be waited for.
        self._begun = self._ended = 0
        self._woken = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tsqp-health", daemon=True)

    @property
    def is_running(self) -> bool:
        """Whether workers are asked, and brought back without the engine's doing."""
        return self._thread.ident is not None

    def start(self) -> None:
        """Ask from now on. May be called again."""
        if not self.is_running:
            self._thread.start()

    def wake(self) -> None:
        """Ask now."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def wait_for_round(self, is_over: Callable[[], bool]) -> None:
        """Wait until all have been asked from now on, or one is ready for use, or it is over."""
        self.wake()
        with self._changed:
            last = self._begun + 1
            while not (self._ended >= last or self._over.is_set() or is_over()):
                if any(replica.state == "ready" for replica in self._replicas()):
                    return
                self._changed.wait(_POLL_S)

    def close(self) -> None:
        """Ask no more. What is being asked or opened is given up soon."""
        self._over.set()
        self.wake()
        if self.is_running:
            self._thread.join()

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        while not self._over.is_set():
            with self._changed:
                self._begun += 1
                self._woken = False
            try:
                self._round()
            except Exception as error:  # noqa: BLE001  a bug here must not end the asking
                _log.error("asking workers failed (%s)", type(error).__name__)
            with self._changed:
                self._ended = self._begun
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._woken or self._over.is_set(), _CHECK_S)

    def _round(self) -> None:
        self._sweep()
        for replica in sorted(self._replicas(), key=Replica.order):
            if self._over.is_set():
                return
            if replica.state == "lied" or replica.retired:
                continue
            if self._answers(replica) and replica.state == "away":
                self._bring_back(replica, lambda replica=replica: self._over.is_set() or replica.retired)  # type: ignore[misc]

    def _answers(self, replica: Replica) -> bool:
        try:
            waiting = self._ask(replica.config)
        except Exception as error:  # noqa: BLE001  a bug here must not end the asking
            reason = str(error) if isinstance(error, TsqpError) else f"asking it failed ({type(error).__name__})."
            # Whatever came, it is no lie in anything that was used.
            told = TransportError(reason)
            suffers = isinstance(error, _SILENT) and not isinstance(error, BusyError)
            replica.waiting, replica.silence = None, told if suffers else None
            if replica.state == "away":
                replica.error = told
            if self._told.get(replica) != reason and not self._over.is_set():
                self._told[replica] = reason
                _log.warning("worker %s does not say how it is: %s", replica.name, reason)
            return False
        if replica.waiting is None:
            _log.info("worker %s answers", replica.name)
            self._told.pop(replica, None)
        replica.waiting, replica.silence = waiting, None
        return True

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
