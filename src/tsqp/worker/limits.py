"""Bounds on a worker's process: beyond its memory it ends at once, and whoever started it starts it again.

A peer can make libzmq hold what no option of it bounds: the frames of a message without end, a frame of the allowed
size on each of many connections, replies that are not taken. None of that can be given back by this process, so a
thread looks at its memory and ends it before the machine has none. What counts is memory of the process's own: not
files that are mapped, which the system can drop, and not shared memory, which belongs to clients. The same thread says
when no descriptor is left, since libzmq keeps silent about clients that it cannot accept.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import psutil

from tsqp.errors import ConfigError

# What the process ends with; no other way of ending has this code.
MEMORY_EXIT_CODE = 6
# A peer on this machine sends some gigabytes in a second.
_LOOK_S = 0.05
_LOOKS_AT_MEMORY = 20  # for each at descriptors
# What may come on top of a loaded model: the products and messages of honest clients, and a good deal more.
_LEAST_ROOM = 4 << 30
_MESSAGES = 8
_PAGE = os.sysconf("SC_PAGE_SIZE")
_STATM = "/proc/self/statm"

_log = logging.getLogger(__name__)


@contextmanager
def watched(memory_bytes: int | None, max_message_bytes: int) -> Iterator[Limits]:
    """Watch this process for the time of a ``with`` block; args and errors are those of ``Limits``."""
    limits = Limits(memory_bytes, max_message_bytes)
    limits.start()
    try:
        yield limits
    finally:
        limits.stop()


class Limits:
    """Watches this process from ``start`` to ``stop``.

    Until ``loaded`` only the machine is kept from running out: how much a model takes is not known.

    Args:
        memory_bytes: as the user said; None for what is resident once the model is loaded, and room beside it.
        max_message_bytes: the longest frame of a message.

    Attributes:
        memory_bytes: at which the process ends; None where the system does not tell its memory.

    Raises:
        ConfigError: a limit was asked for and cannot be watched here.
    """

    def __init__(self, memory_bytes: int | None, max_message_bytes: int) -> None:
        self._asked, self._room = memory_bytes, max(_LEAST_ROOM, _MESSAGES * max_message_bytes)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="limits", daemon=True)
        self.memory_bytes: int | None = None
        try:
            # Kept open: a process without a free descriptor is watched too.
            self._statm = os.open(_STATM, os.O_RDONLY | os.O_CLOEXEC)
            most = self.own_bytes() + psutil.virtual_memory().available * 9 // 10
            self.memory_bytes = max(most, memory_bytes or 0)
        except (OSError, ValueError, IndexError):
            if memory_bytes is not None:
                raise ConfigError(
                    f"this system does not tell a process's memory ({_STATM}), so it cannot be bounded: leave out "
                    "--memory-limit."
                ) from None

    def start(self) -> None:
        """Begin."""
        if self.memory_bytes is not None:
            self._thread.start()

    def stop(self) -> None:
        """End the watch. Not for a second time."""
        self._over.set()
        if self.memory_bytes is not None:
            self._thread.join()
            os.close(self._statm)

    def loaded(self) -> None:
        """Take note that the model is loaded: from now on the limit holds.

        Raises:
            ConfigError: the model alone is beyond it.
        """
        if self.memory_bytes is None:
            return
        own = self.own_bytes()
        if self._asked is None:
            self.memory_bytes = own + min(self._room, psutil.virtual_memory().available * 3 // 4)
        elif self._asked <= own:
            raise ConfigError(
                f"--memory-limit {self._asked}: the model alone takes {own} bytes here. Give that and room for "
                "messages and products, or leave it out."
            )
        else:
            self.memory_bytes = self._asked

    def own_bytes(self) -> int:
        """Return how much memory of this process is resident, and neither of a file nor shared."""
        words = os.pread(self._statm, 256, 0).split()
        return (int(words[1]) - int(words[2])) * _PAGE

    def _watch(self) -> None:
        looks, told = 0, False
        while not self._over.wait(_LOOK_S):
            own = self.own_bytes()
            if self.memory_bytes is not None and own > self.memory_bytes:
                _end(own, self.memory_bytes)
            looks += 1
            if looks % _LOOKS_AT_MEMORY == 0:
                told = _tell_descriptors(told=told)


def _tell_descriptors(*, told: bool) -> bool:
    """Say that no file descriptor is left, if that was not said yet; return whether it is so."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if not told:
            _log.warning(
                "no file descriptor is left (%s): clients that are connected are served, others wait until some of "
                "them go. Allow more (ulimit -n, LimitNOFILE), or let only those in that you know (--allow).",
                error.strerror,
            )
        return True
    return False


def _end(own: int, limit: int) -> NoReturn:
    """Say why, and end without clean-up, which would want memory and time."""
    sentence = (
        f"error: this process took {own >> 20} MB of memory, and its limit is {limit >> 20} MB (--memory-limit): "
        f"it ends with exit code {MEMORY_EXIT_CODE}, to be started again. A client that sends without end does this; "
        "--allow lets only those in that you know.\n"
    )
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, sentence.encode())
    os._exit(MEMORY_EXIT_CODE)
