"""The soak: answers of each request alone, then of hundreds at once, and what the server holds before and after."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import TypeVar

import msgspec
from bad_requests import bad_requests
from soak.answers import Answer, Tolerance, float32_error, judged
from soak.asked import Asked, Decode, Encode, distinct, plan
from soak.clients import Clients, Tally, complete, connected
from soak.holdings import Holdings
from soak.orders import MODEL, Order, Ready
from soak.report import OPEN_WORKER_BYTES, Diverged, Report, leaks

TESTS = Path(__file__).parents[1]
# Who shares one prefix cache. Requests that run alone have owners of their own, so that they find nothing there.
OWNERS = ("ada", "ben", "cyd", "dan")
_BODY_LIMIT = 1 << 16
_ANSWERS = re.compile(r'tsqp_http_requests_total\{path="(.+)",status="(.+)"\} (.+)')
_IN_FLIGHT = re.compile(r"^tsqp_http_generations_in_flight (.+)", re.MULTILINE)

Told = TypeVar("Told", Ready, Holdings)


class Served:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.ready = self._read(Ready)

    def look(self) -> Holdings:
        """Wait until nothing runs there, and return what it holds."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return self._read(Holdings)

    def _read(self, kind: type[Told]) -> Told:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the server ended with exit code {self._process.wait()}; see above"
        return msgspec.json.decode(line, type=kind)


@contextmanager
def serving(order: Order, environment: Mapping[str, str]) -> Iterator[Served]:
    """Run a server for the time of a ``with`` block."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "soak.server", msgspec.json.encode(order).decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment, "PYTHONPATH": path},
    )
    try:
        yield Served(process)
    finally:
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
        process.wait()


@dataclass(frozen=True)
class Words:
    """Where prompts come from: a text, and the tokenizer of the model."""

    text: str
    encode: Encode
    decode: Decode


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much of it.

    Attributes:
        requests, clients: how many.
        cache_tokens: that the server's cache has room for, so that some must wait; None takes the default.
        slack_bytes: by which the server's memory may have grown in the second half, since allocators round and the
            mask pool holds blocks that are used in part. A leak of every request shows if it is more than this by
            half of their number.
        environment: of the server, beside this process's own.
    """

    requests: int
    clients: int = 16
    cache_tokens: int | None = None
    slack_bytes: int = 4 << 20
    environment: Mapping[str, str] = field(default_factory=dict)


def soak(model: str, level: str, words: Words, load: Load) -> Report:
    """Serve a model, ask each distinct request alone and then many at once, and compare.

    Args:
        model: as ``tsqp serve`` takes it.
        level: of protection.
        words: for prompts.
        load: how much.
    """
    asked = distinct(MODEL, words.text, words.encode, words.decode, scored=level == "open")
    lone = [each.alone() for each in asked]
    names = (*OWNERS, *(f"alone-{at}" for at in range(sum(map(len, lone)))))
    order = Order(model=model, level=level, keys=names, body_limit=_BODY_LIMIT, cache_tokens=load.cache_tokens)
    with serving(order, load.environment) as served:
        started = time.monotonic()
        alone = asyncio.run(_alone(served.ready, lone))
        seconds = [time.monotonic() - started]
        looks = [served.look()]
        judging = _Judging(asked, alone, _tolerance(level, served.ready, looks[0]))
        crowd = _crowd(served.ready, asked, judging)
        tasks = plan(load.requests, len(asked), len(crowd.bad))
        for part in (tasks[: load.requests // 2], tasks[load.requests // 2 :]):
            started = time.monotonic()
            asyncio.run(crowd.run(part, load.clients))
            seconds.append(time.monotonic() - started)
            looks.append(served.look())
        statuses = _statuses(served.ready, judging)
    worker_slack = OPEN_WORKER_BYTES if level == "open" else load.slack_bytes
    judging.problems += leaks(looks[1], looks[2], {"memory_bytes": load.slack_bytes, "worker_bytes": worker_slack})
    return _report(crowd.tally, judging, load.clients, seconds, looks, statuses)


def _crowd(ready: Ready, asked: Sequence[Asked], judging: _Judging) -> Clients:
    bad = bad_requests(MODEL, ready.context, _BODY_LIMIT, keys=True)
    return Clients(ready.host, [ready.keys[name] for name in OWNERS], asked, bad, judging)


def _report(
    tally: Tally,
    judging: _Judging,
    clients: int,
    seconds: Sequence[float],
    looks: Sequence[Holdings],
    statuses: dict[str, int],
) -> Report:
    before, halfway, after = looks
    together_s = sum(seconds[1:])
    return Report(
        requests=tally.completed + tally.left + tally.refused,
        clients=clients,
        completed=tally.completed,
        streamed=tally.streamed,
        left=tally.left,
        refused=tally.refused,
        kinds_refused=len(tally.kinds),
        alone=judging.alone,
        alone_s=round(seconds[0], 1),
        together_s=round(together_s, 1),
        completion_tokens=tally.completion_tokens,
        tokens_per_s=round(tally.completion_tokens / together_s, 1),
        choices=judging.count,
        diverged=judging.diverged,
        gap_allowed=judging.tolerance.gap,
        logprob_off=judging.off,
        most_sequences=after.most_sequences,
        rows_per_step=round((after.rows - before.rows) / (after.steps - before.steps), 1),
        before=before,
        halfway=halfway,
        after=after,
        statuses=statuses,
        problems=[*tally.problems, *judging.problems],
    )


async def _alone(ready: Ready, lone: Sequence[Sequence[Asked]]) -> list[list[Answer]]:
    """Ask one after the other, each with a key of its own."""
    found: list[list[Answer]] = []
    at = 0
    for choices in lone:
        found.append([])
        for each in choices:
            async with connected(ready.host, ready.keys[f"alone-{at}"]) as client:
                [answer], _tokens = await complete(client, each, stream=False)
            found[-1].append(answer)
            at += 1
    return found


def _tolerance(level: str, ready: Ready, seen: Holdings) -> Tolerance:
    """Packed levels compute the same whatever else runs; float products may be summed in another order."""
    if level != "open":
        return Tolerance()
    return Tolerance(float32_error(ready.layers, ready.inputs) * seen.largest_logit)


class _Judging:
    """Compares each answer as it comes, and keeps what came of that."""

    def __init__(self, asked: Sequence[Asked], alone: Sequence[Sequence[Answer]], tolerance: Tolerance) -> None:
        self._asked, self._alone, self.tolerance = asked, alone, tolerance
        self.alone = sum(map(len, alone))
        self.count, self.off = 0, 0.0
        self.diverged: list[Diverged] = []
        self.problems: list[str] = []

    def __call__(self, at: int, answers: Sequence[Answer]) -> None:
        for place, (alone, found) in enumerate(zip(self._alone[at], answers, strict=True)):
            asked = self._asked[at]
            verdict = judged(asked, alone, found, self.tolerance)
            self.count += 1
            self.off = max(self.off, verdict.off)
            if verdict.problem:
                self.problems.append(f"request {at}, choice {place}: {verdict.problem}")
            elif verdict.position is not None:
                self.diverged.append(Diverged(verdict.position, verdict.gap, drawn=not asked.takes_the_likeliest))


def _statuses(ready: Ready, judging: _Judging) -> dict[str, int]:
    """Return how many answers had which status; none may still be counted as being given."""
    connection = HTTPConnection(ready.host)
    try:
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {ready.keys[OWNERS[0]]}"})
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    statuses: Counter[str] = Counter()
    for _path, status, count in _ANSWERS.findall(text):
        statuses[status] += int(float(count))
    if _IN_FLIGHT.findall(text) != ["0.0"]:
        judging.problems.append(f"requests are still counted as being answered: {_IN_FLIGHT.findall(text)}")
    return dict(statuses)
