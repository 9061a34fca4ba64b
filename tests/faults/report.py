"""What a soak under faults found, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from faults.masked_words import Sent
from msgspec import Struct


class Injected(Struct, frozen=True, kw_only=True):
    """One fault. Times in seconds.

    Attributes:
        kind: which.
        level: of the server that it was injected beside.
        stated_s: within what time it must be noticed.
        noticed_s: after how long it was; null where nobody was told, since what failed was done again at once.
        ended_s: after how long all that had been asked before had an answer or an error.
        again_s: after it was undone, how long until a request was answered rightly.
        problems: what must not have happened.
    """

    kind: str
    level: str
    stated_s: float
    noticed_s: float | None
    ended_s: float | None
    again_s: float | None
    problems: list[str]


class KindReport(Struct, frozen=True, kw_only=True):
    """All faults of one kind. Times in seconds."""

    kind: str
    injected: int
    noticed: int
    stated_s: float
    noticed_median_s: float | None
    noticed_most_s: float | None
    ended_most_s: float | None
    again_most_s: float | None


class Clients(Struct, frozen=True, kw_only=True):
    """What clients of one server, or runs of `tsqp prefill`, got.

    Attributes:
        who: they are.
        clients: how many asked at once.
        requests: how many were asked.
        right: answers, compared with those of an undisturbed system.
        errors: requests that ended with an error of the server's or the program's own, by code where there is one.
        cut: connections that ended because their server was killed.
        wrong, lost: answers that differ; requests that ended without an error, or not at all. There must be none.
    """

    who: str
    clients: int
    requests: int
    right: int
    errors: dict[str, int]
    cut: int
    wrong: int
    lost: int


class Held(Struct, frozen=True, kw_only=True):
    """What the system holds while nothing runs: bytes of resident memory, descriptors, regions of clients, files."""

    memory_bytes: int
    descriptors: int
    regions: int
    processes: int
    shared_files: int


class Report(Struct, frozen=True, kw_only=True):
    """A soak under faults.

    Attributes:
        seed: of all that was chosen.
        seconds: how long faults were injected.
        clients: by server, and the runs of `tsqp prefill`.
        kinds: faults by kind.
        masked: what crossed the links at `masked`.
        before, after: with the first faults and after the last, at rest.
        left: processes, shared memory and sockets that were left once all had ended. There must be none.
        problems: all that must not have happened; empty if all is well.
        injected: each fault.
    """

    seed: int
    seconds: float
    clients: list[Clients]
    kinds: list[KindReport]
    masked: Sent
    before: Held
    after: Held
    left: list[str]
    problems: list[str]
    injected: list[Injected]


def by_kind(injected: Iterable[Injected]) -> list[KindReport]:
    """Summarise faults by kind."""
    groups: dict[str, list[Injected]] = {}
    for each in injected:
        groups.setdefault(each.kind, []).append(each)
    return [_kind(kind, groups[kind]) for kind in sorted(groups)]


def _kind(kind: str, faults: Sequence[Injected]) -> KindReport:
    noticed = [each.noticed_s for each in faults if each.noticed_s is not None]
    return KindReport(
        kind=kind,
        injected=len(faults),
        noticed=len(noticed),
        stated_s=max(each.stated_s for each in faults),
        noticed_median_s=round(median(noticed), 2) if noticed else None,
        noticed_most_s=_most(noticed),
        ended_most_s=_most([each.ended_s for each in faults if each.ended_s is not None]),
        again_most_s=_most([each.again_s for each in faults if each.again_s is not None]),
    )


def _most(values: Sequence[float]) -> float | None:
    return round(max(values), 2) if values else None


def table(report: Report) -> str:
    """Return the report as people read it, in Markdown."""
    lines = [
        "| fault | injected | noticed, median | at most | stated | asked before ended within | right again within |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in report.kinds:
        times = (kind.noticed_median_s, kind.noticed_most_s, kind.stated_s, kind.ended_most_s, kind.again_most_s)
        lines.append(f"| {kind.kind} | {kind.injected} | {' | '.join(map(_seconds, times))} |")
    lines += ["", "| clients | held | requests | right | ended with an error | cut with their server | wrong | lost |"]
    lines += ["| --- " + "| ---: " * 7 + "|"]
    for each in report.clients:
        counts = (each.clients, each.requests, each.right, sum(each.errors.values()), each.cut, each.wrong, each.lost)
        lines.append(f"| {each.who} | {' | '.join(map(str, counts))} |")
    lines += ["", _rest(report)]
    return "\n".join(lines)


def _rest(report: Report) -> str:
    before, after, sent = report.before, report.after, report.masked
    return (
        f"Memory before {before.memory_bytes / 1e6:.0f} MB, after {after.memory_bytes / 1e6:.0f} MB; descriptors "
        f"{before.descriptors} and {after.descriptors}. {sent.rows} masked rows crossed the links, {sent.resent} "
        f"messages twice with the same bytes; masks used twice: {sent.reused}. Left behind: {len(report.left)}. Seed "
        f"{report.seed}, {report.seconds:.0f} s."
    )


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"
