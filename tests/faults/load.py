"""Clients of a server, all the time: each knows the right answers and judges what it gets."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Outcome = Literal["right", "wrong", "error", "cut", "lost"]

# Nobody may be left without an answer or an error for so long.
SILENCE_S = 90.0
_PAUSE_S = 0.2
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Asked:
    """A request for text, which is the same each time: greedy, and as long as it says."""

    prompt: str
    max_tokens: int

    def body(self, model: str, **more: Any) -> dict[str, Any]:
        """Return what is posted."""
        fixed = {"model": model, "temperature": 0, "ignore_eos": True}
        return {**fixed, "prompt": self.prompt, "max_tokens": self.max_tokens, **more}


@dataclass(frozen=True)
class Answer:
    """What came of a request.

    Attributes:
        text: of the answer, or as far as it came.
        error: the server's own code and sentence, where it gave one.
        cut: the connection was refused or ended in the middle.
        silent: nothing came for ``SILENCE_S``.
        gaps: at each token, by how much the likeliest was ahead, where that was asked.
    """

    text: str = ""
    error: tuple[str, str] | None = None
    cut: bool = False
    silent: bool = False
    gaps: tuple[float, ...] = ()

    def outcome(self, right: str) -> Outcome:
        """Judge it."""
        if self.silent:
            return "lost"
        if not right.startswith(self.text):
            return "wrong"
        if self.error:
            return "error" if all(self.error) else "lost"
        if self.cut:
            return "cut"
        return "right" if self.text == right else "wrong"


def ask(host: str, body: dict[str, Any], *, stream: bool = False) -> Answer:
    """Ask a server, whatever comes of it."""
    connection = http.client.HTTPConnection(host, timeout=SILENCE_S)
    parts: list[str] = []
    try:
        connection.request("POST", "/v1/completions", json.dumps({**body, "stream": stream}), _JSON)
        response = connection.getresponse()
        if not stream or response.status != http.client.OK:
            return _whole(json.loads(response.read()))
        return _streamed(response, parts)
    except TimeoutError:
        return Answer("".join(parts), silent=True)
    except (OSError, http.client.HTTPException):
        return Answer("".join(parts), cut=True)
    finally:
        connection.close()


def _whole(content: dict[str, Any]) -> Answer:
    if "error" in content:
        return Answer(error=_error(content))
    choice = content["choices"][0]
    top = (choice.get("logprobs") or {}).get("top_logprobs") or ()
    ranked = [sorted(each.values(), reverse=True) for each in top]
    return Answer(choice["text"], gaps=tuple(each[0] - each[1] for each in ranked if len(each) > 1))


def _streamed(response: http.client.HTTPResponse, parts: list[str]) -> Answer:
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            return Answer("".join(parts))
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            return Answer("".join(parts), error=_error(event))
        parts += [choice["text"] for choice in event["choices"]]
    return Answer("".join(parts), cut=True)


def _error(content: dict[str, Any]) -> tuple[str, str]:
    error = content["error"]
    return str(error["code"] or ""), str(error["message"] or "")


@dataclass
class Tally:
    """What the clients of one server got. For any thread.

    Attributes:
        counts: requests by outcome.
        codes: errors by code.
        problems: what must not happen, in sentences.
    """

    counts: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, asked: Asked, answer: Answer, right: str, *, may_be_cut: bool) -> Outcome:
        """Count an answer."""
        outcome = answer.outcome(right)
        if outcome == "cut" and not may_be_cut:
            outcome = "lost"
        with self._lock:
            self.counts[outcome] += 1
            if answer.error:
                self.codes[answer.error[0]] += 1
            if outcome in ("wrong", "lost"):
                self.problems.append(f"{asked}: {outcome}: {answer}, expected {right!r}")
        return outcome


class Watch(Protocol):
    """What clients ask and tell of their server."""

    def may_be_cut(self, since: float) -> bool:
        """Tell whether the server was down, because of a fault, at some time after."""

    def erred(self, code: str) -> None:
        """Take note of an error that a client was told now."""


class Load:
    """Clients that ask one server again and again.

    Args:
        host: name and port.
        model: its name there.
        answers: what may be asked, and the right answer to each.
        clients: how many ask at once.
        seed: of what they choose.
        watch: tells whether connections may end, and is told of errors.
    """

    def __init__(
        self,
        host: str,
        model: str,
        answers: dict[Asked, str],
        clients: int,
        seed: int,
        watch: Watch,
    ) -> None:
        self._host, self._model, self.answers, self._watch = host, model, answers, watch
        self.tally, self.clients = Tally(), clients
        self._over = threading.Event()
        self._runs = threading.Event()
        self._since: list[float | None] = [None] * clients
        chances = [random.Random(f"{seed} {at}") for at in range(clients)]
        self._threads = [threading.Thread(target=self._ask, args=each) for each in enumerate(chances)]
        for thread in self._threads:
            thread.start()

    def go(self) -> None:
        """Ask from now on."""
        self._runs.set()

    def rest(self) -> None:
        """Ask no more, and wait until all that was asked is answered."""
        self._runs.clear()
        while any(since is not None for since in self._since):
            time.sleep(_PAUSE_S)

    def has_answered(self, before: float) -> bool:
        """Tell whether all that was asked before a time has an answer or an error."""
        return all(since is None or since >= before for since in self._since)

    def close(self) -> None:
        """End all clients."""
        self._over.set()
        self._runs.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, at: int, chance: random.Random) -> None:
        items: Sequence[tuple[Asked, str]] = list(self.answers.items())
        while True:
            self._since[at] = None
            self._runs.wait()
            if self._over.is_set():
                return
            asked, right = chance.choice(items)
            started = self._since[at] = time.monotonic()
            answer = ask(self._host, asked.body(self._model), stream=chance.random() < 0.5)
            outcome = self.tally.add(asked, answer, right, may_be_cut=self._watch.may_be_cut(started))
            if outcome != "right":
                if answer.error:
                    self._watch.erred(answer.error[0])
                time.sleep(_PAUSE_S)
            time.sleep(_PAUSE_S * chance.random())  # the machine is to have time for processes that start
