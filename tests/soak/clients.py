"""Clients of OpenAI's own package: many at once, that ask, leave before the end, or ask what must be refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import openai
from bad_requests import Bad, send, wrong
from openai import AsyncOpenAI
from soak.answers import Answer
from soak.asked import Asked, Task, endless

# Parameters that the package does not know go into ``extra_body``.
_OWN = ("top_k", "min_p", "repetition_penalty", "ignore_eos")
_TIMEOUT_S = 300.0
_HUNDREDTH_S = 0.01

Judge = Callable[[int, Sequence[Answer]], None]


@dataclass
class Tally:
    """What came of the tasks.

    Attributes:
        completed, streamed, left, refused: how many; of those that completed, how many were streamed.
        kinds: names of the invalid requests that were sent.
        completion_tokens: of those that completed.
        problems: what must not be.
    """

    completed: int = 0
    streamed: int = 0
    left: int = 0
    refused: int = 0
    kinds: set[str] = field(default_factory=set)
    completion_tokens: int = 0
    problems: list[str] = field(default_factory=list)


class Clients:
    """All clients of one server.

    Args:
        host: of the server, name and port.
        keys: API keys; clients take them in turn.
        asked: the distinct requests.
        bad: the invalid ones.
        judge: told what came of each request that completed.
    """

    def __init__(
        self, host: str, keys: Sequence[str], asked: Sequence[Asked], bad: Sequence[Bad], judge: Judge
    ) -> None:
        self._host, self._keys, self._asked, self.bad, self._judge = host, keys, asked, bad, judge
        self.tally = Tally()

    async def run(self, tasks: Sequence[Task], clients: int) -> None:
        """Let so many clients do all tasks, each the next one when it is free."""
        waiting = iter(tasks)
        await asyncio.gather(*(self._work(waiting, self._keys[at % len(self._keys)]) for at in range(clients)))

    async def _work(self, waiting: Iterator[Task], key: str) -> None:
        async with connected(self._host, key) as client:
            for task in waiting:
                await self._try(client, task, key)

    async def _try(self, client: AsyncOpenAI, task: Task, key: str) -> None:
        try:
            await self._do(client, task, key)
        except openai.APIError as error:
            self.tally.problems.append(f"{task.kind} {task.at}: {type(error).__name__}: {error.message}")

    async def _do(self, client: AsyncOpenAI, task: Task, key: str) -> None:
        if task.kind == "wrong":
            bad = self.bad[task.at]
            self.tally.problems += filter(None, [wrong(bad, await asyncio.to_thread(send, self._host, bad, key))])
            self.tally.refused += 1
            self.tally.kinds.add(bad.name)
        elif task.kind == "leave":
            await leave(client, endless(self._asked[task.at]), task)
            self.tally.left += 1
        else:
            answers, tokens = await complete(client, self._asked[task.at], stream=task.stream)
            self._judge(task.at, answers)
            self.tally.completed += 1
            self.tally.streamed += task.stream
            self.tally.completion_tokens += tokens


def connected(host: str, key: str) -> AsyncOpenAI:
    """Return a client that never tries again by itself."""
    return AsyncOpenAI(base_url=f"http://{host}/v1", api_key=key, max_retries=0, timeout=_TIMEOUT_S)


async def complete(client: AsyncOpenAI, asked: Asked, *, stream: bool) -> tuple[list[Answer], int]:
    """Ask, and return all choices and how many tokens they have."""
    answers = [Answer() for _ in range(asked.choices)]
    usage: Any = None
    if not stream:
        whole = await _create(client, asked)
        for choice in whole.choices:
            _add(answers[choice.index], asked, choice)
        usage = whole.usage
    else:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        async for chunk in await _create(client, asked, **options):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                _add(answers[choice.index], asked, choice)
    return answers, usage.completion_tokens


def _add(answer: Answer, asked: Asked, choice: Any) -> None:
    (answer.add_chat if asked.chat else answer.add_completion)(choice)


async def leave(client: AsyncOpenAI, asked: Asked, task: Task) -> None:
    """Ask, and go away while the answer comes."""
    if not task.stream:
        try:
            await _create(client.with_options(timeout=task.after * _HUNDREDTH_S), asked)
        except openai.APITimeoutError:
            return
        return
    stream = await _create(client, asked, stream=True)
    left = task.after
    async for _chunk in stream:
        left -= 1
        if not left:
            break
    await stream.close()


async def _create(client: AsyncOpenAI, asked: Asked, **options: Any) -> Any:
    own = {name: value for name, value in asked.body.items() if name in _OWN}
    others: dict[str, Any] = {name: value for name, value in asked.body.items() if name not in _OWN}
    create: Any = client.chat.completions.create if asked.chat else client.completions.create
    return await create(**others, **options, extra_body=own)
