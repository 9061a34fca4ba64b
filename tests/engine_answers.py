"""What comes of a request to an engine, gathered for a test."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from tsqp.engine.api import Event, Failed, Finished, Token
from tsqp.errors import TsqpError

_PATIENCE_S = 120


@dataclass
class Answer:
    """What came of one request; ``take`` is its listener, and ``number`` the engine's."""

    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    number: int = 0

    def take(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, (Finished, Failed)):
            self.ended.set()

    @property
    def ids(self) -> list[int]:
        return [event.id for event in self.events if isinstance(event, Token)]

    @property
    def end(self) -> Event:
        """Its last event, once that has come."""
        assert self.ended.wait(_PATIENCE_S)
        return self.events[-1]

    @property
    def error(self) -> TsqpError:
        assert isinstance(self.end, Failed)
        return self.end.error
