"""One page for people: the prompt, and beside it what was read out of each message.

Every text that comes from a model or a prompt is escaped; the page makes no request.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby

import torch
from torch import Tensor

from tsqp.audit.findings import Result
from tsqp.audit.page_style import SKELETON, STYLE
from tsqp.audit.page_text import SUBJECTS, Subject, explanation, p_value_text
from tsqp.audit.suite import Audit
from tsqp.model.tokenizer import Tokenizer
from tsqp.reports import AuditFinding

_BINS = 96
_CHART_HEIGHT = 100
_HALF = 0.5
_SECTIONS = (
    ("level", "The levels", "What TSQP's worker sees at each level, and what it could make of it."),
    ("test", "A test of the attacks", "An attack that fails proves little unless it is known to work."),
    (
        "scheme",
        "Obfuscations that people publish",
        "These hide activations by scaling, mixing, shuffling or adding noise to floats. TSQP offers none of them.",
    ),
)

Decode = Callable[[int], str]


def page(audit: Audit, tokenizer: Tokenizer | None) -> str:
    """Return the page as one HTML document.

    Args:
        audit: the results.
        tokenizer: turns ids into text; without one, ids are shown.
    """

    def decode(token: int) -> str:
        return tokenizer.decode([token]) if tokenizer else f"{token} "

    body = "\n".join([_header(audit, decode), *_sections(audit, decode), _tables(audit), _footer(audit)])
    return SKELETON.format(style=STYLE, body=body)


def _header(audit: Audit, decode: Decode) -> str:
    report = audit.report()
    surprises = sum(finding.ok is False for finding in report.findings)
    verdict = (
        f"All {len(report.findings)} findings are as expected: what is not protected was read, and what is "
        "masked was not."
        if not surprises
        else f"{surprises} of {len(report.findings)} findings are NOT as expected; they are marked below."
    )
    original = "".join(_token(decode(token), "") for token in audit.evidence.ids)
    return f"""<h1>What the worker could read</h1>
<p>A prompt was run through <b>{escape(audit.model)}</b>. Everything that left the enclave was recorded, then attacked
with nothing but the model's public weights. {escape(verdict)}</p>
<div class="card">
<div class="label">the prompt, {report.tokens} tokens, {report.distinct_tokens} of them distinct</div>
<div class="text">{original}</div></div>
<div class="legend"><span><span class="t right">read correctly</span></span>
<span><span class="t wrong">guessed wrongly</span></span>
<span><span class="t none">&nbsp;·&nbsp;</span> not found</span>
</div>"""


def _sections(audit: Audit, decode: Decode) -> list[str]:
    """Group one card per level or scheme under its section."""
    headlines = _headlines(audit.results)
    parts = []
    for kind, title, text in _SECTIONS:
        cards = [
            _card(SUBJECTS[name], result, audit.evidence.ids, decode)
            for name, result in headlines.items()
            if name in SUBJECTS and SUBJECTS[name].kind == kind
        ]
        if cards:
            parts += [f"<h2>{escape(title)}</h2><p class='soft'>{escape(text)}</p>", *cards]
    return parts


def _headlines(results: Sequence[Result]) -> dict[str, Result]:
    """Choose the result to show for each subject: the first that kept what it attacked."""
    chosen: dict[str, Result] = {}
    for result in results:
        if result.seen is not None and result.guesses is not None:
            chosen.setdefault(result.finding.subject, result)
    return chosen


def _card(subject: Subject, result: Result, ids: Sequence[int], decode: Decode) -> str:
    finding = result.finding
    state, words = (
        ("leaks", "the worker can read it") if finding.value > _HALF else ("holds", "the worker cannot read it")
    )
    tag = "<span class='tag'>published, broken</span>" if subject.kind == "scheme" else ""
    verdict = subject.verdict if finding.ok else f"Not as expected: {finding.attack} found {finding.value:.1%}."
    original = "".join(_token(decode(token), "") for token in ids)
    chart = "" if result.seen is None else _chart(result.seen)
    return f"""<section class="card {state}"><div class="head"><h3>{escape(subject.title)}{tag}</h3>
<div class="score"><span class="state">{words}</span>{finding.value:.0%}
<small>{escape(finding.measures)}</small></div></div>
<p>{escape(subject.sent)}</p><p>{escape(verdict)}</p>
<div class="both"><div><div class="label">the prompt</div><div class="text">{original}</div></div>
<div><div class="label">read by {escape(finding.attack)}</div>
<div class="text">{_reconstruction(result, ids, decode)}</div></div></div>{chart}</section>"""


def _reconstruction(result: Result, ids: Sequence[int], decode: Decode) -> str:
    parts = []
    for token, guess in zip(ids, result.guesses or (), strict=True):
        if guess is None or guess < 0:
            parts.append('<span class="t none" title="not found">·</span>')
        else:
            parts.append(_token(decode(guess), "right" if guess == token else "wrong"))
    return "".join(parts)


def _token(text: str, kind: str) -> str:
    return f'<span class="t {kind}">{escape(text)}</span>'


def _chart(seen: Tensor) -> str:
    """Draw a histogram of what was sent, over its own range without the outermost hundredth."""
    values = seen.flatten().double()
    low, high = (float(values.quantile(part)) for part in (0.005, 0.995))
    if low >= high:
        return ""
    counts = torch.histc(values[(values >= low) & (values <= high)], _BINS, low, high)
    heights = (counts / counts.max() * _CHART_HEIGHT).tolist()
    bars = "".join(
        f'<rect x="{index * 10}" y="{_CHART_HEIGHT - height:.1f}" width="9" height="{height:.1f}"/>'
        for index, height in enumerate(heights)
    )
    whole = not seen.is_floating_point()
    ends = [f"{value:,.0f}" if whole else f"{value:.3g}" for value in (low, high)]
    name = "integers" if whole else "values"
    return f"""<div class="chart"><div class="label">how often the worker saw which {name}</div>
<svg viewBox="0 0 {_BINS * 10} {_CHART_HEIGHT}" preserveAspectRatio="none" role="img"
aria-label="histogram of {name} from {ends[0]} to {ends[1]}">{bars}</svg>
<div class="axis"><span>{ends[0]}</span><span>{ends[1]}</span></div></div>"""


def _tables(audit: Audit) -> str:
    rows = []
    findings = [result.finding for result in audit.results]
    for subject, group in groupby(findings, key=lambda finding: finding.subject):
        title = SUBJECTS[subject].title if subject in SUBJECTS else subject
        rows.append(f'<tr class="group"><td colspan="4">{escape(title)}</td></tr>')
        rows += [_row(finding) for finding in group]
    return f"""<h2>Every attack and test</h2>
<p class="soft">A p-value says how often truly random words would look at least this unusual; below one in a million a
test fails. Several tests in one row are combined so that their number does not matter (Bonferroni).</p>
<div class="scroll"><table><thead><tr><th>attack or test</th><th>found</th><th>expected</th><th></th></tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>"""


def _row(finding: AuditFinding) -> str:
    sign = {True: '<span class="ok">✓ as expected</span>', None: "", False: '<span class="wrongly">✗ not so</span>'}
    note = f'<div class="note">{escape(finding.note)}</div>' if finding.note else ""
    return f"""<tr><td><b>{escape(finding.attack)}</b><div class="note">{escape(explanation(finding.attack))}</div></td>
<td class="n">{escape(value_text(finding))}{note}</td><td class="n">{escape(finding.expected)}</td>
<td>{sign[finding.ok]}</td></tr>"""


def value_text(finding: AuditFinding) -> str:
    """Write what was found, with its unit."""
    if finding.p_value is not None:
        return p_value_text(finding.p_value)
    if finding.measures in ("tokens in order", "distinct tokens"):
        return f"{finding.value:.1%} of {finding.measures}"
    return f"{finding.value:g} {finding.measures}"


def _footer(audit: Audit) -> str:
    simulated = "".join(f"<p>Computed, not recorded: {escape(each)}.</p>" for each in audit.evidence.simulated)
    command = f"tsqp audit --model {shlex.quote(audit.model)} --html audit.html"
    return f"""<h2>Do it yourself</h2>
<p>The recordings come from real processes on one machine: a worker, and for masked two dealers. The attacks get the
recordings and the public weights, never a token id. The random choices of the broken schemes are seeded, so their rows
repeat exactly; masks draw fresh keys, so p-values differ from run to run.</p>
<pre>pip install tsqp
{escape(command)}</pre>{simulated}
<p class="soft">docs/audit.md states each attack, why it works, and where it comes from.</p>"""
