"""Keeps a pool as it is wanted: replaces what is lost, adds and drains, and says where its members are.

Knows nothing of Ray: what starts members is an argument, and so is the time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tsqp.cluster.scaling import Bounds, Scaler
from tsqp.cluster.spec import Kind, Phase, Place, PoolSpec, Report, Wanted
from tsqp.errors import PlacementError, TsqpError
from tsqp.wire.directory import Directory, Entry

_log = logging.getLogger(__name__)

# Between attempts at what failed before it was ready: doubled each time.
_FIRST_PAUSE_S = 1.0
_MAX_PAUSE_S = 30.0
_ABSENT = Report(phase="placing")


class LostError(TsqpError):
    """A member is gone, with its actor or its node."""


class Handle(Protocol):
    """A member as who keeps the pool sees it. No method waits."""

    def report(self) -> Report | None:
        """Return what it said last; None before it has said anything.

        Raises:
            LostError: it is gone.
        """

    def start(self) -> None:
        """Let it start its process."""

    def drain(self) -> None:
        """Let it end its process, once that has answered what it was sent."""

    def discard(self) -> None:
        """End it and give back its place. May be called twice."""


class Launcher(Protocol):
    """Starts members."""

    def launch(self, kind: Kind, name: str, party: str | None) -> Handle:
        """Ask for a place for a member, on nodes of a party, or on the pool's own; return at once.

        Raises:
            TsqpError: it cannot be asked for.
        """

    def parties(self) -> frozenset[str]:
        """Return the parties that have nodes now."""


@dataclass(slots=True)
class Member:
    """A member and what is known of it. ``leaving_s`` is when it was taken out of the directory, if it was."""

    name: str
    kind: Kind
    party: str | None
    handle: Handle
    report: Report = _ABSENT
    told: Phase | None = None
    leaving_s: float | None = None
    served: bool = False

    @property
    def is_listed(self) -> bool:
        """Whether enclaves may use it."""
        return self.report.phase == "ready" and self.leaving_s is None


@dataclass(slots=True)
class _Trouble:
    """How often in a row a kind of members failed before they were ready, and when the next may be tried."""

    failures: int = 0
    not_before_s: float = 0.0
    reason: str = ""


@dataclass(slots=True)
class Pool:
    """See the module. One thread calls ``tick``; ``scale`` and ``close`` must not run beside it.

    Args:
        spec: what the members are like.
        wanted: how many workers.
        launcher: starts members.
        new_name: returns a name that no member has had.
        members: those that run already, after a restart of who keeps the pool.

    Attributes:
        restarts: how many members were replaced.
    """

    spec: PoolSpec
    wanted: Wanted
    launcher: Launcher
    new_name: Callable[[Kind], str]
    members: dict[str, Member] = field(default_factory=dict)
    restarts: int = 0
    closing: bool = False
    _scaler: Scaler = field(default_factory=Scaler)
    _trouble: dict[Kind, _Trouble] = field(default_factory=lambda: {"worker": _Trouble(), "dealer": _Trouble()})

    def scale(self, bounds: Bounds, workers: int | None = None) -> None:
        """Want another number of workers, within other bounds."""
        self.wanted = Wanted(workers=bounds.clamped(self.wanted.workers if workers is None else workers), bounds=bounds)

    def close(self) -> None:
        """Want nothing any more."""
        self.closing = True

    def tick(self, now_s: float) -> Directory:
        """Look at all members and do what is to be done now.

        Args:
            now_s: a clock that never goes back.

        Returns:
            Where those that may be used are.
        """
        for member in list(self.members.values()):
            self._look(member, now_s)
        if not self.closing:
            self._rescale(now_s)
        self._reach("worker", 0 if self.closing else self.wanted.workers, now_s)
        self._reach("dealer", 0 if self.closing else self.spec.dealers, now_s)
        return self.directory()

    def directory(self) -> Directory:
        """Return where members are that may be used."""
        listed: Mapping[Kind, list[Entry]] = {"worker": [], "dealer": []}
        for member in self.members.values():
            if member.is_listed:
                listed[member.kind].append(Entry(member.report.url, member.report.key))
        return Directory(version=1, workers=tuple(listed["worker"]), dealers=tuple(listed["dealer"]))

    def reasons(self) -> list[str]:
        """Return why members are missing, if they are."""
        return [trouble.reason for trouble in self._trouble.values() if trouble.reason]

    def failures(self) -> int:
        """Return how many members of a kind failed in a row, before one was ready."""
        return max(trouble.failures for trouble in self._trouble.values())

    def _look(self, member: Member, now_s: float) -> None:
        try:
            member.report = member.handle.report() or member.report
            if member.report.phase == "placed" and member.told is None:
                if member.report.place is not None:
                    self._check_place(member, member.report.place)
                member.told = "starting"
                member.handle.start()
            elif member.report.phase == "ready":
                member.served = True
                self._trouble[member.kind] = _Trouble()
            elif member.report.phase == "lost":
                raise LostError(member.report.reason or "it ended.")
            if (
                member.report.phase == "draining" and member.leaving_s is None
            ):  # told so before a restart of who keeps it
                member.leaving_s, member.told = now_s, "draining"
            if member.leaving_s is not None:
                self._dismiss(member, member.leaving_s, now_s)
        except TsqpError as error:
            self._drop(member, error, now_s)

    def _dismiss(self, member: Member, since_s: float, now_s: float) -> None:
        """Let a member end that is in the directory no more: at once if nobody can use it, else once all have seen."""
        if member.report.phase in ("placing", "placed", "starting"):
            raise LostError("it is not needed any more.")
        if member.told != "draining" and now_s - since_s >= self.spec.settle_s:
            member.told = "draining"
            member.handle.drain()

    def _check_place(self, member: Member, place: Place) -> None:
        others = [
            (other.kind, other.report.place)
            for other in self.members.values()
            if other is not member and other.report.place is not None
        ]
        check_apart(member.kind, place, others)

    def _drop(self, member: Member, error: TsqpError, now_s: float) -> None:
        member.handle.discard()
        del self.members[member.name]
        if member.leaving_s is not None:
            _log.info("%s has left the pool", member.name)
            return
        self.restarts += 1
        self._failed(member.kind, f"{member.name}: {error}", now_s, again_at_once=member.served)

    def _failed(self, kind: Kind, reason: str, now_s: float, *, again_at_once: bool = False) -> None:
        trouble = self._trouble[kind]
        if trouble.reason != reason:
            _log.warning("%s", reason)
        trouble.reason = reason
        if not again_at_once:
            trouble.not_before_s = now_s + min(_FIRST_PAUSE_S * 2**trouble.failures, _MAX_PAUSE_S)
            trouble.failures = min(trouble.failures + 1, 10)

    def _rescale(self, now_s: float) -> None:
        listed = [member for member in self.members.values() if member.kind == "worker" and member.is_listed]
        waiting = sum(member.report.waiting for member in listed)
        count = self._scaler.wanted(now_s, self.wanted.workers, waiting, len(listed), self.wanted.bounds)
        if count != self.wanted.workers:
            _log.info("%d workers are wanted instead of %d: %d requests wait", count, self.wanted.workers, waiting)
            self.wanted = Wanted(workers=count, bounds=self.wanted.bounds)

    def _reach(self, kind: Kind, count: int, now_s: float) -> None:
        """Ask for members that are missing, and let those go that are too many, the last to be of use first."""
        staying = [each for each in self.members.values() if each.kind == kind and each.leaving_s is None]
        for member in sorted(staying, key=lambda each: (not each.served, -each.report.waiting))[count:]:
            member.leaving_s = now_s
        if now_s < self._trouble[kind].not_before_s:
            return
        for _ in range(count - len(staying)):
            try:
                party = self._free_party() if kind == "dealer" else None
                name = self.new_name(kind)
                self.members[name] = Member(name, kind, party, self.launcher.launch(kind, name, party))
            except TsqpError as error:  # noqa: PERF203  one try for each member
                self._failed(kind, str(error), now_s)
                return

    def _free_party(self) -> str:
        """Return a party that runs no dealer of this pool: two of one party protect no better than one."""
        dealers = [member for member in self.members.values() if member.kind == "dealer"]
        taken = {each.report.place.party if each.report.place else each.party for each in dealers}
        parties = self.launcher.parties()
        check_parties(self.spec.dealers, parties)
        return min(parties - taken, default=None) or _no_party(self.spec.dealers, parties)


def check_apart(kind: Kind, place: Place, others: Sequence[tuple[Kind, Place]]) -> None:
    """Refuse a dealer on a node of the pool's own, a worker on another party's, and both on one node.

    Args:
        kind: of what was placed.
        place: where.
        others: what else there is, and where.

    Raises:
        PlacementError: it is refused.
    """
    if kind == "dealer" and not place.party:
        raise PlacementError(
            f"a dealer was placed on node {place.address}, which is no other party's: it is not started."
        )
    if kind == "worker" and place.party:
        raise PlacementError(
            f"a worker was placed on node {place.address} of the party {place.party}, which is for dealers: it is not "
            "started."
        )
    beside = [other for other, where in others if where.node == place.node and other != kind]
    if beside:
        raise PlacementError(
            f"a {kind} was placed on node {place.address} beside a {beside[0]}: together they could unmask, so it is "
            "not started."
        )


def check_parties(dealers: int, parties: frozenset[str]) -> None:
    """Refuse more dealers than there are other parties with nodes.

    Raises:
        PlacementError: there are too few.
    """
    if dealers > len(parties):
        _no_party(dealers, parties)


def _no_party(dealers: int, parties: frozenset[str]) -> str:
    found = f"those of {', '.join(sorted(parties))}" if parties else "none"
    raise PlacementError(
        f"no node for a dealer: {dealers} dealers need nodes of {dealers} other parties, which their operators start "
        f"with 'ray start --labels tsqp-dealer=PARTY'; found {found}."
    )
