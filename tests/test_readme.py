"""What the READMEs promise is tried: code runs, help text and settings are those in force, links resolve."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tsqp.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tee_*/*.md"))
    if ".venv" not in page.parts
]
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")


def commands(tree: typer.Typer) -> dict[str, str]:
    """Map every command, those of groups with the group's name before, to the first line of its help."""
    found = {
        command.name or command.callback.__name__: (command.callback.__doc__ or "").splitlines()[0]
        for command in tree.registered_commands
        if command.callback
    }
    for group in tree.registered_groups:
        if group.typer_instance:
            name = group.typer_instance.info.name
            found |= {f"{name} {command}": line for command, line in commands(group.typer_instance).items()}
    return found


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", blocks(ROOT / "README.md", "python"), ids=lambda block: block.splitlines()[0])
def test_python_in_the_readme_runs(block: str, bundled_directory: Path) -> None:
    assert bundled_directory.exists()
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == " Paris\n"


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "tee_gpu" / "README.md"], ids=lambda page: page.parent.name
)
def test_commands_in_shell_blocks_exist(page: Path) -> None:
    known = {name.split()[0] for name in commands(app)}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in "\n".join(blocks(page, "sh")).splitlines():
        words = line.split()
        if words[:1] == ["tsqp"]:
            assert words[1] in known
        elif words[:1] == ["make"]:
            assert words[1] in targets
        elif words[:1] == ["python"]:
            assert (page.parent / words[1]).exists()


def test_commands_in_the_readme_are_those_of_the_help(bundled_directory: Path) -> None:
    """The block between the help markers is the output of ``tsqp --help``, command by command."""
    assert bundled_directory.exists()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- help:tsqp -->\n(.*?)<!-- /help -->", text, re.DOTALL)
    assert match
    listed = dict(re.findall(r"^\| `tsqp ([\w ]+)` \| (.*?) \|$", match[1], re.MULTILINE))
    assert listed == commands(app)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_resolve(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
