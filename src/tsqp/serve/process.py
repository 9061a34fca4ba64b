"""Keeps a process's memory to itself: it holds prompts, so no core dump of it may be written."""

from __future__ import annotations

import ctypes
import errno
import resource
import sys
from pathlib import Path

from tsqp.errors import SetupError

_PR_SET_DUMPABLE = 4
# Under Gramine, and not on Linux.
_GRAMINE = Path("/dev/attestation")


def forbid_core_dumps() -> None:
    """Let no core dump of this process be written.

    On Linux, other processes of the same user can no longer read its memory either. Gramine has no such call, and needs
    none in SGX, whose memory no process reads; without SGX it is for development.

    Raises:
        SetupError: the system refuses.
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ValueError, OSError) as error:
        raise SetupError(f"core dumps cannot be turned off ({error}); prompts could end up in one.") from error
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            if ctypes.get_errno() == errno.ENOSYS and _GRAMINE.is_dir():
                return
            raise SetupError(f"core dumps cannot be turned off (prctl: errno {ctypes.get_errno()}).")
