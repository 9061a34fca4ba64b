"""The HTTP application: OpenAI's endpoints over an engine, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from pathlib import Path

import msgspec
from fastapi import FastAPI, Request
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tsqp.config import DEFAULT_TOKENS, ServeConfig
from tsqp.engine.api import Engine
from tsqp.serve import padding
from tsqp.serve.attestation import Identity
from tsqp.serve.bodies import error_response, json_response
from tsqp.serve.errors import ApiError
from tsqp.serve.gate import ATTESTATION, Gate
from tsqp.serve.keys import read_keys
from tsqp.serve.metrics import CONTENT_TYPE, Metrics
from tsqp.serve.served_model import ServedModel
from tsqp.serve.service import Service
from tsqp.serve.streams import EventStream

PAGE = Path(__file__).parent / "page"

View = AsyncIterable[Mapping[str, object]]


def create_app(
    engine: Engine,
    served_model: ServedModel,
    settings: ServeConfig,
    *,
    default_tokens: int = DEFAULT_TOKENS,
    view: View | None = None,
    identity: Identity | None = None,
) -> FastAPI:
    """Return the application. It does not close the engine; ``app.state.stopping`` ends streams that have no end.

    Args:
        engine: that continues prompts.
        served_model: what clients see of its model.
        settings: limits, keys and padding.
        default_tokens: how long an answer to a chat may be that names no limit.
        view: what a demonstration worker sees, for the page: JSON-able events, a new iteration for each reader. None
            offers nothing at ``/view``.
        identity: what answers ``/v1/attestation``; None where nothing is attested.

    Raises:
        SetupError: the file of API keys cannot be used.
    """
    metrics = Metrics(engine, served_model.name, served_model.level)
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        # It would tell paths, and exceptions with their texts, to a collector that the environment may name.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.stopping = asyncio.Event()
    _add_health(app, engine)
    if identity is not None:
        _add_attestation(app, identity)
    _add_api(app, Service(engine, served_model, settings, metrics, default_tokens), served_model)
    _add_own(app, engine, served_model, metrics, offers_view=view is not None)
    if view is not None:
        _add_view(app, view)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    if PAGE.is_dir():
        app.mount("/", StaticFiles(directory=PAGE, html=True))
    keys = read_keys(Path(settings.api_keys)) if settings.api_keys else None
    app.add_middleware(Gate, keys=keys, most=settings.max_requests, metrics=metrics)
    return app


def _add_health(app: FastAPI, engine: Engine) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        return json_response({"status": "ok"})

    @app.get("/readyz")
    async def readyz() -> Response:
        stats = engine.stats()
        if app.state.stopping.is_set():
            return json_response({"status": "not ready", "reason": "the server is stopping."}, status=503)
        if not stats.ready:
            return json_response({"status": "not ready", "reason": stats.reason}, status=503)
        return json_response({"status": "ready", "workers": stats.workers, "workers_usable": stats.workers_usable})


def _add_attestation(app: FastAPI, identity: Identity) -> None:
    @app.get(ATTESTATION)
    async def attestation(nonce: str | None = None) -> Response:
        return Response(await identity.evidence(nonce), media_type="application/json")


def _add_api(app: FastAPI, service: Service, model: ServedModel) -> None:
    described = {"id": model.name, "object": "model", "created": model.created, "owned_by": "tsqp"}

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [described]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        service.require_model(name)
        return json_response(described)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.complete(request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await service.chat(request)

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    async def nothing(rest: str) -> Response:
        raise HTTPException(404, f"this server has no /v1/{rest[:100]} of that method")


def _add_own(app: FastAPI, engine: Engine, model: ServedModel, metrics: Metrics, *, offers_view: bool) -> None:
    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/status")
    async def status() -> Response:
        own = {"model": model.name, "level": model.level, "view": offers_view}
        return json_response({**own, **dataclasses.asdict(engine.stats())})


def _add_view(app: FastAPI, view: View) -> None:
    @app.get("/view")
    async def read_view() -> Response:
        return EventStream(_view_events(view, app.state.stopping), lambda: None)


async def _view_events(view: View, stopping: asyncio.Event) -> AsyncIterator[bytes]:
    """Yield what a view tells until it ends, the server stops or the client goes; then the view's reader has ended."""
    stop = asyncio.ensure_future(stopping.wait())
    events = view.__aiter__()
    following = asyncio.ensure_future(_next(events))
    try:
        while True:
            await asyncio.wait({stop, following}, return_when=asyncio.FIRST_COMPLETED)
            found = None if stop.done() else following.result()
            if found is None:
                return
            yield padding.event(msgspec.json.encode(found), padded=False)
            following = asyncio.ensure_future(_next(events))
    finally:
        for task in (stop, following):
            task.cancel()
        await asyncio.gather(stop, following, return_exceptions=True)
        if isinstance(events, AsyncGenerator):
            await events.aclose()


async def _next(events: AsyncIterator[Mapping[str, object]]) -> Mapping[str, object] | None:
    return await anext(events, None)


async def _on_api_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Answer wrong paths and methods in OpenAI's form."""
    if not isinstance(error, HTTPException):
        raise error
    what = f"{request.method} {request.url.path[:100]}: {error.detail}."
    return error_response(ApiError(error.status_code, what, code="not_found", headers=error.headers))
