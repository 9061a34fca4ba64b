"""Answers requests for text: from a body to generations, and from an engine's events to an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tsqp.config import ServeConfig
from tsqp.engine.api import Engine, Failed, Generation
from tsqp.errors import InputError, TsqpError
from tsqp.serve import padding
from tsqp.serve.answers import ChatForm, CompletionForm, Form, Outcome
from tsqp.serve.bodies import json_response, read_body
from tsqp.serve.choices import Choice, Piece, Prompt
from tsqp.serve.errors import ApiError, at_submission, from_engine, refused, stopping
from tsqp.serve.metrics import Metrics
from tsqp.serve.prompts import answer_tokens, as_generation_error, chat_prompt, completion_prompts
from tsqp.serve.running import Running
from tsqp.serve.schemas import (
    DEFAULT_COMPLETION_TOKENS,
    Asked,
    ChatRequest,
    CompletionRequest,
    parse_chat,
    parse_completion,
)
from tsqp.serve.served_model import ServedModel
from tsqp.serve.streams import ClientGoneError, EventStream, while_connected

# Nobody reads it: the client has gone. nginx logs this number for the same.
_CLIENT_GONE = 499
_DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class _Job:
    """One request, ready to run."""

    form: Form
    asked: Asked
    choices: Sequence[Choice]
    generations: Sequence[Generation]
    padded: bool

    @property
    def counted(self) -> bool:
        options = self.asked.stream_options
        return options is not None and options.include_usage


@dataclass(frozen=True, slots=True)
class _Plan:
    """What both kinds of request become before anything is generated."""

    asked: Asked
    prompts: Sequence[Prompt]
    max_tokens: int | None
    default_tokens: int
    logprobs: int | None
    echo: bool = False


class Service:
    """The two endpoints that generate.

    Args:
        engine: that continues prompts.
        model: what it runs.
        settings: limits and padding.
        metrics: told the times of tokens.
        default_tokens: how long an answer to a chat may be that names no limit.
    """

    def __init__(
        self, engine: Engine, model: ServedModel, settings: ServeConfig, metrics: Metrics, default_tokens: int
    ) -> None:
        self._engine, self._model, self._settings, self._metrics = engine, model, settings, metrics
        self._default_tokens = default_tokens
        self._padded = (settings.padding or ("on" if model.level == "masked" else "off")) == "on"

    def require_model(self, name: str) -> None:
        """Refuse the name of another model.

        Raises:
            ApiError: it is another.
        """
        if name != self._model.name:
            raise ApiError(
                404,
                f"the model {name[:64]!r} does not exist here; this server has {self._model.name!r}.",
                code="model_not_found",
                param="model",
            )

    async def complete(self, request: Request) -> Response:
        """Answer ``POST /v1/completions``."""
        asked = parse_completion(await read_body(request, self._settings.max_body_bytes))
        self.require_model(asked.model)
        plan = await asyncio.to_thread(self._completion_plan, asked)
        form = CompletionForm(
            self._model.name, self._model.vocabulary, counted=_counted(asked), logprobs=asked.logprobs is not None
        )
        return await self._answer(request, self._job(request, plan, form))

    async def chat(self, request: Request) -> Response:
        """Answer ``POST /v1/chat/completions``."""
        asked = parse_chat(await read_body(request, self._settings.max_body_bytes))
        self.require_model(asked.model)
        plan = await asyncio.to_thread(self._chat_plan, asked)
        form = ChatForm(self._model.name, self._model.vocabulary, counted=_counted(asked), logprobs=asked.logprobs)
        return await self._answer(request, self._job(request, plan, form))

    def _completion_plan(self, asked: CompletionRequest) -> _Plan:
        prompts = completion_prompts(asked.prompt, self._model.vocabulary, self._settings.max_choices)
        return _Plan(asked, prompts, asked.max_tokens, DEFAULT_COMPLETION_TOKENS, asked.logprobs, asked.echo)

    def _chat_plan(self, asked: ChatRequest) -> _Plan:
        most = asked.max_completion_tokens if asked.max_tokens is None else asked.max_tokens
        logprobs = asked.top_logprobs if asked.logprobs else None
        return _Plan(asked, [chat_prompt(asked, self._model)], most, self._default_tokens, logprobs)

    def _job(self, request: Request, plan: _Plan, form: Form) -> _Job:
        asked = plan.asked
        if len(plan.prompts) * asked.n > self._settings.max_choices:
            raise refused(
                "n",
                f"{len(plan.prompts)} prompts times n = {asked.n}: at most {self._settings.max_choices} choices are "
                "allowed in one request.",
            )
        stats = self._engine.stats()
        room = min(self._engine.context_length, stats.blocks_total * stats.block_tokens)
        choices: list[Choice] = []
        generations: list[Generation] = []
        for prompt in plan.prompts:
            tokens = answer_tokens(prompt, plan.max_tokens, plan.default_tokens, room)
            for place in range(asked.n):
                choices.append(Choice(len(choices), prompt, self._model.vocabulary, echo=plan.echo))
                generations.append(_generation(plan, prompt, tokens, place, request.state.owner))
        options = asked.stream_options
        wish = options.include_obfuscation if options else None
        return _Job(form, asked, choices, generations, self._padded if wish is None else wish)

    async def _answer(self, request: Request, job: _Job) -> Response:
        running = Running(self._engine, self._metrics)
        try:
            await running.submit(job.generations)
        except TsqpError as error:
            raise at_submission(error) from None
        if job.asked.stream:
            return EventStream(_streamed(job, running), running.cancel)
        try:
            outcomes = await while_connected(request.receive, _collected(job, running))
        except ClientGoneError:
            return Response(status_code=_CLIENT_GONE)
        finally:
            running.cancel()
        return json_response(job.form.whole(outcomes), padded=job.padded)


def _counted(asked: Asked) -> bool:
    return asked.stream_options is not None and asked.stream_options.include_usage


def _generation(plan: _Plan, prompt: Prompt, tokens: int, place: int, owner: str) -> Generation:
    asked = plan.asked
    try:
        return Generation(
            prompt_ids=prompt.ids,
            max_tokens=tokens,
            sampling=asked.sampling(plan.logprobs, place),
            stop=asked.stops,
            prompt_logprobs=plan.echo and plan.logprobs is not None,
            ignore_end=asked.ignore_eos,
            owner=owner,
        )
    except InputError as error:
        raise as_generation_error(error) from None


async def _pieces(job: _Job, running: Running) -> AsyncIterator[tuple[Choice, Piece]]:
    """Yield what each event adds to its choice.

    Raises:
        ApiError: a generation failed; the others of the request end with it.
    """
    async for place, event in running.events():
        if isinstance(event, Failed):
            raise running.failed((from_engine if event.begun else at_submission)(event.error))
        choice = job.choices[place]
        piece = choice.advance(event)
        if piece is not None and piece.finish == "cancelled":
            raise running.failed(stopping())
        if piece is not None:
            yield choice, piece


async def _collected(job: _Job, running: Running) -> list[Outcome]:
    """Return whole choices, in their order."""
    pieces: dict[int, list[Piece]] = {choice.index: [] for choice in job.choices}
    async for choice, piece in _pieces(job, running):
        pieces[choice.index].append(piece)
    return [Outcome(choice, _joined(pieces[choice.index])) for choice in job.choices]


def _joined(pieces: Sequence[Piece]) -> Piece:
    text = "".join(piece.text for piece in pieces)
    return Piece(text, tuple(token for piece in pieces for token in piece.tokens), pieces[-1].finish)


async def _streamed(job: _Job, running: Running) -> AsyncIterator[bytes]:
    """Yield the events of a stream; an error is the last of them, and then there is no [DONE]."""

    def event(content: object) -> bytes:
        return padding.event(msgspec.json.encode(content), padded=job.padded)

    for choice in job.choices:
        opening = job.form.opening(choice.index)
        if opening is not None:
            yield event(opening)
    try:
        async for choice, piece in _pieces(job, running):
            yield event(job.form.chunk(choice.index, piece))
    except ApiError as error:
        yield event(error.body())
        return
    if job.counted:
        yield event(job.form.last(job.choices))
    yield padding.event(_DONE, padded=job.padded)
