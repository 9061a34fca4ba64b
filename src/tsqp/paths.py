"""Where TSQP keeps files: the cache of converted models, and private directories for sockets."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsqp.errors import SetupError

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def cache_directory() -> Path:
    """Return the cache directory, ``$TSQP_CACHE`` or ``$XDG_CACHE_HOME/tsqp`` or ``~/.cache/tsqp``; create it."""
    chosen = os.environ.get("TSQP_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(chosen) if chosen else Path(base) / "tsqp"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"cannot create the cache directory {path}: {error.strerror}. Set TSQP_CACHE to a directory you can write."
        ) from error
    return path


@contextmanager
def private_socket_directory() -> Iterator[Path]:
    """Make a fresh directory only this user can enter (mode 0700), for the sockets of one run; remove it after.

    It lies in ``$XDG_RUNTIME_DIR`` where that is set and private, else in the temporary directory.

    Raises:
        SetupError: it cannot be made, or ``$XDG_RUNTIME_DIR`` belongs to someone else or lets others in.
    """
    parent = _runtime_directory()
    try:
        directory = tempfile.TemporaryDirectory(prefix="tsqp-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise SetupError(f"cannot make a directory for sockets in {parent or 'TMPDIR'}: {error.strerror}.") from error
    with directory as name:
        yield Path(name)


def _runtime_directory() -> str | None:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime or not Path(runtime).is_absolute() or not Path(runtime).is_dir():
        return None
    status = Path(runtime).stat()
    if status.st_uid != os.getuid() or status.st_mode & _OTHERS:
        raise SetupError(
            f"XDG_RUNTIME_DIR={runtime} is not private to you (owner {status.st_uid}, "
            f"mode {stat.S_IMODE(status.st_mode):04o}): expected owner {os.getuid()}, mode 0700. Fix or unset it."
        )
    return runtime
