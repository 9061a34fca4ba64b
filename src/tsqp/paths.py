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


def user_socket_directory() -> Path:
    """Return where sockets of this user's processes have names that others of them know. It need not be there.

    ``tsqp`` in ``$XDG_RUNTIME_DIR`` where that is set and private, else ``tsqp-UID`` in the temporary directory.

    Raises:
        SetupError: there is no temporary directory, or ``$XDG_RUNTIME_DIR`` belongs to someone else or lets others in.
    """
    runtime = _runtime_directory()
    if runtime:
        return Path(runtime, "tsqp")
    try:
        return Path(tempfile.gettempdir(), f"tsqp-{os.getuid()}")
    except OSError as error:
        raise SetupError(f"cannot find a directory for sockets: {error.strerror}. Set XDG_RUNTIME_DIR.") from error


def make_private(directory: Path) -> None:
    """Make a directory that only this user can enter, if it is not there.

    Raises:
        SetupError: it cannot be made, or as ``check_private`` does.
    """
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        pass  # and is no directory
    except OSError as error:
        raise SetupError(f"cannot make the directory {directory}: {error.strerror}. Set XDG_RUNTIME_DIR.") from error
    check_private(directory)


def check_private(directory: Path) -> None:
    """Refuse a directory of known name that somebody else made, or could change: what is in it is not to be trusted.

    Raises:
        SetupError: it is a link or no directory, belongs to someone else, or lets others in.
    """
    status = directory.lstat()
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or mode & _OTHERS:
        kind = "directory" if stat.S_ISDIR(status.st_mode) else "link or file"
        raise SetupError(
            f"{directory} is not private to you ({kind}, owner {status.st_uid}, mode {mode:04o}): expected a directory "
            f"of owner {os.getuid()}, mode 0700. Remove it, or set XDG_RUNTIME_DIR to a directory of your own."
        )


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
