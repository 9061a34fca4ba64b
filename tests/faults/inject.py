"""One fault: injected, watched, undone, and judged."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

from faults.kinds import Fault, freed
from faults.lanes import Lane
from faults.programs import Disk, Prefills
from faults.report import Injected

DISK_FULL = "disk full while packing"
# What packing a tiny model takes at most.
_DISK_FULL_S = 30.0
_LOOK_S = 0.05
# Within what time a request is answered rightly again, and a worker holds nothing of clients that are gone.
_AGAIN_S = 90.0
_SETTLE_S = 45.0


def inject(lane: Lane, programs: Prefills, kind: type[Fault], slack_s: float) -> Injected:
    """Inject a fault at a random moment.

    Args:
        lane: where.
        programs: what else uses its workers.
        kind: of fault.
        slack_s: what noticing may take beyond what is stated.
    """
    _elapsed(lambda: lane.is_quiet, _AGAIN_S)  # what shows from now on is of this fault
    time.sleep(lane.chance.random())
    fault = kind(lane)
    limit_s = fault.stated_s + slack_s
    with programs.lock if fault.counts_clients else nullcontext():
        fault.since = time.monotonic()
        fault.inject()
        noticed_s = _first(fault.noticed_after, limit_s)
    ended_s = _first(lambda: _since(fault.since) if lane.has_answered(fault.since) else None, limit_s)
    time.sleep(lane.chance.random() / 2)
    fault.undo()
    again_s = _elapsed(lane.is_right, _AGAIN_S)
    settled_s = _elapsed(lambda: all(freed(worker, 1) for worker in lane.workers), _SETTLE_S)
    problems = fault.problems()
    if noticed_s is None and not fault.may_be_hidden:
        problems.append(f"not noticed within {limit_s:g} s")
    if noticed_s is not None and noticed_s > limit_s:
        problems.append(f"noticed after {noticed_s:.1f} s, stated are {fault.stated_s:g}")
    if ended_s is None:
        problems.append(f"what had been asked before was not answered within {limit_s:g} s more")
    if again_s is None:
        problems.append(f"no request was answered rightly within {_AGAIN_S:g} s")
    if settled_s is None:
        held = [(worker.command.name, worker.held()) for worker in lane.workers]
        problems.append(f"workers hold sockets, regions or seats of more than one client: {held}")
    return Injected(
        kind=kind.kind,
        level=lane.level,
        stated_s=fault.stated_s,
        noticed_s=noticed_s,
        ended_s=ended_s,
        again_s=again_s,
        problems=problems,
    )


def fill_disk(disk: Disk) -> Injected:
    """Pack a model where there is no room for it, and then where there is."""
    started = time.monotonic()
    problems = disk.pack_onto_full()
    noticed_s = _since(started)
    started = time.monotonic()
    problems += disk.pack_again()
    return Injected(
        kind=DISK_FULL,
        level="pack",
        stated_s=_DISK_FULL_S,
        noticed_s=noticed_s,
        ended_s=None,
        again_s=_since(started),
        problems=problems,
    )


def _since(when: float) -> float:
    return time.monotonic() - when


def _elapsed(holds: Callable[[], bool], limit_s: float) -> float | None:
    """Wait until something holds; return after how long it did, None if not in time."""
    started = time.monotonic()
    return _first(lambda: _since(started) if holds() else None, limit_s)


def _first(value: Callable[[], float | None], limit_s: float) -> float | None:
    """Return what a function gives once it gives something, None if not in time."""
    deadline = time.monotonic() + limit_s
    while (found := value()) is None:
        if time.monotonic() > deadline:
            return None
        time.sleep(_LOOK_S)
    return found
