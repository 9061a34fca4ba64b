"""Writes what a container installs: each package once, of one version, with the SHA-256 of the one file that fits.

pip looks for them, so indexes are chosen as pip is told to, and nothing is installed. A lock is for CPython 3.11 on
Linux x86-64, which the containers have. What it says already stays, unless constraints.txt or pyproject.toml differ.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Of whom it is, and the extras of pyproject.toml that it runs with. A dealer runs from the worker's container.
EXTRAS: dict[str, tuple[str, ...]] = {"enclave": ("serve",), "worker": ("metrics",)}
PYTHON = (3, 11)
MACHINE = "x86_64"
_PIN = re.compile(r"^(?P<pin>[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+) \\$", re.MULTILINE)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def wanted(role: str) -> list[str]:
    """Return what TSQP requires in a role, to be built and to run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in EXTRAS[role]:
        listed += project["project"]["optional-dependencies"][extra]
    return sorted(listed)


def locked(role: str, report: Mapping[str, Any]) -> str:
    """Return the text of a lock: a function of what pip found, in no order that it gave.

    Args:
        role: one of ``EXTRAS``.
        report: what ``pip install --report`` wrote.

    Raises:
        SystemExit: something has no hash, is there twice, or is the other kind of torch.
    """
    entries: dict[str, str] = {}
    for found in report["install"]:
        name, version = _normal(found["metadata"]["name"]), found["metadata"]["version"]
        digest = found["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256", "")
        if not _SHA256.fullmatch(digest):
            raise SystemExit(f"{name} {version} has no SHA-256: it must be a wheel of a package index, or a file.")
        if name in entries:
            raise SystemExit(f"{name} is there twice.")
        entries[name] = f"{name}=={version} \\\n    --hash=sha256:{digest}\n"
    _check_torch(role, entries.get("torch", ""))
    head = (
        f"# Made by 'make deploy-lock ROLE={role}' from pyproject.toml and constraints.txt, for CPython "
        f"{'.'.join(map(str, PYTHON))} on Linux {MACHINE}.\n"
        "# Each package has one file and its SHA-256; pip refuses any other. docs/deploy.md says how it is used.\n"
    )
    return head + "".join(entries[name] for name in sorted(entries))


def pins(lock: str) -> list[str]:
    """Return ``name==version`` of each package in a lock's text."""
    return [match["pin"] for match in _PIN.finditer(lock)]


def resolve(role: str, before: str) -> dict[str, Any]:
    """Ask pip what it would install.

    Args:
        role: one of ``EXTRAS``.
        before: the text of the lock that there is; empty for none.

    Raises:
        SystemExit: this is not the machine that the lock is for, or pip finds no answer.
    """
    if sys.version_info[:2] != PYTHON or (platform.system(), platform.machine()) != ("Linux", MACHINE):
        raise SystemExit(
            f"A lock is made with CPython {'.'.join(map(str, PYTHON))} on Linux {MACHINE}: give PYTHON=..."
        )
    with tempfile.TemporaryDirectory() as scratch:
        report, kept = Path(scratch, "report.json"), Path(scratch, "kept.txt")
        kept.write_text("\n".join(pins(before)) + "\n", encoding="utf-8")
        asked = ["-m", "pip", "install", "--dry-run", "--ignore-installed", "--only-binary", ":all:", "--quiet"]
        asked += ["--report", str(report), "--constraint", str(ROOT / "constraints.txt"), "--constraint", str(kept)]
        if subprocess.run([sys.executable, *asked, *wanted(role)], check=False).returncode:
            raise SystemExit("pip found no answer: where the lock contradicts constraints.txt, give --upgrade.")
        loaded: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return loaded


def _check_torch(role: str, entry: str) -> None:
    """Refuse to give an enclave CUDA, which SGX has not and which doubles the image, and a worker's GPU none."""
    if entry and (role == "enclave") != ("+cpu" in entry):
        want = (
            "its CPU build: name PyTorch's index of those in PIP_EXTRA_INDEX_URL"
            if role == "enclave"
            else "its CUDA build"
        )
        raise SystemExit(f"The {role} needs torch as {want}.")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Write a role's lock beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=sorted(EXTRAS))
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that constraints.txt allows")
    asked = parser.parse_args()
    out = HERE / f"{asked.role}.lock"
    before = out.read_text(encoding="utf-8") if out.exists() and not asked.upgrade else ""
    text = locked(asked.role, resolve(asked.role, before))
    out.write_text(text, encoding="utf-8")
    print(f"{out.name}: {len(pins(text))} packages")


if __name__ == "__main__":
    main()
