"""Who may ask what, and how many at once: the first code of ours that a request meets, and the last its answer does.

Three kinds of path: health checks and attestation are for everybody; the API wants a key where keys are set up;
everything else (the page, ``/status``, ``/view``, ``/metrics``) is for this machine, or for who has a key.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import logging
import os
import re
import time
import traceback

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tsqp import logs
from tsqp.engine.api import NO_OWNER
from tsqp.serve.bodies import error_response
from tsqp.serve.errors import ApiError, too_many, unexpected
from tsqp.serve.keys import ApiKeys
from tsqp.serve.metrics import Metrics

HEALTH = ("/healthz", "/readyz")
# Asked before a client trusts this server with a key.
ATTESTATION = "/v1/attestation"
GENERATING = ("/v1/completions", "/v1/chat/completions")
_KNOWN_PATHS = (*HEALTH, ATTESTATION, *GENERATING, "/v1/models", "/metrics", "/status", "/view")
_API = "/v1/"
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# Of our own making for each request: one that a client sends is not taken up, since it could be anything.
REQUEST_ID = "x-request-id"
_ID_BYTES = 8
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")
_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[^:]*)(:\d+)?")
_SAFETY = {
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

log = logging.getLogger(__name__)


class Gate:
    """ASGI middleware.

    Args:
        app: behind it.
        keys: that are accepted; None asks for none, and lets in only who addresses this machine by a loopback name.
        most: requests for text at once.
        metrics: told of every request.
    """

    def __init__(self, app: ASGIApp, *, keys: ApiKeys | None, most: int, metrics: Metrics) -> None:
        self._app, self._keys, self._most, self._metrics = app, keys, most, metrics
        self._generating = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in or refuse it; log its end; let no exception out, whose text may quote a prompt."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, identity = time.monotonic(), os.urandom(_ID_BYTES).hex()
        answer, before = _Answer(send, identity), logs.request_id.set(identity)
        try:
            await self._guarded(scope, receive, answer)
        except ApiError as error:
            await error_response(error)(scope, receive, answer)
        except Exception as error:  # noqa: BLE001  nothing below says more than where
            log.error("unexpected %s at %s", type(error).__name__, _where(error))  # noqa: TRY400  the text may quote
            if not answer.status:
                await error_response(unexpected())(scope, receive, answer)
        finally:
            path = scope["path"] if scope["path"] in _KNOWN_PATHS else "other"
            self._metrics.requests.labels(path, str(answer.status or "none")).inc()
            method = scope["method"] if scope["method"] in _METHODS else "other method"
            log.log(
                logging.INFO if path.startswith(_API) else logging.DEBUG,
                "%s %s %s",
                method,
                path,
                answer.status or "without an answer",
                extra={"duration_s": round(time.monotonic() - started, 6)},
            )
            logs.request_id.reset(before)

    async def _guarded(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        path = scope["path"]
        if path not in (*HEALTH, ATTESTATION):
            owner = self._owner(Request(scope), api=path.startswith(_API))
            scope.setdefault("state", {})["owner"] = owner
        if path not in GENERATING or scope["method"] != "POST":
            await self._app(scope, receive, answer)
            return
        if self._generating >= self._most:
            raise too_many(
                f"{self._most} requests are being answered, the most this server takes.", "too_many_requests"
            )
        self._generating += 1
        self._metrics.in_flight.set(self._generating)
        try:
            await self._app(scope, receive, answer)
        finally:
            self._generating -= 1
            self._metrics.in_flight.set(self._generating)

    def _owner(self, request: Request, *, api: bool) -> str:
        """Return who asks.

        Raises:
            ApiError: nobody who may.
        """
        if self._keys is None:
            if is_local(request):
                return NO_OWNER
            raise ApiError(
                403,
                "this server has no API keys, so it answers only who addresses it as localhost on its own machine.",
                code="not_local",
            )
        key = given_key(request.headers)
        owner = self._keys.owner(key) if key is not None else None
        if owner is not None:
            return owner
        if key is None and not api and is_local(request):
            return NO_OWNER
        scheme = "Bearer" if api else 'Basic realm="tsqp", charset="UTF-8"'
        message = "no API key was given: send 'Authorization: Bearer KEY'." if key is None else "unknown API key."
        raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": scheme})


class _Answer:
    """``send`` that remembers the status and adds the request's id, and headers which no browser should do without."""

    def __init__(self, send: Send, identity: str) -> None:
        self._send, self._identity = send, identity
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[REQUEST_ID] = self._identity
            for name, value in _SAFETY.items():
                headers.setdefault(name, value)
        await self._send(message)


def given_key(headers: Headers) -> str | None:
    """Return the key of a request: Bearer, or as the password of Basic, which browsers ask people for."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode(errors="replace").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return None


def is_local(request: Request) -> bool:
    """Tell whether a request comes from this machine and was meant for it.

    The name it was sent to counts too: a web page of somebody else can make a browser here ask, under the name of that
    page (DNS rebinding). A proxy on this machine that says for whom it asks does not make its clients local.
    """
    if request.client is None or any(name in request.headers for name in _FORWARDED):
        return False
    match = _HOST.fullmatch(request.headers.get("host", ""))
    return _is_loopback(request.client.host) and match is not None and _is_loopback(match["name"].strip("[]"))


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else "an unknown place"
