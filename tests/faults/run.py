"""The soak: faults at random points of several lanes at once, and a report of all that was seen."""

from __future__ import annotations

import random
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
from faults import kinds
from faults.inject import DISK_FULL, fill_disk, inject
from faults.kinds import Fault
from faults.lanes import Site
from faults.load import Tally
from faults.report import Clients, Injected, Report, by_kind
from faults.system import System, named_regions, running

FAULTS: dict[str, tuple[type[Fault], ...]] = {
    "masked": (
        kinds.WorkerKilled,
        kinds.WorkerRestarted,
        kinds.WorkerHung,
        kinds.LinkCut,
        kinds.LinkSilent,
        kinds.LinkLies,
        kinds.EnclaveKilled,
        kinds.DeviceFull,
    ),
    "open": (
        kinds.WorkerRestarted,
        kinds.WorkerHung,
        kinds.OtherModel,
        kinds.EnclaveKilled,
        kinds.HalfWritten,
        kinds.DeviceFull,
    ),
}
# By which a process may have grown: allocators round, and memory for the largest steps comes late.
_SLACK_BYTES = 64 << 20
# And descriptors: pyzmq opens some of its own for the first message that it does not copy.
_SLACK_FILES = 32

Say = Callable[[str], None]
Work = dict[str, Callable[[], Injected]]


class Plan(NamedTuple):
    """How much of it.

    Attributes:
        seconds: for how long faults are injected; where ``times`` is None each kind is once at least.
        times: how often each kind is at most, over all lanes; None means as often as fits.
        clients: of each server.
        seed: of all that is chosen.
        slack_s: what noticing may take beyond what is stated, as the machine has other work.
        prefill_pause_s: between runs of `tsqp prefill`.
        levels: of the servers, each with workers and clients of its own; faults are injected into all at once.
    """

    seconds: float
    times: int | None
    clients: int
    seed: int
    slack_s: float = 5.0
    prefill_pause_s: float = 8.0
    levels: tuple[str, ...] = ("masked", "open")


def soak(plan: Plan, say: Say) -> Report:
    """Start the system, inject faults, end it, and look at what is left.

    Args:
        plan: how much.
        say: told what happens, line by line.
    """
    others = set(psutil.Process().children(recursive=True))
    with tempfile.TemporaryDirectory(prefix="tsqp-soak-") as name:
        site = Site(Path(name))
        say(f"starting servers at {', '.join(plan.levels)} and their workers")
        with running(site, plan.levels, plan.clients, plan.seed, plan.prefill_pause_s) as system:
            before, each_before = system.at_rest()
            injecting = _Injecting(plan, say, system)
            injecting.run()
            system.end_programs()
            after, each_after = system.at_rest()
        left = [*system.ended_badly, *_left(site, others)]
    grown = [
        f"{name} grew from {each_before[name]} to {(memory, files)} bytes and descriptors"
        for name, (memory, files) in each_after.items()
        if memory > each_before[name][0] + _SLACK_BYTES or files > each_before[name][1] + _SLACK_FILES
    ]
    say("comparing masked words")
    masked = site.words.look()
    reused = [f"{masked.reused} pairs of rows went out under one mask"] if masked.reused else []
    tallies = _tallies(system)
    wrong = [problem for tally, _, _ in tallies for problem in tally.problems]
    return Report(
        seed=plan.seed,
        seconds=round(injecting.seconds, 1),
        clients=[_clients(*each) for each in tallies],
        kinds=by_kind(injecting.injected),
        masked=masked,
        before=before,
        after=after,
        left=left,
        problems=[*injecting.problems, *wrong, *reused, *left, *grown],
        injected=injecting.injected,
    )


def _left(site: Site, others: Container[psutil.Process]) -> list[str]:
    """Say what is there that was not before, now that all has ended."""
    children = [each for each in psutil.Process().children(recursive=True) if each not in others]
    found = [f"process {each.pid}: {' '.join(each.cmdline())}" for each in children]
    found += [f"shared memory {each}" for each in named_regions()]
    return found + [f"socket {each}" for each in site.directory.rglob("*") if each.is_socket()]


def _tallies(system: System) -> list[tuple[Tally, str, int]]:
    loads = [(lane.level, lane.load) for lane in system.lanes if lane.load]
    servers = [(load.tally, f"`tsqp serve`, `{level}`", load.clients) for level, load in loads]
    runs = [(each.tally, f"`tsqp prefill`, `{each.level}`", 1) for each in system.programs]
    return servers + runs


def _clients(tally: Tally, who: str, clients: int) -> Clients:
    counts = tally.counts
    return Clients(
        who=who,
        clients=clients,
        requests=counts.total(),
        right=counts["right"],
        errors=dict(tally.codes),
        cut=counts["cut"],
        wrong=counts["wrong"],
        lost=counts["lost"],
    )


class _Injecting:
    """Injects faults into all lanes at once, in each one after the other."""

    def __init__(self, plan: Plan, say: Say, system: System) -> None:
        self._plan, self._say = plan, say
        self.injected: list[Injected] = []
        self.problems: list[str] = []
        self.seconds = 0.0
        self._began = time.monotonic()
        self._lanes: dict[str, Work] = {"pack": {DISK_FULL: partial(fill_disk, system.disk)}}
        for lane, programs in zip(system.lanes, system.programs, strict=True):
            self._lanes[lane.name] = {
                kind.kind: partial(inject, lane, programs, kind, plan.slack_s) for kind in FAULTS[lane.level]
            }

    def run(self) -> None:
        """Do what the plan says."""
        self._began = time.monotonic()
        threads = [threading.Thread(target=self._work_through, args=each) for each in self._lanes.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.seconds = time.monotonic() - self._began

    def _work_through(self, name: str, work: Work) -> None:
        try:
            for kind in self._order(name, list(work)):
                injected = work[kind]()
                self.injected.append(injected)
                self.problems += [f"{kind} at {name}: {problem}" for problem in injected.problems]
                self._tell(injected)
        except Exception:  # noqa: BLE001  the other lanes go on, and all of it is told at the end
            self.problems.append(f"{name} stopped: {traceback.format_exc()}")
            self._say(self.problems[-1])

    def _order(self, name: str, here: list[str]) -> Iterator[str]:
        """Yield each kind once, or as often as asked, over all lanes; then, until time is over, any of them."""
        chance = random.Random(f"{self._plan.seed} order {name}")
        shares = {kind: self._share(name, kind) for kind in here}
        for done in range(max(shares.values())):
            turn = [kind for kind, share in shares.items() if share > done]
            chance.shuffle(turn)
            for kind in turn:
                if self._plan.times and self._is_over:
                    return
                yield kind
        while self._plan.times is None and not self._is_over:
            yield chance.choice(here)

    @property
    def _is_over(self) -> bool:
        return time.monotonic() > self._began + self._plan.seconds

    def _share(self, name: str, kind: str) -> int:
        """Return how often one lane injects a kind that several may."""
        able = [each for each, work in self._lanes.items() if kind in work]
        times, at = self._plan.times or 1, able.index(name)
        return times * (at + 1) // len(able) - times * at // len(able)

    def _tell(self, injected: Injected) -> None:
        noticed = "nobody had to be told" if injected.noticed_s is None else f"noticed after {injected.noticed_s:.1f} s"
        again = "" if injected.again_s is None else f", right again {injected.again_s:.1f} s after it was undone"
        wrong = "".join(f"\n        WRONG: {problem}" for problem in injected.problems)
        at = time.monotonic() - self._began
        self._say(f"{at:6.0f} s  {injected.level:6}  {injected.kind}: {noticed}{again}{wrong}")
