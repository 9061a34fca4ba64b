"""The generations of one HTTP request: submitted together, followed together, cancelled together."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial

from tsqp.engine.api import Engine, Event, Failed, Finished, Generation, Token
from tsqp.errors import TsqpError
from tsqp.serve.errors import ApiError
from tsqp.serve.metrics import Metrics

_log = logging.getLogger(__name__)


class Running:
    """Generations of one request. Made and used on the event loop.

    Args:
        engine: that continues them.
        metrics: told the times of tokens, and failures.
    """

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._lock = threading.Lock()
        self._ended = False
        self._numbers: dict[int, int] = {}
        self._told: dict[int, float] = {}
        self._started = 0.0

    async def submit(self, generations: Sequence[Generation]) -> None:
        """Queue all of them, or none.

        Raises:
            TsqpError: the engine takes no more.
        """
        self._started = time.monotonic()
        try:
            await asyncio.to_thread(self._submit, generations)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End those that still run."""
        with self._lock:
            self._ended = True
            numbers, self._numbers = self._numbers, {}
        for number in numbers.values():
            self._cancel(number)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield events of all, each with the place of its generation, until all have ended."""
        left = len(self._numbers)
        while left:
            place, event = await self._queue.get()
            if isinstance(event, (Finished, Failed)):
                left -= 1
                self._numbers.pop(place, None)
            elif isinstance(event, Token):
                self._measure(place)
            yield place, event

    def failed(self, error: ApiError) -> ApiError:
        """Count, log and return an error that ends the request: a stream's status, which was sent, does not tell."""
        code = error.code or error.kind
        self._metrics.failed.labels(code).inc()
        _log.warning("generations ended with the error %s", code)
        return error

    def _submit(self, generations: Sequence[Generation]) -> None:
        for place, generation in enumerate(generations):
            number = self._engine.submit(generation, partial(self._on_event, place))
            with self._lock:
                self._numbers[place] = number
                ended = self._ended
            if ended:  # the client went while this thread was at it
                self._cancel(number)
                return

    def _cancel(self, number: int) -> None:
        with suppress(TsqpError):
            self._engine.cancel(number)

    def _on_event(self, place: int, event: Event) -> None:
        """Hand an event over to the loop; called on the engine's thread."""
        with suppress(RuntimeError):  # the loop has ended, and with it whoever listened
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (place, event))

    def _measure(self, place: int) -> None:
        now = time.monotonic()
        if place in self._told:
            self._metrics.token_s.observe(now - self._told[place])
        else:
            self._metrics.first_token_s.observe(now - self._started)
        self._told[place] = now
