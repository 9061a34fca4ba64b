"""What the soak asks: distinct requests of mixed length, and a plan of who asks which, completes it or not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Body = dict[str, Any]
Encode = Callable[[str], Sequence[int]]
Decode = Callable[[list[int]], str]

# Around one token, a cache block of 64, a chunk of 128, and beyond.
LENGTHS = (1, 2, 3, 9, 17, 33, 63, 64, 65, 100, 127, 128, 129, 180, 255, 256, 257, 300)
MOST_TOKENS = 48
_SHARED = 256
_TOP = 2
_SAMPLINGS: tuple[Body, ...] = (
    {"temperature": 0},
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9, "seed": 11},
    {"temperature": 0},
    {"temperature": 1.3, "top_k": 20, "seed": 12},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "min_p": 0.05, "seed": 13},
)
# A request that is cancelled must still be running then.
_TOO_MANY = 200


@dataclass(frozen=True)
class Asked:
    """A request that is to be answered.

    Attributes:
        chat: whether it is one; else a completion.
        body: without ``stream``; extra parameters of ours included.
    """

    chat: bool
    body: Body

    @property
    def choices(self) -> int:
        """How many choices its answer has."""
        return len(self.alone())

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether each token is the one of the largest logit, so that the gap to the second says how sure it is."""
        return bool(self.body["temperature"] == 0 and self.body.get("repetition_penalty", 1) == 1)

    def alone(self) -> list[Asked]:
        """Return a request for each choice, in order: alone they must give the same. They are scored."""
        prompts = [None] if self.chat else self.body["prompt"]
        if not self.chat and not (isinstance(prompts, list) and prompts and isinstance(prompts[0], (str, list))):
            prompts = [prompts]
        found = []
        for prompt in prompts:
            for place in range(self.body.get("n", 1)):
                body = {name: value for name, value in self.body.items() if name != "n"}
                if not self.chat:
                    body["prompt"] = prompt
                if "seed" in body:
                    body["seed"] += place
                found.append(Asked(self.chat, body).scored())
        return found

    def scored(self) -> Asked:
        """Return the same with log-probabilities."""
        wish: Body = {"logprobs": True, "top_logprobs": _TOP} if self.chat else {"logprobs": _TOP}
        return replace(self, body={**self.body, **wish})


def distinct(model: str, text: str, encode: Encode, decode: Decode, *, scored: bool) -> list[Asked]:
    """Return requests that differ in form, length and sampling.

    Args:
        model: what the server calls it.
        text: where prompts are taken from.
        encode: text to tokens.
        decode: tokens to text.
        scored: ask for log-probabilities in all of them; else in two of three.
    """
    ids = list(encode(text))
    found = []
    for at, length in enumerate(LENGTHS):
        first = at * 151 % (len(ids) - 2 * _SHARED)
        body = {"model": model, "max_tokens": 1 + at * 11 % MOST_TOKENS, **_SAMPLINGS[at % len(_SAMPLINGS)]}
        asked = _in_form(at, body, ids[first : first + length], decode)
        found.append(asked.scored() if scored or at % 3 else asked)
    return found + [each.scored() if scored else each for each in _peculiar(model, ids, decode)]


def _in_form(at: int, body: Body, ids: list[int], decode: Decode) -> Asked:
    """Ask by ids, by text, or in a chat; every other one goes on after the end of the text."""
    going_on = {"ignore_eos": True} if at % 2 else {}
    if at % 4 == 2:
        return Asked(chat=True, body={**body, **going_on, "messages": [{"role": "user", "content": decode(ids)}]})
    return Asked(chat=False, body={**body, **going_on, "prompt": decode(ids) if at % 4 == 1 else ids})


def _peculiar(model: str, ids: list[int], decode: Decode) -> Iterator[Asked]:
    """Yield several choices, several prompts, prompts that share a beginning, stop texts, and scored prompts."""
    greedy: Body = {"model": model, "temperature": 0, "max_tokens": 24, "ignore_eos": True}
    drawn = {**greedy, "temperature": 0.9, "top_p": 0.95, "seed": 21}
    yield Asked(chat=False, body={**drawn, "prompt": ids[40:90], "n": 3})
    yield Asked(chat=False, body={**greedy, "prompt": [ids[7:20], ids[300:440]], "max_tokens": 12, "n": 2})
    yield Asked(chat=True, body={**drawn, "messages": [{"role": "user", "content": decode(ids[5:30])}], "n": 2})
    for at in range(3):
        tail = ids[500 + 30 * at : 520 + 37 * at]
        yield Asked(chat=False, body={**greedy, "prompt": ids[:_SHARED] + tail, "max_tokens": 16})
    stops = [decode([each]) for each in sorted(set(ids[:40]))[:8]]
    yield Asked(chat=False, body={**drawn, "prompt": ids[10:60], "stop": [text for text in stops if text]})
    yield Asked(chat=False, body={**greedy, "prompt": ids[:150], "echo": True, "max_tokens": 6}).scored()
    yield Asked(chat=False, body={**greedy, "prompt": ids[60:131], "echo": True, "max_tokens": 0}).scored()


def endless(asked: Asked) -> Asked:
    """Return a request that is still running when it is cancelled."""
    return replace(asked, body={**asked.body, "max_tokens": _TOO_MANY, "ignore_eos": True, "stop": []})


@dataclass(frozen=True)
class Task:
    """What one client does next.

    Attributes:
        kind: complete a request, leave before its end, or ask what must be refused.
        at: which of the distinct requests, or of the bad ones.
        stream: whether it is streamed.
        after: leave after so many events, or, if it is not streamed, after so many hundredths of a second.
    """

    kind: Literal["complete", "leave", "wrong"]
    at: int
    stream: bool = False
    after: int = 0


def plan(count: int, good: int, bad: int, seed: int = 0) -> list[Task]:
    """Return tasks in random order: about one of six is cancelled and one of six invalid, the others complete.

    Args:
        count: how many.
        good: how many distinct requests there are; each has a turn if there is room.
        bad: how many kinds of bad ones there are; the same.
        seed: of the order.
    """
    drawn = random.Random(seed)
    tasks = []
    for at in range(count):
        stream = drawn.random() < 0.5
        if at % 6 == 4:
            tasks.append(Task("leave", at // 6 % good, stream, drawn.randrange(1, 12)))
        elif at % 6 == 5:
            tasks.append(Task("wrong", at // 6 % bad))
        else:
            tasks.append(Task("complete", (at - at // 6 * 2) % good, stream))
    drawn.shuffle(tasks)
    return tasks
