"""Programs that run once: `tsqp prefill` beside the servers' load, and `tsqp pack` onto a disk that is full."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from faults.lanes import Lane, Site
from faults.load import Tally

_PROMPT = "abc abc"
_LIMIT_S = 120.0
# Room on the disk: a tiny packed model takes some 112 KB, its largest file 49 KB.
_TMPFS_BYTES = (8 << 10, 100 << 10)
_FILE_BYTES = (1 << 10, 45 << 10)
_ENOUGH_BYTES = 4 << 20
# Limits the size of files, and then runs the command line.
_LIMITED = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2); "
_RUN = "from tsqp.cli import main; sys.exit(main())"


def run(site: Site, *words: str, file_bytes: int | None = None) -> tuple[int, dict[str, Any], str]:
    """Run a command of tsqp's with --json; return its exit code, what it printed, and its standard error.

    One that does not end is killed; its exit code is -1.
    """
    command = ["-m", "tsqp", *words] if file_bytes is None else ["-c", _LIMITED + _RUN, str(file_bytes), *words]
    try:
        done = subprocess.run(
            [sys.executable, *command, "--json"],
            capture_output=True,
            text=True,
            env=site.environment,
            timeout=_LIMIT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return -1, {}, f"it did not end within {_LIMIT_S:g} s"
    try:
        said = json.loads(done.stdout)
    except ValueError:
        said = {}
    return done.returncode, said, done.stderr


def failed_clearly(code: int, said: dict[str, Any], notes: str, codes: tuple[int, ...]) -> bool:
    """Tell whether a command failed with one of these exit codes, a sentence, and no traceback."""
    error = said.get("error", {})
    return code in codes and error.get("exit_code") == code and bool(error.get("message")) and "Traceback" not in notes


class Prefills:
    """Runs `tsqp prefill` with a lane's workers, again and again.

    Args:
        lane: whose.
        pause_s: between two.

    Attributes:
        tally: what came of them.
        lock: held while one runs.
    """

    def __init__(self, lane: Lane, pause_s: float) -> None:
        self._lane, self._pause_s, self.level = lane, pause_s, lane.level
        self.tally, self.lock = Tally(), threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name=f"prefill {lane.level}")
        self._learnt = threading.Event()
        self._right: list[int] = []

    def start(self) -> None:
        """Begin. The first run learns what is right: it must not be disturbed."""
        self._thread.start()

    def await_first(self) -> None:
        """Wait for the end of the first run."""
        self._learnt.wait()
        assert self._right, self.tally.problems

    def finish(self) -> None:
        """Run no more after the one that runs."""
        self._over.set()

    def close(self) -> None:
        """End, once the one that runs has. May be called twice."""
        self.finish()
        self._thread.join()

    def _once(self) -> tuple[int, dict[str, Any], str]:
        words = ["prefill", "--model", str(self._lane.model), "--level", self._lane.level, "--threads", "1"]
        return run(self._lane.site, *words, "--prompt", _PROMPT, "--worker", self._lane.address)

    def _repeat(self) -> None:
        code, said, notes = self._once()
        self._right = said.get("next_tokens", [])
        if code != 0:
            self.tally.problems.append(f"tsqp prefill at {self.level}, undisturbed: {notes}")
        self._learnt.set()
        while not self._over.wait(self._pause_s):
            with self.lock:
                code, said, notes = self._once()
            if code == 0:
                outcome = "right" if said["next_tokens"] == self._right else "wrong"
            else:
                outcome = "error" if failed_clearly(code, said, notes, (3, 4, 5)) else "lost"
            self.tally.counts[outcome] += 1
            if outcome == "error":
                self.tally.codes[said["error"]["type"]] += 1
            if outcome in ("wrong", "lost"):
                self.tally.problems.append(f"tsqp prefill at {self._lane.level}: exit code {code}, {said}, {notes}")


class Disk:
    """A small disk of its own, where it may be mounted; else files that may not grow.

    Args:
        site: what is packed.
        chance: how full.
    """

    def __init__(self, site: Site, chance: random.Random) -> None:
        self._site, self._chance = site, chance
        self.path = site.directory / "disk"
        self.path.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={_ENOUGH_BYTES}", "tmpfs", str(self.path)]
        try:
            self.mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
        except OSError:
            self.mounted = False
        self._right = ""

    def pack_onto_full(self) -> list[str]:
        """Pack a model for which there is no room; say what is not as it must be."""
        limit = None
        if self.mounted and self._chance.random() < 0.5:
            self._resize(self._chance.randrange(*_TMPFS_BYTES))
        else:
            limit = self._chance.randrange(*_FILE_BYTES)
        code, said, notes = run(self._site, *self._words(), file_bytes=limit)
        if self.mounted:
            self._resize(_ENOUGH_BYTES)
        found = []
        if not failed_clearly(code, said, notes, (3,)) or "cannot write the packed model" not in notes:
            found.append(f"a full disk gave exit code {code}, {said}, {notes}")
        return found + self._left()

    def pack_again(self) -> list[str]:
        """Pack the model where there is room; say what is not as it must be."""
        code, said, notes = run(self._site, *self._words())
        if code != 0:
            return [f"after a full disk: exit code {code}, {notes}"]
        self._right = self._right or said["manifest_digest"]
        found = [] if said["manifest_digest"] == self._right else ["the model was packed differently after a full disk"]
        subprocess.run(["rm", "-r", str(self.path / "packed")], check=True)
        return found + self._left()

    def _words(self) -> list[str]:
        return ["pack", "--model", str(self._site.floats), "--out", str(self.path / "packed")]

    def _resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True)

    def _left(self) -> list[str]:
        left = sorted(Path(each).name for each in self.path.iterdir())
        return [f"left on the disk: {left}"] if left else []

    def close(self) -> None:
        """Give the disk back."""
        if self.mounted:
            subprocess.run(["umount", str(self.path)], check=True)
            self.mounted = False
