"""Requests that a busy worker refused: when the same bytes are sent again."""

from __future__ import annotations

import time
from dataclasses import dataclass

_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.5


@dataclass(slots=True)
class _Refusal:
    """One request's: what the worker said last, how long to wait, and until when; None once it is sent again."""

    sentence: str
    pause_s: float
    due: float | None


class Refusals:
    """All of a session's. Each request waits twice as long as the last time before it is sent again, at most 0.5 s."""

    def __init__(self) -> None:
        self._refusals: dict[int, _Refusal] = {}

    def __bool__(self) -> bool:
        return bool(self._refusals)

    def add(self, request_id: int, sentence: str) -> None:
        """Note that a request was refused."""
        before = self._refusals.get(request_id)
        pause_s = min(2 * before.pause_s, _LONGEST_PAUSE_S) if before else _FIRST_PAUSE_S
        self._refusals[request_id] = _Refusal(sentence, pause_s, time.monotonic() + pause_s)

    def due(self) -> list[int]:
        """Return the requests that are to be sent again now; they are taken to be."""
        now = time.monotonic()
        due = [number for number, each in self._refusals.items() if each.due is not None and each.due <= now]
        for number in due:
            self._refusals[number].due = None
        return due

    def pause_s(self) -> float:
        """Return in how many seconds the next one is due; infinity if none is."""
        dues = [each.due for each in self._refusals.values() if each.due is not None]
        return max(0.0, min(dues) - time.monotonic()) if dues else float("inf")

    def is_sent(self, request_id: int) -> bool:
        """Tell whether a reply to a request will come: it was not refused, or was sent again."""
        refusal = self._refusals.get(request_id)
        return refusal is None or refusal.due is None

    def sentence(self, request_id: int) -> str | None:
        """Return why a request was refused last; None if it was not."""
        refusal = self._refusals.get(request_id)
        return refusal.sentence if refusal else None

    def forget(self, request_id: int) -> None:
        """Note that a request was answered, or is of no more interest."""
        self._refusals.pop(request_id, None)
