"""``tsqp audit`` end to end: real worker and dealers, one report, and an exit code that means something."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from tsqp.audit.scheme_checks import SCHEMES
from tsqp.cli import app
from tsqp.reports import AuditReport


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_real_recordings_are_as_expected(tiny_llama: Path, tmp_path: Path) -> None:
    html = tmp_path / "audit.html"
    code, out, err = run(
        "--model", tiny_llama, "--level", "all", "--scheme", "all", "--html", html, "--threads", 1, "--json"
    )
    assert code == 0, err
    report = msgspec.json.decode(out, type=AuditReport)
    assert report.ok
    assert report.simulated == [
        "masked, r = 0: the integers recorded at `verified`, to which a mask of zeros adds nothing"
    ]
    assert {"worker and all dealers", "worker and all dealers but dealer 2"} <= {f.attack for f in report.findings}
    assert html.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_surprise_ends_with_exit_code_1(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SCHEMES["left-mixing"]

    def silent(*arguments: object) -> list[object]:
        results = broken(*arguments)  # type: ignore[arg-type]
        finding = msgspec.structs.replace(results[0].finding, ok=False)
        return [type(results[0])(finding)]

    monkeypatch.setitem(SCHEMES, "left-mixing", silent)
    code, out, err = run("--model", tiny_llama, "--scheme", "left-mixing", "--threads", 1, "--json")
    assert code == 1
    assert not msgspec.json.decode(out, type=AuditReport).ok
    assert "not as expected: row-space membership on left-mixing" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--level", "closed"), "expected one of open, verified, masked, or all"),
        (("--scheme", "rot13"), "expected one of rank-one"),
        (("--prompt", "Hello"), "no tokenizer.json"),
        (("--html", "/nowhere/at/all/page.html"), "there is no directory"),
    ],
)
def test_mistakes_are_one_sentence(tiny_llama: Path, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run("--model", tiny_llama, *arguments)
    assert code == 3
    assert message in err
