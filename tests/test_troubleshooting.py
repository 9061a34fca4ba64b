"""Every sentence that an operator can meet is quoted in docs/troubleshooting.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tsqp import errors
from tsqp.arith import native

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/tsqp"
QUOTES = tuple(
    line.removeprefix("> ")
    for line in (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("> ")
)
# What is raised for who uses the library, benchmarks or the audit, and what says all about a damaged model file.
ELSEWHERE = (
    *("audit", "cli/audit.py", "bench", "cli/bench", "model"),
    *("engine/api.py", "engine/scheduler.py", "worker/legacy.py", "worker/services.py"),
)
KINDS = {
    kind.__name__
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, (errors.SetupError, errors.TransportError, errors.PeerKeyError))
}
NOTICES = {"notice", "_notice", "on_notice"}
# Shorter ones are put together from others.
LEAST_LETTERS = 15


def elsewhere(path: Path) -> bool:
    name = path.relative_to(SOURCE).as_posix()
    return any(name == each or name.startswith(f"{each}/") for each in ELSEWHERE)


MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if not elsewhere(path)]


def sentences(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the pattern of each sentence that is raised or told; what is filled in may be anything."""
    tree = ast.parse(source)
    constants = {
        each.targets[0].id: each.value.value
        for each in tree.body
        if isinstance(each, ast.Assign)
        and isinstance(each.targets[0], ast.Name)
        and isinstance(each.value, ast.Constant)
        and isinstance(each.value.value, str)
    }

    def pattern(node: ast.expr) -> str:
        match node:
            case ast.Constant(value=str(text)):
                return re.escape(text)
            case ast.JoinedStr(values=parts):
                return "".join(map(pattern, parts))
            case ast.FormattedValue(value=ast.Name(id=name)) if name in constants:
                return re.escape(constants[name])
        return ".*"

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in KINDS | NOTICES:
                yield node.lineno, pattern(node.args[0])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_what_people_are_told_is_on_the_page(path: Path) -> None:
    missing = [
        (line, sentence)
        for line, sentence in sentences(path.read_text(encoding="utf-8"))
        if len(re.sub(r"\.\*|\W", "", sentence)) >= LEAST_LETTERS
        and not any(re.search(sentence, quote) for quote in QUOTES)
    ]
    assert not missing, "quote them in docs/troubleshooting.md"


@pytest.mark.parametrize("extension", [object(), None], ids=["off", "not built"])
def test_what_is_said_of_native_kernels_is_on_the_page(extension: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", lambda: None)
    monkeypatch.setattr(native, "_extension", extension)
    assert native.notice() in QUOTES


def test_a_sentence_that_is_not_there_is_found() -> None:
    source = 'WHO = "the moon"\nraise ConfigError(f"no cheese is left on {WHO} for {name}, so far.")'
    ((_, sentence),) = sentences(source)
    assert re.fullmatch(sentence, "no cheese is left on the moon for NAME, so far.")
    assert not any(re.search(sentence, quote) for quote in QUOTES)
