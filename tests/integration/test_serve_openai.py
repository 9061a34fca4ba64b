"""The HTTP server as OpenAI's own Python package sees it: over sockets, with an engine that needs no model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_engine import LOGPROB, MODEL, FakeEngine
from http_server import Running, http_server
from openai import AsyncOpenAI, OpenAI

from tsqp.errors import IntegrityError, TransportClosedError, TransportTimeoutError

HI: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Running]:
    with http_server(engine) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_a_completion(client: OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model=MODEL, prompt="Say", max_tokens=5, seed=7, temperature=0.5, top_p=0.9)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello", "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 5, 8)
    sampling = engine.submitted[0].sampling
    assert (sampling.seed, sampling.temperature, sampling.top_p) == (7, 0.5, 0.9)


def test_a_chat_is_rendered_by_the_models_template(client: OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    )
    assert answer.choices[0].message.content == "Hello, world"
    assert answer.choices[0].finish_reason == "stop"
    text = engine.tokenizer.decode(list(engine.submitted[0].prompt_ids))
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_chat_that_names_no_limit_gets_the_servers_where_there_is_room(engine: FakeEngine) -> None:
    for default in (40, 10_000):
        with (
            http_server(engine, default_tokens=default) as server,
            OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ):
            client.chat.completions.create(model=MODEL, messages=HI)
        engine.closed_with = None
    few, all_there_is = engine.submitted
    assert few.max_tokens == 40
    assert len(all_there_is.prompt_ids) + all_there_is.max_tokens == engine.context_length


def test_a_stream(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=HI, stream=True, max_completion_tokens=4))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hell"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_of_completions_ends_with_counts_if_asked(client: OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model=MODEL, prompt=["ab", "c"], stream=True, max_tokens=3, stream_options={"include_usage": True}
        )
    )
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "Hel", 1: "Hel"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 6)


def test_many_at_once_with_the_asynchronous_client(server: Running, engine: FakeEngine) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(count: int) -> str:
                stream = await client.completions.create(model=MODEL, prompt="x", max_tokens=count, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def whole() -> str:
                return (await client.completions.create(model=MODEL, prompt="x", max_tokens=2)).choices[0].text

            return await asyncio.gather(*(one(count) for count in range(1, 9)), whole())

    assert asyncio.run(ask()) == ["Hello, world"[:count] for count in range(1, 9)] + ["He"]
    engine.wait_until_idle()


def test_several_choices_have_random_numbers_of_their_own(client: OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", n=3, seed=10, max_tokens=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [generation.sampling.seed for generation in engine.submitted] == [10, 11, 12]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 3)


def test_stop_texts_and_extra_parameters_reach_the_engine(client: OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="x",
        stop=[",", "z"],
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "ignore_eos": True},
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello", "stop")
    [generation] = engine.submitted
    assert generation.stop == (",", "z")
    assert generation.ignore_end
    sampling = generation.sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.1, 1.5)


def test_logprobs_of_a_completion_with_its_prompt(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="ab", echo=True, logprobs=2, max_tokens=2)
    [choice] = answer.choices
    assert choice.text == "abHe"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "b", "H", "e"]
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    assert choice.logprobs.token_logprobs == [None, LOGPROB, LOGPROB, LOGPROB]
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[2]["H"] == LOGPROB
    assert len(choice.logprobs.top_logprobs[2]) == 2


def test_a_prompt_is_scored_without_generating(client: OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", echo=True, logprobs=1, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc", "length")
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs == [None, LOGPROB, LOGPROB]
    assert engine.submitted[0].prompt_logprobs


def test_logprobs_of_a_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HI, logprobs=True, top_logprobs=2, max_completion_tokens=2
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert [(entry.token, entry.bytes, entry.logprob) for entry in content] == [
        ("H", [72], LOGPROB),
        ("e", [101], LOGPROB),
    ]
    assert len(content[0].top_logprobs) == 2


def test_streamed_logprobs_are_those_of_the_whole_answer(client: OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="ab", echo=True, logprobs=1, max_tokens=4)
    tokens: list[str] = []
    for chunk in client.completions.create(model=MODEL, prompt="ab", echo=True, logprobs=1, max_tokens=4, stream=True):
        if chunk.choices[0].logprobs is not None:
            tokens += chunk.choices[0].logprobs.tokens or []
    assert whole.choices[0].logprobs is not None
    assert tokens == whole.choices[0].logprobs.tokens


@pytest.mark.parametrize("prompt", ["AB", ["AB"], [32, 33], [[32, 33]]])
def test_prompts_as_text_lists_ids_and_lists_of_ids(
    prompt: str | list[str] | list[int] | list[list[int]], client: OpenAI, engine: FakeEngine
) -> None:
    client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    assert [generation.prompt_ids for generation in engine.submitted] == [(32, 33)]


def test_a_worker_lost_before_the_answer_is_a_502_and_one_lost_in_a_stream_an_event(
    client: OpenAI, engine: FakeEngine
) -> None:
    engine.fail_after = 3
    engine.error = TransportTimeoutError("the worker did not answer.")
    with pytest.raises(openai.InternalServerError, match="did not answer") as caught:
        client.completions.create(model=MODEL, prompt="x")
    assert (caught.value.status_code, caught.value.type, caught.value.code) == (
        502,
        "worker_error",
        "worker_unavailable",
    )
    text = ""
    with pytest.raises(openai.APIError, match="did not answer"):  # noqa: PT012  what came before counts
        for chunk in client.completions.create(model=MODEL, prompt="x", stream=True):
            text += chunk.choices[0].text
    assert text == "Hel"
    engine.fail_after = None  # the worker is back
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=5).choices[0].text == "Hello"


def test_a_failed_check_is_an_error_of_its_own_that_no_client_retries(server: Running, engine: FakeEngine) -> None:
    engine.fail_after = 2
    engine.error = IntegrityError("linear:7: the product is wrong.")
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=3) as client,
        pytest.raises(openai.InternalServerError, match="linear:7") as caught,
    ):
        client.chat.completions.create(model=MODEL, messages=HI)
    assert (caught.value.status_code, caught.value.type, caught.value.code) == (
        500,
        "integrity_error",
        "integrity_error",
    )
    assert len(engine.submitted) == 1


def test_one_failed_generation_ends_the_others_of_its_request(client: OpenAI, engine: FakeEngine) -> None:
    engine.fail_after, engine.hold_after = 0, 0
    engine.error = TransportClosedError("gone.")
    engine.release()
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model=MODEL, prompt=["a", "b", "c"])
    engine.wait_until_idle()


def test_a_client_that_leaves_a_stream_cancels_it(client: OpenAI, engine: FakeEngine) -> None:
    engine.hold_after = 3
    engine._free = False
    with client.completions.create(model=MODEL, prompt="x", stream=True) as stream:
        assert next(iter(stream)).choices[0].text == "H"
    engine.wait_until_idle()
    assert engine.cancelled == [0]


def test_a_client_that_gives_up_waiting_cancels_its_request(client: OpenAI, engine: FakeEngine) -> None:
    engine.hold_after = 0
    engine._free = False
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(model=MODEL, prompt=["x", "y"])
    engine.wait_until_idle()
    assert sorted(engine.cancelled) == [0, 1]
    metrics = client._client.get(f"{client.base_url}".replace("/v1/", "/metrics")).text
    assert "tsqp_generations_failed_total{" not in metrics
