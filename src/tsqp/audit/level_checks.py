"""The attacks on each level, and what each must find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tsqp.audit.attacks import collusion, correlation, mask_reuse, uniformity
from tsqp.audit.attacks.nearest import nearest_tokens
from tsqp.audit.attacks.regression import recover_tokens
from tsqp.audit.attacks.row_space import member_tokens
from tsqp.audit.evidence import Attacker, Evidence, deeper_groups, word_groups
from tsqp.audit.findings import InOrder, Result, at_chance, counted, measured, members, recovered, statistic
from tsqp.audit.public import FIRST_GROUP
from tsqp.audit.recorder import Recording
from tsqp.audit.simulate import MaskedRun, unmasked
from tsqp.errors import InputError
from tsqp.model.architecture import linear_groups

NEAREST = "nearest neighbour"
ROW_SPACE = "row-space membership"
REGRESSION = "regression from {group}"
COLLUSION_ALL = "worker and all dealers"
COLLUSION_SOME = "worker and all dealers but {missing}"
CORRELATION = "correlation with the plaintext"
REPEATED = "repeated rows"
DIFFERENCE = "differences of two messages"
FAMILIES = {
    "byte": "uniform bytes",
    "monobit": "balanced bits",
    "runs": "runs of bits",
    "serial": "neighbouring words",
}
ALL_P_VALUES = "spread of all p-values"
ZERO = "masked, r = 0"
# Words tested per session: enough for a bias of 1 in 200 in any bit.
_MAX_WORDS = 1 << 20


def clear(subject: str, recording: Recording, evidence: Evidence, attacker: Attacker) -> list[Result]:
    """Attack activations or integers in clear: `open` and `verified`."""
    table, seen_TK = attacker.public.table, recording.first(FIRST_GROUP)
    found_U = member_tokens(seen_TK, table)
    return [
        replace(recovered(subject, NEAREST, nearest_tokens(seen_TK, table).ids_T, evidence.ids), seen=seen_TK),
        members(subject, ROW_SPACE, found_U, evidence.ids, must_find=True, vocabulary=len(table)),
        *_regressions(subject, recording, evidence, attacker),
    ]


def _regressions(subject: str, recording: Recording, evidence: Evidence, attacker: Attacker) -> list[Result]:
    note = f"{attacker.overlap(evidence.ids):.0%} of the prompt's tokens occur in the training text"
    return [
        measured(subject, REGRESSION.format(group=group), _regression(attacker, group)(seen), evidence.ids, note)
        for group in deeper_groups(attacker.public.config)
        if len(seen := recording.first(group)) == len(evidence.ids)
    ]


def _regression(attacker: Attacker, group: str) -> InOrder:
    return lambda seen_TK: recover_tokens(seen_TK, attacker.maps[group], attacker.public.table).ids_T


def zero_masks(evidence: Evidence, attacker: Attacker) -> list[Result]:
    """Test the attacks: with r forced to 0 the same code must find what it must not find at `masked`."""
    verified = _required(evidence.verified)
    run, table = unmasked(verified), attacker.public.table
    words = run.worker.first(FIRST_GROUP)
    first, second = run.worker.tensors(FIRST_GROUP)[:2]
    results = [
        replace(recovered(ZERO, NEAREST, nearest_tokens(words, table).ids_T, evidence.ids), seen=words),
        members(ZERO, ROW_SPACE, member_tokens(words, table), evidence.ids, must_find=True, vocabulary=len(table)),
        counted(ZERO, REPEATED, mask_reuse.repeated_rows(first, second), "rows", "", none=False),
        statistic(ZERO, DIFFERENCE, mask_reuse.difference_p_value(first, second), "", reject=True),
    ]
    return [*results, *_uniform((run,), evidence, attacker, reject=True)]


def masked(evidence: Evidence, attacker: Attacker, generator: torch.Generator) -> list[Result]:
    """Attack words at `masked`: everything must be at chance, but for a worker that colludes with all dealers."""
    name, public, run = "masked", attacker.public, evidence.masked[0]
    words = run.worker.first(FIRST_GROUP)

    def nearest(seen_TK: Tensor) -> Tensor:
        return nearest_tokens(seen_TK, public.table).ids_T

    found_U = member_tokens(words, public.table)
    results = [
        replace(at_chance(name, NEAREST, words, nearest, evidence.ids, generator), seen=words),
        members(name, ROW_SPACE, found_U, evidence.ids, must_find=False, vocabulary=len(public.table)),
    ]
    for group in deeper_groups(public.config):
        seen, recover = run.worker.first(group), _regression(attacker, group)
        results.append(at_chance(name, REGRESSION.format(group=group), seen, recover, evidence.ids, generator))
    return [
        *results,
        *_reuse(evidence.masked),
        *_uniform(evidence.masked, evidence, attacker, reject=False),
        *_collusion(run, evidence, attacker, nearest, generator),
    ]


def _reuse(runs: Sequence[MaskedRun]) -> list[Result]:
    """Compare the two messages of each session, and the sessions with each other."""
    messages = [message for run in runs for message in run.worker.tensors(FIRST_GROUP)]
    pairs = [(a, b) for index, a in enumerate(messages) for b in messages[index + 1 :]]
    repeated = sum(mask_reuse.repeated_rows(a, b) for a, b in pairs)
    p_value = uniformity.bonferroni([mask_reuse.difference_p_value(a, b) for a, b in pairs])
    note = f"{len(messages)} messages of the same prompt, in {len(runs)} sessions"
    return [
        counted("masked", REPEATED, repeated, "rows", note, none=True),
        statistic("masked", DIFFERENCE, p_value, note),
    ]


def _uniform(runs: Sequence[MaskedRun], evidence: Evidence, attacker: Attacker, *, reject: bool) -> list[Result]:
    """Test the words of all sessions, and their correlation with the integers they carry."""
    subject = ZERO if reject else "masked"
    groups = word_groups(attacker.public.config)
    samples = [_words(run.worker, groups) for run in runs]
    tests = [test for sample in samples for test in uniformity.word_tests(sample)]
    note = f"keys: {len(samples)}, words of each: {min(len(sample) for sample in samples):,}"
    # Integers in clear may balance their bits; of 20 bits in 32, the top byte cannot be uniform.
    wanted = ("byte",) if reject else tuple(FAMILIES)
    families = {family: [test.p_value for test in tests if test.family == family] for family in wanted}
    results = [
        statistic(
            subject, FAMILIES[family], uniformity.bonferroni(values), f"tests: {len(values)}, {note}", reject=reject
        )
        for family, values in families.items()
    ]
    if not reject:
        spread = uniformity.bonferroni([uniformity.kolmogorov_smirnov(values) for values in families.values()])
        results.append(statistic(subject, ALL_P_VALUES, spread, f"{len(tests)} p-values"))
    return [*results, _correlation(subject, runs, evidence, groups, reject=reject)]


def _words(recording: Recording, groups: Sequence[str]) -> Tensor:
    return torch.cat([seen.flatten() for group in groups for seen in recording.tensors(group)])[:_MAX_WORDS]


def _correlation(
    subject: str, runs: Sequence[MaskedRun], evidence: Evidence, groups: Sequence[str], *, reject: bool
) -> Result:
    """Correlate words with the integers that they carry, by group, since the groups' rows differ in length."""
    verified = _required(evidence.verified)
    found = [correlation.strongest(run.worker.first(group), verified.first(group)) for run in runs for group in groups]
    worst = min(found, key=lambda each: each.p_value)
    p_value = min(1.0, worst.p_value * len(found))
    note = f"largest |r| = {worst.largest:.4f} ({worst.where}); 5/sqrt(n) = {worst.limit:.4f}"
    return statistic(subject, CORRELATION, p_value, note, reject=reject)


def _collusion(
    run: MaskedRun,
    evidence: Evidence,
    attacker: Attacker,
    nearest: InOrder,
    generator: torch.Generator,
) -> list[Result]:
    """Unmask with the orders of all dealers, then with one of them missing."""
    if not run.dealers:
        return []
    words = torch.cat(run.worker.tensors(FIRST_GROUP))
    names = [group.name for group in linear_groups(attacker.public.config)]
    tokens = len(evidence.ids)

    def without(missing: int | None) -> Tensor:
        parties = [dealer for index, dealer in enumerate(run.dealers) if index != missing]
        return collusion.unmask(words, FIRST_GROUP, names.index(FIRST_GROUP), parties)[:tokens] if parties else words

    results = [recovered("masked", COLLUSION_ALL, nearest(without(None)), evidence.ids, "outside of what is promised")]
    for index, dealer in enumerate(run.dealers):
        attack = COLLUSION_SOME.format(missing=dealer.observer)
        results.append(at_chance("masked", attack, without(index)[:tokens], nearest, evidence.ids, generator))
    return results


def _required(recording: Recording | None) -> Recording:
    if recording is None:
        raise InputError("masked words are compared with the integers that they carry: record `verified` too.")
    return recording
