"""Runs a program under strace, as its manifest would, and tells what it opened and which system calls it made."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

STRACE = shutil.which("strace")
# They come thousands of times and are in Gramine's table.
_USUAL = (
    *("futex", "munmap", "madvise", "mprotect", "read", "write", "lseek", "close", "brk", "clock_gettime"),
    *("fstat", "newfstatat", "rt_sigaction", "rt_sigprocmask", "poll", "pread64", "sched_yield", "getrandom", "ioctl"),
    *("epoll_wait", "clock_nanosleep", "getpid", "gettid", "sendto", "recvfrom", "readlink", "getcwd", "getdents64"),
)
_CALL = re.compile(r"^\d+ +(\w+)\((.*)$")
_UNFINISHED = re.compile(r"^(\d+) +(\w+)\((.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>(.*)$")
_OPENED = re.compile(r'^(?:AT_FDCWD(?:<[^>]*>)?, )?"((?:[^"\\]|\\.)*)", ([A-Z_|0-9x]+).*\) += \d+')


@dataclass
class Trace:
    """What a process did.

    Attributes:
        opened: paths that were opened, and whether for writing.
        calls: names of system calls, with their arguments and results.
    """

    opened: dict[str, bool] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)

    @property
    def names(self) -> set[str]:
        """The system calls that were made."""
        return {name for name, _ in self.calls}


def read_trace(file: Path) -> Trace:
    """Read what strace wrote."""
    trace, cut = Trace(), dict[tuple[str, str], str]()
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := _UNFINISHED.match(line):
            cut[match[1], match[2]] = match[3]
            continue
        if match := _RESUMED.match(line):
            name, rest = match[2], cut.pop((match[1], match[2]), "") + match[3]
        elif match := _CALL.match(line):
            name, rest = match[1], match[2]
        else:
            continue
        trace.calls.append((name, rest))
        if name in ("open", "openat") and (opened := _OPENED.match(rest)):
            writes = bool({"O_WRONLY", "O_RDWR", "O_CREAT"} & set(opened[2].split("|")))
            trace.opened[opened[1]] = trace.opened.get(opened[1], False) or writes
    return trace


@contextmanager
def traced(
    words: Sequence[str], environment: Mapping[str, str], out: Path, folder: Path, ready: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """Run a program under strace for the time of a ``with`` block, which begins when it has printed ``ready``.

    Args:
        words: its command line.
        environment: all of it.
        out: where the trace goes; complete after the block, which stops the program if it still runs.
        folder: its working directory.
        ready: a part of a line of its output; empty to wait for its end.
    """
    strace = [
        str(STRACE),
        "-f",
        "-qq",
        "--seccomp-bpf",
        "-y",
        "-s",
        "300",
        "-o",
        str(out),
        "-e",
        f"trace=!{','.join(_USUAL)}",
    ]
    process = subprocess.Popen(
        [*strace, *words],
        cwd=folder,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        said: list[str] = []
        while not ready or not said or ready not in said[-1]:
            line = process.stdout.readline()
            if not line:
                assert not ready, "".join(said)
                assert process.wait() == 0, "".join(said)
                break
            said.append(line)
        yield process
        if process.poll() is None:
            os.kill(_child_of(process.pid), signal.SIGTERM)
            process.wait(60)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()[0])
