"""The HTTP server before real engines: OpenAI's package at `masked`, every kind of bad input, and what it tells."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from bad_requests import CHAT, COMPLETIONS, Bad, bad_requests, get, post, send, streamed, wrong
from openai import AsyncOpenAI
from real_serving import (
    BODY_LIMIT,
    CONTEXT,
    MODEL,
    Tiny,
    client_of,
    host_of,
    real_engine,
    served_engine,
    speaking_checkpoint,
)
from safetensors.torch import load_file, save_file
from serving import metrics_of
from soak.answers import float32_error
from torch import Tensor
from workers import StartWorker

from tsqp import loaded
from tsqp.engine.api import ClosingError, Event, Failed, Finished, Generation, Sampling, Token
from tsqp.engine.loop import GenerationEngine
from tsqp.levels import open_model
from tsqp.model.tokenizer import Tokenizer
from tsqp.serve.chat_template import ChatTemplate

QUESTION = "The capital of France is"
HI: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
TOKENS = 12
_PATIENCE_S = 60


class Answer:
    """What an engine itself makes of a request."""

    def __init__(self, engine: GenerationEngine, generation: Generation) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()
        engine.submit(generation, self._take)

    def _take(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, (Finished, Failed)):
            self._ended.set()

    @property
    def tokens(self) -> list[Token]:
        assert self._ended.wait(_PATIENCE_S)
        assert isinstance(self.events[-1], Finished)
        return [event for event in self.events if isinstance(event, Token)]

    @property
    def text(self) -> str:
        held = self.tokens and self.events[-1]
        return "".join(token.text for token in self.tokens) + (held.text if isinstance(held, Finished) else "")


def greedy(ids: Sequence[int], tokens: int = TOKENS) -> Generation:
    return Generation(prompt_ids=tuple(ids), max_tokens=tokens, sampling=Sampling(temperature=0))


# OpenAI's package, the bundled model, masked ------------------------------------------------------------------------


class Bundled:
    """A server of the bundled model at `masked`, and what its engine answers by itself."""

    def __init__(self, directory: Path, worker: StartWorker, stack: ExitStack) -> None:
        self._model = open_model(str(directory), "masked")
        self.engine = stack.enter_context(real_engine(self._model, "masked", worker(directory)))
        self.server = stack.enter_context(served_engine(self.engine, self._model, "masked"))

    def continued(self, prompt: str = QUESTION, tokens: int = TOKENS) -> str:
        assert self._model.tokenizer is not None
        return Answer(self.engine, greedy(self._model.tokenizer.encode(prompt), tokens)).text

    def replied(self, tokens: int = TOKENS) -> str:
        assert self._model.tokenizer is not None
        own = self._model.tokenizer.conventions
        prompt = ChatTemplate(own.chat_template or "", own.named).render(HI)
        return Answer(self.engine, greedy(self._model.tokenizer.encode_bare(prompt), tokens)).text


@pytest.fixture(scope="module")
def bundled(bundled_packed: Path, worker: StartWorker) -> Iterator[Bundled]:
    with ExitStack() as stack:
        yield Bundled(bundled_packed, worker, stack)


def test_whole_answers_are_those_of_the_engine(bundled: Bundled) -> None:
    with client_of(bundled.server) as client:
        completion = client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=TOKENS, temperature=0)
        assert completion.choices[0].text == bundled.continued()
        assert " Paris" in completion.choices[0].text
        assert completion.usage is not None
        assert completion.usage.completion_tokens == TOKENS
        chat = client.chat.completions.create(model=MODEL, messages=HI, max_completion_tokens=TOKENS, temperature=0)
        assert chat.choices[0].message.content == bundled.replied()
        assert "Paris" in str(chat.choices[0].message.content)


def test_streams_are_those_of_the_engine(bundled: Bundled) -> None:
    with client_of(bundled.server) as client:
        chunks = list(
            client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=TOKENS, temperature=0, stream=True)
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == bundled.continued()
        assert len(chunks) > TOKENS // 2  # piece by piece
        assert chunks[-1].choices[0].finish_reason == "length"
        options: Any = {"include_usage": True}
        said = list(
            client.chat.completions.create(
                model=MODEL, messages=HI, max_tokens=TOKENS, temperature=0, stream=True, stream_options=options
            )
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in said[:-1]) == bundled.replied()
        assert said[-1].usage is not None
        assert 0 < said[-1].usage.completion_tokens <= TOKENS


def test_many_at_once_with_the_asynchronous_client(bundled: Bundled) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{bundled.server.url}/v1", api_key="none", max_retries=0) as client:

            async def whole(count: int) -> str:
                answer = await client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=count, temperature=0)
                return answer.choices[0].text

            async def streamed(count: int) -> str:
                stream = await client.chat.completions.create(
                    model=MODEL, messages=HI, max_tokens=count, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(way(count) for count in (1, 5, 9) for way in (whole, streamed)))

    expected = [text for count in (1, 5, 9) for text in (bundled.continued(tokens=count), bundled.replied(count))]
    assert asyncio.run(ask()) == expected


def test_a_stop_text_and_a_seed(bundled: Bundled) -> None:
    with client_of(bundled.server) as client:
        whole = bundled.continued()
        word = whole.split()[3]
        stopped = client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=TOKENS, temperature=0, stop=word)
        assert stopped.choices[0].text == whole.partition(word)[0]
        assert stopped.choices[0].finish_reason == "stop"
        drawn = [
            client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=TOKENS, temperature=1.5, seed=seed, n=2)
            for seed in (1, 1, 2)
        ]
        texts = [[choice.text for choice in answer.choices] for answer in drawn]
        assert texts[0] == texts[1]
        assert texts[0][1] == texts[2][0] != texts[0][0]  # the second choice of a seed is the first of the next


# A tiny model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def masked(checkpoint: Path, worker: StartWorker) -> Iterator[Tiny]:
    with ExitStack() as stack:
        yield Tiny(checkpoint, "masked", stack, worker(open_model(str(checkpoint), "masked").directory))


@pytest.fixture(scope="module")
def local(checkpoint: Path) -> Iterator[Tiny]:
    with ExitStack() as stack:
        yield Tiny(checkpoint, "local", stack)


@pytest.mark.parametrize("bad", bad_requests(MODEL, CONTEXT, BODY_LIMIT, keys=False), ids=lambda bad: bad.name)
def test_bad_input_is_refused_and_nothing_is_computed(bad: Bad, masked: Tiny) -> None:
    before = masked.engine.stats()
    assert wrong(bad, send(masked.host, bad)) == ""
    after = masked.engine.stats()
    assert (after.steps, after.running, after.queued) == (before.steps, 0, 0)
    assert after.blocks_free == after.blocks_total


def test_what_is_just_allowed_is_answered(masked: Tiny) -> None:
    """The control: limits are where the errors say."""
    assert masked.complete(prompt=[5] * (CONTEXT - 1), max_tokens=1)["usage"]["prompt_tokens"] == CONTEXT - 1
    stops = [str(i) * 256 for i in range(9)] + list("abcdefg")
    assert masked.complete(prompt="x", max_tokens=1, stop=stops)["choices"]
    assert masked.complete(prompt="x", max_tokens=1, temperature=2, seed=(1 << 63) - 1, logprobs=20)["choices"]
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1}).encode()
    assert post(masked.host, COMPLETIONS, body + b" " * (BODY_LIMIT - len(body))).status == 200


def test_its_numbers_are_told(masked: Tiny) -> None:
    masked.complete(prompt="abc", max_tokens=8, ignore_eos=True)
    with urllib.request.urlopen(f"{masked.server.url}/metrics") as answer:  # noqa: S310  our own address
        found = metrics_of(answer.read().decode())
    told = ("bytes_sent_total", "bytes_received_total", "batch_rows", "pool_wanted", "pool_held", "steps_total")
    assert {name: found[f"tsqp_engine_{name}", ()] for name in told if not found[f"tsqp_engine_{name}", ()] > 0} == {}
    parts = ("worker", "enclave", "attention", "quantise", "mask", "check", "sampling", "mask_fill")
    assert [part for part in parts if not found["tsqp_engine_part_seconds_total", (part,)] > 0] == []


def test_several_choices_are_computed_together_and_each_is_as_alone(masked: Tiny) -> None:
    body = {"max_tokens": 8, "temperature": 1, "seed": 3, "logprobs": 0, "ignore_eos": True}
    together = masked.complete(**body, prompt=["abc", "xyz"], n=2)["choices"]
    alone = [
        masked.complete(**{**body, "seed": 3 + place}, prompt=prompt)["choices"][0]
        for prompt in ("abc", "xyz")
        for place in range(2)
    ]
    assert [{**choice, "index": 0} for choice in together] == alone
    assert len({choice["text"] for choice in together}) == 4


@pytest.mark.parametrize("drawn", [False, True])
def test_the_score_of_a_token_is_the_one_among_the_likeliest(local: Tiny, drawn: bool) -> None:  # noqa: FBT001
    how = {"temperature": 1.2, "seed": 5} if drawn else {}
    [choice] = local.complete(prompt="abcdef", max_tokens=20, logprobs=5, echo=True, ignore_eos=True, **how)["choices"]
    scores = choice["logprobs"]
    assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
    assert len(scores["tokens"]) == 26
    for token, logprob, top in zip(
        scores["tokens"][1:], scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True
    ):
        assert top[token] == logprob <= 0
        assert max(top.values()) >= logprob
        assert len(top) in (5, 6)
    assert any(len(top) == 6 for top in scores["top_logprobs"][1:])  # one that is not among the likeliest


def test_the_score_of_a_chats_token_is_the_one_among_the_likeliest(local: Tiny) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 20}
    answered = post(local.host, CHAT, json.dumps({**body, "max_tokens": 20, "seed": 1}).encode())
    entries = answered.content["choices"][0]["logprobs"]["content"]
    shared = 0
    for entry in entries:
        top = {tuple(each["bytes"]): each["logprob"] for each in entry["top_logprobs"]}
        assert len(top) == 20
        if tuple(entry["bytes"]) in top:
            shared += 1
            assert top[tuple(entry["bytes"])] == entry["logprob"]
    assert shared > 5


def test_scores_are_those_of_a_softmax(local: Tiny) -> None:
    scores = local.complete(prompt="abcdef", max_tokens=0, logprobs=20, echo=True)["choices"][0]["logprobs"]
    for top in scores["top_logprobs"][1:]:
        assert 0 < sum(math.exp(logprob) for logprob in top.values()) < 1 + 1e-6


def change_logits(patch: pytest.MonkeyPatch, change: Callable[[Tensor], None]) -> None:
    """Let logits of every step be changed, in place, before tokens are chosen."""
    run = loaded.run_together

    def changed(work: Any) -> list[Any]:
        (found,) = run(work)
        assert isinstance(found, list)
        logits = [logits_RV.clone() for logits_RV in found]
        for logits_RV in logits:
            change(logits_RV)
        return [logits]

    patch.setattr(loaded, "run_together", changed)


@pytest.fixture
def with_impossible_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second token cannot be: its logit is minus infinity."""

    def changed(logits_RV: Tensor) -> None:
        logits_RV[:, 1::2] = -math.inf

    change_logits(monkeypatch, changed)


@pytest.mark.usefixtures("with_impossible_tokens")
def test_an_infinite_score_is_told_as_a_number(local: Tiny) -> None:
    """``complete`` takes strict JSON only."""
    scores = local.complete(prompt=[2, 3, 4], max_tokens=1, logprobs=20, echo=True)["choices"][0]["logprobs"]
    assert scores["token_logprobs"][1] == -9999.0
    assert scores["token_logprobs"][2] > -9999.0
    body = {"model": MODEL, "prompt": [2, 3, 4], "max_tokens": 2, "logprobs": 1, "echo": True}
    events = streamed(local.host, COMPLETIONS, body)
    assert [score for event in events for score in event["choices"][0]["logprobs"]["token_logprobs"]][1] == -9999.0


def test_all_that_is_told_of_numbers_is_strict_json(local: Tiny) -> None:
    for path in ("/status", "/readyz", "/healthz", "/v1/models"):
        assert get(local.host, path).status == 200


def test_a_completion_keeps_the_space_before_its_first_word(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of its own would lose it, with vocabularies such as LLaMA 2's; a completion goes on with its prompt."""
    pieces = {"a": 0, "▁": 1, "▁a": 2, "b": 3}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, []))
    raw.decoder = tokenizers.decoders.Metaspace()
    model = replace(open_model(str(checkpoint), "local"), tokenizer=Tokenizer(raw.to_str().encode()))

    def always_the_word(logits_RV: Tensor) -> None:
        logits_RV[:, pieces["▁a"]] = 1000

    change_logits(monkeypatch, always_the_word)
    body = {"model": MODEL, "prompt": [2, 3], "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 0}
    with real_engine(model, "local") as engine, served_engine(engine, model, "local") as server:
        [choice] = post(host_of(server), COMPLETIONS, json.dumps(body).encode()).content["choices"]
    assert choice["text"] == "ab a a a"
    assert choice["logprobs"]["text_offset"][2:] == [2, 4, 6]


# Logits that are not numbers ------------------------------------------------------------------------------------------

POISON = 200


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """A model of which one token's embedding is damaged: whoever uses it gets no numbers."""
    directory = speaking_checkpoint(tmp_path_factory.mktemp("poisoned"))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = math.nan
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with ExitStack() as stack:
        yield Tiny(directory, "local", stack, kv_memory=1 << 18)


def test_a_request_without_numbers_fails_and_others_go_on(poisoned: Tiny, local: Tiny) -> None:
    """Beside it, and later in the same blocks of the cache, where its keys and values are still."""
    good = {"prompt": "abc", "max_tokens": 100, "logprobs": 0, "ignore_eos": True}
    [alone] = local.complete(**good)["choices"]
    bad = {"model": MODEL, "prompt": [65, POISON, 66], "max_tokens": 4}
    answers: list[Any] = []
    beside = threading.Thread(target=lambda: answers.extend(poisoned.complete(**good)["choices"]))
    beside.start()
    failed = post(poisoned.host, COMPLETIONS, json.dumps(bad).encode())
    assert failed.status == 500
    assert (failed.content["error"]["type"], failed.content["error"]["code"]) == ("server_error", "invalid_logits")
    [event] = streamed(poisoned.host, COMPLETIONS, bad)
    assert event["error"]["code"] == "invalid_logits"
    scored = post(
        poisoned.host, COMPLETIONS, json.dumps({**bad, "echo": True, "logprobs": 1, "max_tokens": 0}).encode()
    )
    assert (scored.status, scored.content["error"]["code"]) == (500, "invalid_logits")
    beside.join()
    assert answers[0]["text"] == alone["text"]
    found, expected = (each["logprobs"]["token_logprobs"] for each in (answers[0], alone))
    assert found == pytest.approx(expected, rel=0, abs=20 * float32_error(3, 80))  # float products of several rows
    stats = poisoned.engine.stats()
    assert stats.ready
    assert stats.blocks_free == stats.blocks_total == 10
    in_all_blocks = poisoned.complete(**good, n=5)["choices"]
    assert [choice["text"] for choice in in_all_blocks] == [alone["text"]] * 5


# Closed ---------------------------------------------------------------------------------------------------------------


def test_closing_twice_and_asking_afterwards(checkpoint: Path) -> None:
    with ExitStack() as stack:
        tiny = Tiny(checkpoint, "local", stack)
        assert tiny.complete(prompt="abc", max_tokens=2)["choices"]
        asked = Answer(tiny.engine, greedy(range(10), 900))
        tiny.engine.close()
        assert isinstance(asked.events[-1], Finished)
        assert asked.events[-1].reason == "cancelled"
        tiny.engine.close(drain_s=5)
        with pytest.raises(ClosingError):
            tiny.engine.submit(greedy([1]), lambda _event: None)
        answered = post(tiny.host, COMPLETIONS, json.dumps({"model": MODEL, "prompt": "abc"}).encode())
        assert (answered.status, answered.content["error"]["code"]) == (503, "stopping")
        ready = get(tiny.host, "/readyz")
        assert (ready.status, ready.content["reason"]) == (503, "closing")
