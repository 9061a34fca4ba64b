"""One worker or dealer on its node: a process of its own, which ends with who holds this."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from tsqp.cluster.spec import Kind, Phase, Place, PoolSpec, Report
from tsqp.config import EnclaveConfig
from tsqp.errors import TransportError, TsqpError, printable
from tsqp.launch import worker_process
from tsqp.top.worker import WorkerSource
from tsqp.transport import keys
from tsqp.transport.urls import Endpoint

# A worker answers nothing else while it computes a product; one that is stopped never does.
HANGS_S = 60.0
_PROBE_S = 5.0
_LOOK_S = 0.1


class Member:
    """Starts, asks and ends the process of a worker or dealer. Methods may be called by several threads.

    Args:
        kind: which of the two.
        spec: of the pool.
        place: where this is.
    """

    def __init__(self, kind: Kind, spec: PoolSpec, place: Place) -> None:
        self._kind, self._spec, self._place = kind, spec, place
        self._stack = ExitStack()
        self._phase: Phase = "placed"
        self._pid, self._waiting, self._reason = 0, 0, ""
        self._url = ""
        self._key: str | None = None
        self._over = threading.Event()

    def report(self) -> Report:
        """Return what is known, at once."""
        return Report(
            phase=self._phase,
            place=self._place,
            url=self._url if self._phase == "ready" else "",
            key=self._key,
            pid=self._pid,
            waiting=self._waiting,
            reason=self._reason,
        )

    def start(self) -> None:
        """Start the process, in a thread that watches it until it ends."""
        self._phase = "starting"
        threading.Thread(target=self._run, name="tsqp-member", daemon=True).start()

    def drain(self) -> None:
        """Let the process answer what it has taken in, and end; after ``drain_s`` by force."""
        self._phase = "draining"
        self._over.set()

    def _run(self) -> None:
        try:
            with self._stack:
                self._watch()
        except TsqpError as error:
            self._reason = str(error)
        except Exception as error:  # noqa: BLE001  whoever asks must hear that it is over
            self._reason = f"it could not be started ({type(error).__name__}: {printable(str(error))})."
        self._pid = 0
        self._phase = "lost"

    def _watch(self) -> None:
        # Keys that are made here are read while the process starts, and lie in no file afterwards.
        with tempfile.TemporaryDirectory(prefix="tsqp-member-") as directory:
            words, own_key = self._command(Path(directory))
            process = self._stack.enter_context(worker_process(words, is_over=self._over.is_set))
            self._pid = process.pid
            # A process of this machine, by whatever address others reach it: the link does not leave it.
            asking = EnclaveConfig(worker_key=self._key, own_key=own_key, insecure="on", connect_timeout_s=_PROBE_S)
            source = WorkerSource(str(self._endpoint), asking)
        self._stack.callback(source.close)
        answered = time.monotonic()
        if not self._over.is_set():
            self._url, self._phase = self._endpoint.url, "ready"
        while process.poll() is None and not self._over.wait(_LOOK_S):
            if time.monotonic() - answered < 1.0:
                continue
            try:
                self._waiting = source.read().waiting
                answered = time.monotonic()
            except TransportError as error:
                if time.monotonic() - answered > HANGS_S:
                    raise TransportError(f"it has not answered for {HANGS_S:g} s: {error}") from error
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(Exception):
                process.wait(self._spec.drain_s)
        self._reason = f"its process ended with exit code {process.poll()}." if not self._over.is_set() else ""

    def _command(self, directory: Path) -> tuple[list[str], str | None]:
        """Return the command line of the process and, where it lets only some in, a key for this to ask it with."""
        spec = self._spec
        self._endpoint = Endpoint("tcp", host=self._place.address, port=_free_port(self._place.address))
        secret = spec.dealer_key if self._kind == "dealer" else spec.key
        if secret is None:
            secret = str(keys.create(directory, "worker")[1])
        self._key = keys.load_secret(secret).public.decode()
        words = [sys.executable, "-m", "tsqp", self._kind, "--listen", str(self._endpoint), "--key", secret]
        words += ["--json", "--exit-with-parent", "--threads", str(max(1, round(spec.cpus)))]
        words += spec.arguments if self._kind == "worker" else spec.dealer_arguments
        if self._kind == "worker" and spec.tensor_parallel > 1:
            words += ["--tensor-parallel", str(spec.tensor_parallel)]
        if not spec.allow:
            return words, None
        public, own = keys.create(directory, "asks")
        for key in (*spec.allow, str(public)):
            words += ["--allow", key]
        return words, str(own)


def _free_port(host: str) -> int:
    """Return a port that nobody listens on; another may come first, and then the process does not start."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        port: int = probe.getsockname()[1]
        return port


def own_place(node: str, address: str, party: str) -> Place:
    """Return where this process is, given what Ray says of its node."""
    return Place(node, address, party, os.getpid())
