"""The whole audit: as expected on a sound system, and a failure for each way of being unsound."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from audit_cases import Case, generator, record

from tsqp.audit import simulate, suite
from tsqp.audit.evidence import Attacker, Evidence
from tsqp.audit.findings import chance_limit
from tsqp.audit.page import page
from tsqp.audit.prompts import LETTER, prompt_ids, training_text_ids
from tsqp.audit.public import FIRST_GROUP
from tsqp.audit.recorder import Recording, Seen
from tsqp.audit.scheme_checks import SCHEMES
from tsqp.audit.suite import Audit
from tsqp.errors import AuditError, InputError
from tsqp.model.architecture import chain_name, chains, read_config
from tsqp.model.tokenizer import Tokenizer, find_tokenizer
from tsqp.reports import AuditReport


def audited(case: Case, evidence: Evidence, levels: tuple[str, ...] = suite.LEVELS, *names: str) -> Audit:
    return suite.run("tiny", evidence, case.attacker(), levels, names)


def surprises(report: AuditReport) -> set[tuple[str, str]]:
    return {(finding.subject, finding.attack) for finding in report.findings if finding.ok is False}


def test_everything_is_as_expected(tiny: Case) -> None:
    report = audited(tiny, tiny.evidence(), suite.LEVELS, *SCHEMES).report()
    assert surprises(report) == set()
    suite.require_expected(report)
    assert {finding.subject for finding in report.findings} == {*suite.LEVELS, "masked, r = 0", *SCHEMES}


def test_masks_of_zero_are_noticed(tiny: Case) -> None:
    evidence = tiny.evidence()
    forgotten = simulate.unmasked(tiny.verified)
    report = audited(tiny, replace(evidence, masked=(forgotten,)), ("masked",)).report()
    noticed = {attack for subject, attack in surprises(report) if subject == "masked"}
    wanted = {"nearest neighbour", "row-space membership", "repeated rows", "differences of two messages"}
    assert wanted | {"uniform bytes", "correlation with the plaintext"} <= noticed
    with pytest.raises(AuditError, match="nearest neighbour on masked"):
        suite.require_expected(report)


def test_masks_used_by_two_sessions_are_noticed(tiny: Case) -> None:
    report = audited(tiny, replace(tiny.evidence(), masked=(tiny.masked(1), tiny.masked(1))), ("masked",)).report()
    assert ("masked", "repeated rows") in surprises(report)
    assert ("masked", "nearest neighbour") not in surprises(report)


def test_a_dealer_that_alone_knows_the_mask_is_noticed(tiny: Case) -> None:
    run = tiny.masked(4, dealers=1)
    doubled = replace(run, dealers=(*run.dealers, replace(tiny.masked(9, dealers=1).dealers[0], observer="dealer 2")))
    report = audited(tiny, replace(tiny.evidence(), masked=(doubled, tiny.masked(2))), ("masked",)).report()
    assert ("masked", "worker and all dealers") in surprises(report), "the second dealer's mask was never used"
    assert ("masked", "worker and all dealers but dealer 2") in surprises(report)


def test_an_attack_that_finds_nothing_at_open_is_noticed(tiny: Case) -> None:
    noise = [replace(seen, tensor=torch.randn(seen.tensor.shape, generator=generator(3))) for seen in tiny.opened.seen]
    evidence = replace(tiny.evidence(), opened=Recording("worker", tuple(noise)))
    report = audited(tiny, evidence, ("open",), "rank-one", "left-mixing").report()
    assert surprises(report) == {
        ("open", "nearest neighbour"),
        ("open", "row-space membership"),
        ("rank-one", "one entry per row stands out"),
        ("left-mixing", "row-space membership"),
    }


def test_attention_must_have_been_recorded(tiny: Case) -> None:
    with pytest.raises(InputError, match="attention"):
        audited(tiny, replace(tiny.evidence(), offloaded=None), (), "qk-scaling")


def test_chance_is_what_independent_guesses_exceed_once_in_a_million() -> None:
    assert chance_limit(90, 1 / 49152) == 2
    assert chance_limit(20, 0.5) == 19
    assert chance_limit(10, 1.0) == 10
    assert chance_limit(10, 0.0) == 0


class HostileTokenizer(Tokenizer):
    """Tokens that would run as markup."""

    def __init__(self) -> None:
        pass

    def decode(self, ids: list[int]) -> str:
        return f"<script>alert({ids[0]})</script>&"


def test_the_page_escapes_every_text_and_asks_nobody(tiny: Case) -> None:
    done = replace(audited(tiny, tiny.evidence()), model="<img src=x>")
    text = page(done, HostileTokenizer())
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(" in text
    for outside in ("http:", "https:", "src=", "url(", "@import", "<link"):
        assert outside not in text.replace("&lt;img src=x&gt;", "").replace("'&lt;img src=x&gt;'", ""), outside
    assert "All " in text


def test_the_page_shows_what_is_not_as_expected(tiny: Case) -> None:
    forgotten = simulate.unmasked(tiny.verified)
    text = page(audited(tiny, replace(tiny.evidence(), masked=(forgotten,)), ("masked",)), None)
    assert "NOT as expected" in text
    assert "Not as expected: nearest neighbour found 100.0%" in text


def test_prompts_out_of_reach_are_refused(bundled_directory: Path) -> None:
    architecture, tokenizer = read_config(bundled_directory), find_tokenizer(bundled_directory)
    with pytest.raises(InputError, match="takes 8 to 288"):
        prompt_ids(architecture, tokenizer, "word " * 400)
    with pytest.raises(InputError, match="has 1 tokens"):
        prompt_ids(architecture, tokenizer, "word")
    with pytest.raises(InputError, match="no tokenizer"):
        prompt_ids(architecture, None, "word")


def test_headline_results_on_the_bundled_model(bundled_directory: Path) -> None:
    """Every scheme and level on a real prompt, recorded in this process; the command records real links."""
    architecture, tokenizer = read_config(bundled_directory), find_tokenizer(bundled_directory)
    ids = prompt_ids(architecture, tokenizer, LETTER)
    case = record(bundled_directory, torch.tensor(ids))
    attacker = Attacker(case.public, training_text_ids(architecture, tokenizer))
    done = suite.run("smollm2", case.evidence(), attacker, suite.LEVELS, tuple(SCHEMES))
    report = done.report()
    assert surprises(report) == set()
    found = {(finding.subject, finding.attack): finding.value for finding in report.findings}
    assert len(ids) == 96
    for subject in ("open", "verified", "masked, r = 0"):
        assert found[subject, "nearest neighbour"] == 1
    assert found["rank-one", "one entry per row stands out"] == 1
    assert found["left-mixing", "row-space membership"] == 1
    assert found["permutation", "replay of attention"] == 1
    assert found["open", "regression from layers.1.qkv"] > 0.75
    assert found["masked", "regression from layers.1.qkv"] < 0.1


def test_a_worker_knows_what_every_group_of_a_chain_reads(tiny: Case) -> None:
    """Of a chain it is sent what the first reads and the residual stream; the rest follows from the model."""
    runner = tiny.public.runner()
    groups = chains(runner.config)[0]
    inputs = runner.inputs(tiny.ids_T[None], frozenset(groups))
    embedded_TD = tiny.public.checkpoint.read("model.embed_tokens.weight")[tiny.ids_T]
    x_TC = torch.cat((inputs["layers.0.o"], embedded_TD), dim=1)
    other = Seen("linear", FIRST_GROUP, torch.zeros(1))
    recording = Recording("worker", (Seen("linear_chain", chain_name(groups), x_TC), other))
    followed = runner.followed(recording)
    assert [seen.group for seen in followed.seen] == [*groups, FIRST_GROUP]
    assert followed.seen[4] is other
    for group, x_TK in inputs.items():
        assert torch.equal(followed.first(group), x_TK)


def test_the_first_group_is_what_every_recording_holds(tiny: Case) -> None:
    assert isinstance(tiny.opened.seen[0], Seen)
    assert tiny.opened.seen[0].group == FIRST_GROUP
