"""Bodies of requests, bounded in size and time, and JSON answers."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tsqp.serve import padding
from tsqp.serve.errors import ApiError

BODY_TIMEOUT_S = 60.0
# So much of a body that is too large is read and thrown away: a client that is still sending would not see the answer.
_DISCARDED = 16


async def read_body(request: Request, limit_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """Return a request's body.

    Args:
        request: a POST of JSON. Other types are refused: browsers send those for any web page without asking first.
        limit_bytes: so much at most.
        timeout_s: for all of it.

    Raises:
        ApiError: 415 another type, 413 too large, 408 too slow, 400 cut off.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the body with 'Content-Type: application/json'.", code="unsupported_media_type")
    try:
        return await asyncio.wait_for(_read(request, limit_bytes), timeout_s)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} seconds.", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the connection was closed before the body was complete.", code="incomplete") from None


async def _read(request: Request, limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit_bytes:
            parts.clear()
        else:
            parts.append(part)
        if size > _DISCARDED * limit_bytes:
            break
    if size > limit_bytes:
        raise ApiError(
            413,
            f"the body is larger than {limit_bytes} bytes, the most this server takes.",
            code="body_too_large",
            headers={"connection": "close"},
        )
    return b"".join(parts)


def json_response(content: object, *, padded: bool = False, status: int = 200) -> Response:
    """Return a JSON answer."""
    data = padding.body(msgspec.json.encode(content), padded=padded)
    return Response(data, status_code=status, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """Return an error as its answer."""
    data = msgspec.json.encode(error.body())
    return Response(data, status_code=error.status, media_type="application/json", headers=error.headers)
