"""Locks of the containers: what pip finds gives one text, with the hash of one file for each package."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy_lock", ROOT / "deploy" / "lock.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


lock = _module()


def _found(name: str, version: str, digit: str = "a") -> dict[str, Any]:
    archive = {"hashes": {"sha256": digit * 64}}
    return {"metadata": {"name": name, "version": version}, "download_info": {"url": "-", "archive_info": archive}}


FOUND = [_found("torch", "2.13.0+cpu"), _found("Jinja2", "3.1.6", "b"), _found("typing_extensions", "4.16.0", "c")]


def test_the_order_in_which_pip_finds_packages_changes_nothing() -> None:
    texts = {lock.locked("enclave", {"install": list(order)}) for order in itertools.permutations(FOUND)}
    assert len(texts) == 1
    assert lock.pins(texts.pop()) == ["jinja2==3.1.6", "torch==2.13.0+cpu", "typing-extensions==4.16.0"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({**FOUND[1], "download_info": {"url": "-", "dir_info": {}}}, "jinja2 3.1.6 has no SHA-256"),
        (_found("jinja2", "3.1.5"), "jinja2 is there twice"),
    ],
)
def test_a_package_without_a_hash_or_twice_is_refused(found: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        lock.locked("enclave", {"install": [FOUND[1], found]})


@pytest.mark.parametrize(("role", "version"), [("enclave", "2.13.0"), ("worker", "2.13.0+cpu")])
def test_the_other_kind_of_torch_is_refused(role: str, version: str) -> None:
    with pytest.raises(SystemExit, match=f"The {role} needs torch"):
        lock.locked(role, {"install": [_found("torch", version)]})


def test_another_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    with pytest.raises(SystemExit, match=r"CPython 3\.11"):
        lock.resolve("worker", "")


def _entries() -> dict[str, str]:
    text = (ROOT / "deploy" / "enclave.lock").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    entries = dict(re.findall(r"^(\S+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}$", "\n".join(lines), re.MULTILINE))
    assert 2 * len(entries) == len(lines), "each line is of an entry with one hash"
    assert list(entries) == sorted(entries)
    return entries


def test_the_enclaves_lock_is_complete_and_of_the_versions_that_are_tested() -> None:
    entries = _entries()
    names = {
        re.split(r"[<>=!\[; ]", wanted, maxsplit=1)[0] for wanted in lock.wanted("enclave") if "tomli" not in wanted
    }
    assert names <= set(entries)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        if name in entries:
            assert entries[name].partition("+")[0] == version, f"make deploy-lock ROLE=enclave: {name}"
    assert entries["torch"].endswith("+cpu")


def test_no_lock_has_what_only_development_needs() -> None:
    assert not {"pytest", "hypothesis", "mypy", "ruff", "transformers"} & set(_entries())
