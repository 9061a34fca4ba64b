"""UNIX sockets: who may enter, and whether a path is free. Secret files: who may read."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from tsqp.errors import SetupError
from tsqp.transport.urls import Endpoint


@contextlib.contextmanager
def owner_only() -> Iterator[None]:
    """Give sockets bound and files made meanwhile mode 0600."""
    mask = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(mask)


def check_free(endpoint: Endpoint) -> None:
    """Refuse a path that holds a live socket or any other file; binding would silently take its place.

    Raises:
        SetupError: the path is taken.
    """
    path = Path(endpoint.path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise SetupError(f"cannot listen on {endpoint}: {error.strerror}.") from error
    if not stat.S_ISSOCK(mode):
        raise SetupError(f"cannot listen on {endpoint}: a file that is no socket is there.")
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as probe:
            refused = probe.connect_ex(str(path))
        # Nobody listens, or not this kind of socket; anything else (no permission, a full backlog) means someone does.
        if refused not in (errno.ECONNREFUSED, errno.EPROTOTYPE):
            raise SetupError(
                f"{endpoint} is already in use by another process. Stop it or listen elsewhere (--listen)."
            )
