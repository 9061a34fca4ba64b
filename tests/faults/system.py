"""All that runs in a soak, from its start to its end, and what it holds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from faults.inject import _SETTLE_S, _elapsed
from faults.kinds import freed
from faults.lanes import LANES, REGION_PREFIX, Lane, Site
from faults.programs import Disk, Prefills
from faults.report import Held

SHARED = Path("/dev/shm")  # noqa: S108  where named regions lie


@dataclass
class System:
    """What runs.

    Attributes:
        site: what all share.
        lanes: servers with their workers and clients.
        programs: runs of `tsqp prefill`, beside each lane.
        disk: for `tsqp pack`.
        ended_badly: which processes did, in sentences.
    """

    site: Site
    lanes: list[Lane]
    programs: list[Prefills]
    disk: Disk
    ended_badly: list[str] = field(default_factory=list)

    def end_programs(self) -> None:
        """Run `tsqp prefill` no more."""
        for program in self.programs:
            program.finish()
        for program in self.programs:
            program.close()

    def at_rest(self) -> tuple[Held, dict[str, tuple[int, int]]]:
        """Let nothing be asked, and return what all processes hold; each one's memory in bytes, and descriptors."""
        with ExitStack() as stack:
            for program in self.programs:
                stack.enter_context(program.lock)
            for lane in self.lanes:
                assert lane.load is not None
                lane.load.rest()
                stack.callback(lane.load.go)
            workers = [worker for lane in self.lanes for worker in lane.workers]
            _elapsed(lambda: all(freed(worker, 1) for worker in workers), _SETTLE_S)
            commands = [command for lane in self.lanes for command in lane.commands]
            each = {command.name: (command.memory_bytes(), command.files()) for command in commands}
            held = Held(
                memory_bytes=sum(memory for memory, _ in each.values()),
                descriptors=sum(files for _, files in each.values()),
                regions=sum(command.regions() for command in commands),
                processes=len(psutil.Process().children(recursive=True)),
                shared_files=len(named_regions()),
            )
        return held, each


def named_regions() -> set[Path]:
    """Return the files of this soak's named regions; others may have theirs on the same machine."""
    return set(SHARED.glob(f"{REGION_PREFIX}*"))


@contextmanager
def running(site: Site, levels: Sequence[str], clients: int, seed: int, prefill_pause_s: float) -> Iterator[System]:
    """Run all processes and clients for the time of a ``with`` block: a lane for each of some levels."""
    with ExitStack() as stack:
        disk = Disk(site, random.Random(f"{seed} disk"))
        stack.callback(disk.close)
        lanes = [LANES[level](site, f"{level} {at}", seed) for at, level in enumerate(levels, 1)]
        for lane in lanes:
            stack.callback(lane.kill)
            for worker in lane.workers:
                worker.command.start()
        programs = [Prefills(lane, prefill_pause_s) for lane in lanes]
        for lane, program in zip(lanes, programs, strict=True):
            lane.await_workers()
            lane.serve()
            stack.callback(program.close)
            program.start()
        for lane, program in zip(lanes, programs, strict=True):
            lane.server.await_ready()
            program.await_first()
            stack.callback(lane.close)
            lane.go(clients, seed)
        system = System(site, lanes, programs, disk)
        yield system
        for lane in lanes:
            lane.close()
        commands = [command for lane in lanes for command in lane.commands]
        for command in commands:
            command.ask_to_end()
        codes = [(command.name, command.await_end()) for command in commands]
        system.ended_badly = [f"{name} ended with exit code {code}" for name, code in codes if code]
