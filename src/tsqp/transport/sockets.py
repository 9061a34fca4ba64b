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


def check_own(endpoint: Endpoint) -> None:
    """Refuse a socket that is not this user's alone, or in whose place somebody else could put one.

    Nothing but its path says who listens there. One that is not there is let be: to connect to it fails.

    Raises:
        SetupError: it is refused.
    """
    path = Path(endpoint.path)
    try:
        made, around = path.stat(), path.parent.stat()
    except OSError:
        return
    mode = stat.S_IMODE(made.st_mode)
    if made.st_uid != os.getuid() or mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SetupError(
            f"{endpoint} is not yours alone (owner {made.st_uid}, mode {mode:04o}): expected a socket of owner "
            f"{os.getuid()}, mode 0600, as a worker of yours makes it. To use another user's worker give its key, over "
            "ipc or tcp."
        )
    others_write = around.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not around.st_mode & stat.S_ISVTX
    if around.st_uid not in (os.getuid(), 0) or others_write:
        raise SetupError(
            f"others could put a socket of theirs in the place of {endpoint} (its directory has owner {around.st_uid}, "
            f"mode {stat.S_IMODE(around.st_mode):04o}): choose a directory that only you can write to."
        )


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
