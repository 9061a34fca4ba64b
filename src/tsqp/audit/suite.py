"""Runs the attacks on what was recorded, and puts the findings together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from tsqp.audit import level_checks
from tsqp.audit.evidence import Attacker, Evidence, deeper_groups
from tsqp.audit.findings import Result
from tsqp.audit.scheme_checks import SCHEMES
from tsqp.errors import AuditError
from tsqp.reports import AuditReport

LEVELS = ("open", "verified", "masked")
SEED = 20240521


@dataclass(frozen=True, slots=True)
class Audit:
    """All results of one run, with what they are about."""

    model: str
    evidence: Evidence
    vocabulary: int
    levels: tuple[str, ...]
    schemes: tuple[str, ...]
    results: tuple[Result, ...]

    def report(self) -> AuditReport:
        """Return what ``--json`` prints."""
        findings = [result.finding for result in self.results]
        return AuditReport(
            model=self.model,
            tokens=len(self.evidence.ids),
            distinct_tokens=len(set(self.evidence.ids)),
            vocabulary=self.vocabulary,
            levels=list(self.levels),
            schemes=list(self.schemes),
            simulated=list(self.evidence.simulated),
            ok=all(finding.ok is not False for finding in findings),
            findings=findings,
        )


def run(
    model: str,
    evidence: Evidence,
    attacker: Attacker,
    levels: Sequence[str],
    scheme_names: Sequence[str],
    on_step: Callable[[float], None] = lambda _done: None,
) -> Audit:
    """Attack every level and scheme asked for.

    Args:
        model: its name.
        evidence: what was recorded.
        attacker: what is public; regression is trained here if a level needs it.
        levels: of ``LEVELS``.
        scheme_names: of ``SCHEMES``.
        on_step: told the fraction done.
    """
    generator = torch.Generator().manual_seed(SEED)
    evidence = replace(evidence, opened=attacker.public.runner().followed(evidence.opened))
    checks: list[Callable[[], list[Result]]] = []
    if levels:
        attacker.train(deeper_groups(attacker.public.config))
    if "open" in levels:
        checks.append(lambda: level_checks.clear("open", evidence.opened, evidence, attacker))
    if "verified" in levels and (verified := evidence.verified):
        checks.append(lambda: level_checks.clear("verified", verified, evidence, attacker))
    if "masked" in levels:
        checks.append(lambda: level_checks.zero_masks(evidence, attacker))
        checks.append(lambda: level_checks.masked(evidence, attacker, generator))
    checks += [partial(SCHEMES[name], evidence, attacker.public, generator) for name in scheme_names]
    results: list[Result] = []
    for done, check in enumerate(checks, 1):
        results += check()
        on_step(done / len(checks))
    return Audit(model, evidence, len(attacker.public.table), tuple(levels), tuple(scheme_names), tuple(results))


def require_expected(report: AuditReport) -> None:
    """Refuse a report with a surprise in it.

    Raises:
        AuditError: an attack that must succeed failed, or one that must fail succeeded.
    """
    surprises = [f"{finding.attack} on {finding.subject}" for finding in report.findings if finding.ok is False]
    if surprises:
        raise AuditError(
            f"{len(surprises)} of {len(report.findings)} findings are not as expected: {'; '.join(surprises)}."
        )
