"""Who has lied to an engine, and is out of use as long as its process lives."""

from __future__ import annotations

from tsqp.config import EnclaveConfig
from tsqp.engine.addresses import place
from tsqp.errors import PeerKeyError, TsqpError, bare


class Liars:
    """Remembers places and keys. Whoever has one guards it."""

    def __init__(self) -> None:
        self._lies: dict[str, TsqpError] = {}
        self._everybody: TsqpError | None = None

    def add(self, config: EnclaveConfig, error: TsqpError) -> None:
        """Take note of a lie by the worker of these settings.

        Who does not hold the key that it was said to hold is known by its place: the key's holder did nothing.
        """
        names = {place(config)}
        if config.worker_key and not isinstance(error, PeerKeyError):
            names.add(config.worker_key)
        self._lies |= dict.fromkeys(names, bare(error))

    def add_everybody(self, error: TsqpError) -> None:
        """Take note that dealers may have lied: no worker can go on without them, whichever it is."""
        self._everybody = self._everybody or bare(error)

    def why(self, config: EnclaveConfig) -> TsqpError | None:
        """Return why a worker is out of use for good; None where it is not."""
        lies = (self._lies.get(place(config)), self._lies.get(config.worker_key or ""))
        return self._everybody or next((error for error in lies if error), None)
