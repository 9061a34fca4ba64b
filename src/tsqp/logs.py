"""What a worker, a dealer or a server logs, to standard error: one line for each event, for people or as JSON.

Events are those of the standard library's ``logging``. Nothing of a prompt, an answer, a key or a tensor is logged at
any level. Who logs sees to that by giving counts, times and names of ours; this module by what it leaves out: the text
of an error that is not ours, which may quote what it failed on; and what others' packages say below a warning, or after
the first line of a message, where asyncio quotes results and errors.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from contextlib import suppress
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any, Literal

from tsqp.errors import TsqpError

LEVELS = ("debug", "info", "warning", "error")
FORMS = ("text", "json")
# What a record may carry beside its message: given as ``extra``, or for all that is done for a request of HTTP.
FIELDS = ("request_id", "client", "duration_s")
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
# Sentences for who started the program; as text they stand alone.
NOTICES = "tsqp.notices"
_OURS = "tsqp"
_LABELS = {"request_id": "request"}


class _Handler(logging.Handler):
    """Writes to what standard error is at the time: progress bars put something of their own there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line. A record that cannot be written is dropped: to say why would quote it."""
        with suppress(Exception):
            print(self.format(record), file=sys.stderr, flush=True)  # noqa: T201


class JsonFormatter(logging.Formatter):
    """One object: time (UTC), level, logger, message, what there is of ``FIELDS``, of an error its type and place."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **_fields(record),
        }
        error = _error(record)
        if error is not None:
            entry |= {"error": type(error).__name__, "error_message": _text(error), "error_at": _places(error)}
        return json.dumps({name: value for name, value in entry.items() if value != ""})


class TextFormatter(logging.Formatter):
    """Time, level and message, and in brackets what there is of ``FIELDS``; a notice is its sentence alone."""

    default_time_format = "%H:%M:%S"
    default_msec_format = None

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        line = _message(record)
        error = _error(record)
        if error is not None:
            said = _text(error)
            line += f": {type(error).__name__}{': ' if said else ''}{said}, at {_places(error)}"
        if record.name != NOTICES:
            line = f"{self.formatTime(record)} {record.levelname.lower():7} {line}"
        details = _fields(record)
        if duration_s := details.pop("duration_s", None):
            details["took"] = f"{1000 * duration_s:.1f} ms" if duration_s < 1 else f"{duration_s:.2f} s"
        if details:
            line += f" ({', '.join(f'{_LABELS.get(name, name)} {value}' for name, value in details.items())})"
        return "".join(character if character.isprintable() else "?" for character in line)


def set_up(level: str, written_as: str) -> None:
    """Log to standard error from now on. May be called again.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``: of our own modules. Others are heard from ``warning`` on.
        written_as: ``text`` or ``json``.
    """
    handler = _Handler()
    handler.setFormatter(JsonFormatter() if written_as == "json" else TextFormatter())
    root = logging.getLogger()
    for before in [each for each in root.handlers if isinstance(each, _Handler)]:
        root.removeHandler(before)
    root.addHandler(handler)
    root.setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    logging.getLogger(_OURS).setLevel(level.upper())


def form() -> Literal["json", "text"] | None:
    """Return how this process logs; None where it does not, and prints what it has to say."""
    ours = [each.formatter for each in logging.getLogger().handlers if isinstance(each, _Handler)]
    return ("json" if isinstance(ours[0], JsonFormatter) else "text") if ours else None


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    found = {name: getattr(record, name, None) for name in FIELDS}
    if found["request_id"] is None:
        found["request_id"] = request_id.get()
    return {name: value for name, value in found.items() if value is not None}


def _message(record: logging.LogRecord) -> str:
    said = record.getMessage()
    ours = record.name == _OURS or record.name.startswith(f"{_OURS}.")
    return said if ours else said.partition("\n")[0]


def _error(record: logging.LogRecord) -> BaseException | None:
    return record.exc_info[1] if record.exc_info else None


def _text(error: BaseException) -> str:
    """Return what an error says, if it is ours: our sentences carry no value of a tensor, and no prompt."""
    return str(error) if isinstance(error, TsqpError) else ""


def _places(error: BaseException) -> str:
    """Return where an error came from, innermost first."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return ", ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in frames) or "an unknown place"
