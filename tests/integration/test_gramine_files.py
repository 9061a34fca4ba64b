"""Programs as in the enclave, traced: each file they open is covered by the manifest, each system call is Gramine's.

They run with the manifest's own environment from a tree of links to the files that ``runtime_tree`` would copy, so that
what is missing there is missing here. What Gramine itself brings or shows is listed, with what it does not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import runtime_tree
from gramine_manifests import LOCAL, ROOT, RUNNER, SERVER, measured, parsed, passed_through
from gramine_traces import STRACE, Trace, read_trace, traced
from real_serving import speaking_checkpoint
from workers import free_port, packed_tiny, running_worker

pytestmark = pytest.mark.skipif(
    STRACE is None or sys.platform != "linux", reason="strace is not installed: what programs open is not traced"
)
# What Gramine's own file systems show, by its 1.9 sources (libos/src/fs/proc, sys, dev).
SHOWN = re.compile(
    r"/proc/(self|\d+)/(maps|stat|statm|status|cmdline|fd)|/proc/(cpuinfo|meminfo|stat)"
    r"|/sys/devices/system/(cpu|node)(/.*)?|/dev/(null|zero|urandom|random)"
)
# Gramine has none of these, and a program goes on without; each was missing in the chroot of docs/gramine.md.
NOT_NEEDED = {
    "/etc/ld.so.cache": "the manifest's LD_LIBRARY_PATH takes its place",
    "/etc/ld.so.preload": "the same",
    "/etc/localtime": "times are in UTC",
    "/etc/nsswitch.conf": "glibc's default serves",
    "/usr/lib/ssl/openssl.cnf": "OpenSSL's defaults serve",
    "/proc/self/cgroup": "the number of threads is the manifest's",
    "/proc/self/environ": "the environment is the manifest's",
    "/proc/self/limits": "a metric less",
    "/proc/self/mountinfo": "the number of threads is the manifest's",
}
NOT_NEEDED_BELOW = ("/sys/fs/cgroup", "/usr/lib/locale", "/usr/share/locale", "/usr/share/zoneinfo")
NOT_NEEDED_ANYWHERE = re.compile(r".*/(gconv-modules(\.cache)?|gconv-modules\.d|openssl\.cnf)")
# Gramine's table has no function for them (libos/src/arch/x86_64/libos_table.c), of those that a program may meet.
_MISSING = """
mremap shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd msgrcv msgctl flock link symlink
getrusage times ptrace setreuid setregid setresuid setfsuid rt_sigqueueinfo utime personality prctl mount
io_setup io_submit timer_create timerfd_create mq_open set_mempolicy get_mempolicy add_key keyctl inotify_init
inotify_init1 inotify_add_watch linkat symlinkat unshare splice tee vmsplice utimensat signalfd signalfd4
preadv pwritev perf_event_open name_to_handle_at setns process_vm_readv renameat2 seccomp memfd_create
execveat userfaultfd membarrier copy_file_range preadv2 pwritev2 pkey_alloc statx rseq pidfd_send_signal
io_uring_setup pidfd_open clone3 close_range openat2 faccessat2 epoll_pwait2
"""
MISSING_CALLS = frozenset(_MISSING.split())
# Made all the same, and answered with ENOSYS there.
GOES_ON = {
    "clone3": "glibc makes threads with clone then, and Gramine's never tries it",
    "mremap": "glibc's realloc copies instead",
    "prctl": "names of threads; serve/process.py says what else",
    "rseq": "glibc goes on without",
    "statx": "Rust's library takes fstat instead",
}
NEW_PROCESSES = {"fork", "vfork"}


@dataclass(frozen=True)
class Inside:
    """Where what the manifest mounts lies on this machine."""

    tree: Path
    models: Path
    tmp: Path

    def environment(self, manifest: Mapping[str, object], **host: str) -> dict[str, str]:
        """Return the environment that the manifest gives, with what of the host's it lets through."""
        assert set(host) <= passed_through(manifest)
        values = {**measured(manifest), **host}
        return {name: self._outside(value) for name, value in values.items()}

    def _outside(self, value: str) -> str:
        places = {"/opt/tsqp": self.tree, "/models": self.models, "/tmp": self.tmp}  # noqa: S108
        return re.sub(r"^(/opt/tsqp|/models|/tmp)\b", lambda at: str(places[at[1]]), value.removeprefix("/lib:"))

    def words(self, manifest: Mapping[str, object]) -> list[str]:
        """Return the program's command line."""
        argv: list[str] = manifest["loader"]["argv"]  # type: ignore[index]
        return [word.replace("/opt/tsqp", str(self.tree)).removeprefix("/app/") for word in argv]

    def uncovered(self, trace: Trace) -> dict[str, bool]:
        """Return what was opened that no mount covers, and whatever but /tmp was opened for writing."""
        return {path: writes for path, writes in trace.opened.items() if not self._covers(Path(path), writes=writes)}

    def _covers(self, path: Path, *, writes: bool) -> bool:
        name = os.path.normpath(path)
        if name.startswith(f"{self.tmp}/") or name == str(self.tmp) or name == "/dev/null":
            return True
        if writes:
            return False
        if path.name.partition(".so")[0] in runtime_tree.GLIBC and ".so" in path.name:
            return True
        if any(name == str(mount) or name.startswith(f"{mount}/") for mount in (self.tree, self.models)):
            return True
        if SHOWN.fullmatch(name) or name in NOT_NEEDED or NOT_NEEDED_ANYWHERE.fullmatch(name):
            return True
        return name.startswith(NOT_NEEDED_BELOW) or path.name in {"tee_runner.py", "server.py"}


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Inside:
    top = tmp_path_factory.mktemp("enclave")
    for place, source in runtime_tree.planned().items():
        target = top / "tree" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if place == "bin/python3":  # Python looks for its library beside the file that a link leads to
            shutil.copy(source, target)
        else:
            target.symlink_to(source.resolve())
    plain = speaking_checkpoint(top / "plain")
    packed = packed_tiny(plain, top / "packed")
    (top / "models").mkdir()
    shutil.copytree(plain, top / "models" / "plain")
    shutil.copytree(packed / "enclave", top / "models" / "packed")
    (top / "tmp").mkdir()
    return Inside(top / "tree", top / "models", top / "tmp")


def check(trace: Trace, inside: Inside) -> None:
    """Check all that a trace tells."""
    assert len(trace.opened) > 500
    assert inside.uncovered(trace) == {}
    assert trace.names & MISSING_CALLS <= GOES_ON.keys()
    assert not trace.names & NEW_PROCESSES
    assert sum(name == "execve" for name, _ in trace.calls) == 1
    for name, rest in trace.calls:
        if name in ("clone", "clone3"):
            assert "CLONE_THREAD" in rest, rest
        # A mapping is read and hashed whole, each time.
        assert not (name == "mmap" and f"<{inside.models}" in rest), rest
        # Gramine's UNIX sockets reach nobody outside; a pair of them is private.
        assert not (name in ("connect", "bind") and "AF_UNIX" in rest), rest
        assert not (name == "socket" and "SOCK_SEQPACKET" in rest and "-1" not in rest), rest


def test_the_baseline(inside: Inside, tmp_path: Path) -> None:
    manifest = parsed(**LOCAL, model_name="plain", args="--tokens 16", threads="2")
    environment = inside.environment(manifest)
    with traced(inside.words(manifest), environment, tmp_path / "trace", ROOT / "tee_only_llama"):
        pass
    check(read_trace(tmp_path / "trace"), inside)


def test_the_split_and_its_server(inside: Inside, tmp_path: Path) -> None:
    port = free_port()
    runner = parsed(**RUNNER, model_name="plain", args="--tokens 16", threads="2")
    server = parsed(**SERVER, model_name="plain", threads="2")
    folder = ROOT / "tee_gpu"
    served = inside.environment(server, TSQP_LISTEN=f"127.0.0.1:{port}")
    asked = inside.environment(runner, LLAMA_GPU_ENDPOINT=f"localhost:{port}")
    with (
        traced(inside.words(server), served, tmp_path / "server", folder, "ZeroMQ server started"),
        traced(inside.words(runner), asked, tmp_path / "runner", folder),
    ):
        pass
    for name in ("server", "runner"):
        check(read_trace(tmp_path / name), inside)


def test_serving(inside: Inside, tmp_path: Path) -> None:
    manifest = parsed(model_name="packed", threads="2")
    port = free_port()
    with running_worker(inside.models.parent / "packed", "tcp") as url:
        environment = inside.environment(
            manifest, LLAMA_GPU_ENDPOINT=url, TSQP_PORT=str(port), TSQP_KV_MEMORY="10000000", TSQP_MASK_POOL="16"
        )
        with traced(inside.words(manifest), environment, tmp_path / "trace", ROOT / "gramine", "listening on"):
            for path, body in (
                ("completions", {"prompt": "x"}),
                ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ):
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/v1/{path}",
                    data=json.dumps({"model": "packed", "max_tokens": 4, **body}).encode(),
                    headers={"content-type": "application/json"},
                )
                with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                    assert answer.status == 200
    check(read_trace(tmp_path / "trace"), inside)


def test_what_is_not_covered_would_be_found(inside: Inside, tmp_path: Path) -> None:
    code = "import os, socket; open('/etc/passwd').close(); open('here', 'w').close(); os.path.exists('/x'); os.times()"
    model = inside.models / "plain" / "config.json"
    code += f"; import mmap; file = open({str(model)!r}, 'rb'); mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)"
    words = [str(inside.tree / "bin" / "python3"), "-I", "-B", "-c", code]
    with traced(words, inside.environment(parsed()), tmp_path / "trace", tmp_path):
        pass
    trace = read_trace(tmp_path / "trace")
    assert inside.uncovered(trace) == {"/etc/passwd": False, "here": True}
    assert trace.names & MISSING_CALLS - GOES_ON.keys() == {"times"}
    assert [name for name, rest in trace.calls if name == "mmap" and f"<{inside.models}" in rest] == ["mmap"]
