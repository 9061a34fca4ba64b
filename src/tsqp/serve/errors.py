"""What clients are told when something goes wrong: error objects in OpenAI's form, and their status codes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tsqp.engine.api import ClosingError, LogitsError, QueueFullError
from tsqp.errors import (
    AbsentPeerError,
    DeviceMemoryError,
    HostileError,
    InputError,
    IntegrityError,
    InternalError,
    TransportError,
    TsqpError,
)

INVALID = "invalid_request_error"
SERVER = "server_error"
RETRY_AFTER_S = 1
# OpenAI's clients try 409, 429 and 5xx again unless this header says no.
_NO_RETRY = {"x-should-retry": "false"}
_LATER = {"retry-after": str(RETRY_AFTER_S)}
_NAMED = re.compile(r"([a-z][a-z_]*) is ")


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: a sentence for people; never a prompt.
        kind: OpenAI's ``type``.
        code: OpenAI's ``code``.
        param: the parameter at fault.
        headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """Return the error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def refused(param: str, message: str, *, code: str | None = None) -> ApiError:
    """Return the error for a parameter that is wrong."""
    return ApiError(400, message, param=param, code=code)


def too_many(message: str, code: str) -> ApiError:
    """Return the error for more than the server takes at once."""
    return ApiError(429, message, kind="rate_limit_error", code=code, headers=_LATER)


def stopping() -> ApiError:
    """Return the error of a request that the end of the server cut off."""
    return ApiError(503, "the server is stopping; try again later.", kind=SERVER, code="stopping", headers=_LATER)


def unexpected() -> ApiError:
    """Return the error for a bug of ours: nothing about it, since its text may quote a prompt."""
    return ApiError(500, "an unexpected error; please report it.", kind=SERVER, code="internal_error")


def at_submission(error: TsqpError) -> ApiError:
    """Return what a client is told whose request the engine did not take: no part of it has been computed."""
    answer = from_engine(error)
    if isinstance(error, (HostileError, TransportError, AbsentPeerError)):
        answer.status, answer.code = 503, "not_ready"
    return answer


def from_engine(error: TsqpError) -> ApiError:
    """Return what a client is told about an error of the engine or of its link to the worker."""
    text = str(error)
    if isinstance(error, InputError):
        named = _NAMED.match(text)
        return refused(named[1] if named else "prompt", text)
    if isinstance(error, QueueFullError):
        return too_many(text, "queue_full")
    if isinstance(error, HostileError):
        kind = "integrity_error" if isinstance(error, IntegrityError) else "protocol_error"
        return ApiError(500, text, kind=kind, code=kind, headers=_NO_RETRY)
    if isinstance(error, (TransportError, AbsentPeerError)):
        return ApiError(502, text, kind="worker_error", code="worker_unavailable", headers=_LATER)
    if isinstance(error, ClosingError):
        return stopping()
    return _of_this_server(error, text)


def _of_this_server(error: TsqpError, text: str) -> ApiError:
    if isinstance(error, (InternalError, LogitsError)):
        code = "invalid_logits" if isinstance(error, LogitsError) else "internal_error"
        return ApiError(500, text, kind=SERVER, code=code, headers=_NO_RETRY)
    code = "out_of_memory" if isinstance(error, DeviceMemoryError) else "not_ready"
    return ApiError(503, text, kind=SERVER, code=code, headers=_LATER)
