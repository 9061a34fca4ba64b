"""Copies what the enclave runs into one directory: this interpreter, the packages that TSQP needs, their libraries.

Gramine hashes each file of the directory, and its start-up grows with the square of their number: nothing is copied
that no program opens, such as headers, tests, stubs and byte code. Nothing depends on when or where it is done: the
same packages give the same files.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # pip always has it
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]

ROOT: tuple[str, tuple[str, ...]] = ("tsqp", ("serve",))
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
# Requirements that no program of ours imports, nor what only they require; a run without them shows it
# (tests/integration/test_gramine_files.py).
UNUSED = {
    "huggingface-hub": "tokenizers downloads with it",
    "networkx": "torch compiles models with it",
    "setuptools": "torch compiles extensions with it",
    "sympy": "torch compiles models with it",
}
LEFT_OUT_FOLDERS = {"__pycache__", "include", "test", "tests", "site-packages", "idlelib", "tkinter", "turtledemo"}
LEFT_OUT_FOLDERS |= {"ensurepip", "lib2to3", "pydoc_data", "venv", "_distutils_hack"}
LEFT_OUT_SUFFIXES = {".pyi", ".pyc", ".pyx", ".pxd", ".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu", ".a", ".lib"}
LEFT_OUT_SUFFIXES |= {".cmake", ".md", ".rst", ".in", ".exe", ".sh", ".csh", ".fish", ".ps1"}
LEFT_OUT_PATHS = ("torch/share/",)
# Of torch: libraries that only its own tests load, and programs but for one that it looks for.
LEFT_OUT_LIBRARIES = ("libjitbackend_test", "libtorchbind_test", "libbackend_with_compiler", "libaoti_custom_ops")
# Of the standard library.
LEFT_OUT_NAMES = (
    *("_crypt", "_ctypes_test", "_curses", "_dbm", "_gdbm", "_sqlite3", "_test", "_tkinter", "_xx"),
    *("nis.", "readline", "xxlimited"),
)
# What is kept of a distribution's description: versions and plug-ins are looked up in it.
DESCRIPTION = {"METADATA", "entry_points.txt"}
# They come with Gramine, patched.
GLIBC = {"ld-linux-x86-64", "libanl", "libc", "libdl", "libm", "libmvec", "libnsl", "libpthread", "libresolv", "librt"}
GLIBC |= {"libutil", "libnss_dns", "libnss_files", "libthread_db", "linux-vdso"}


def planned() -> dict[str, Path]:
    """Map each file's place in the directory to where it is now.

    Raises:
        SystemExit: a package or a library is missing, or torch is a build for GPUs.
    """
    plan = {"bin/python3": Path(sys.executable).resolve()}
    stdlib = Path(sysconfig.get_path("stdlib"))
    for file in _kept(stdlib):
        if file.parent.name == "lib-dynload" and file.name.startswith(LEFT_OUT_NAMES):
            continue
        plan[f"lib/{PYTHON}/{file.relative_to(stdlib).as_posix()}"] = file
    packages = f"lib/{PYTHON}/site-packages"
    for name in sorted(_distributions()):
        for place, file in _package_files(name):
            plan[f"{packages}/{place}"] = file
    if any("torch_cuda" in place for place in plan):
        raise SystemExit(
            "torch is a build for GPUs, which SGX has none of: install its CPU build into this environment."
        )
    plan |= _libraries(plan)
    return dict(sorted(plan.items()))


def build(out: Path) -> int:
    """Copy the files; the directory appears when it is complete. Returns how many there are."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    plan = planned()
    for place, source in plan.items():
        target = part / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755 if place.startswith("bin/") else 0o644)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    return len(plan)


def _kept(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            if path.name not in LEFT_OUT_FOLDERS and not path.name.startswith(f"config-{PYTHON[6:]}"):
                yield from _kept(path)
        elif path.suffix not in LEFT_OUT_SUFFIXES:
            yield path


def _is_used(place: str) -> bool:
    """Tell whether a file of a package is."""
    path = Path(place)
    if place.startswith("torch/bin/"):
        return path.name == "torch_shm_manager"
    return path.suffix not in LEFT_OUT_SUFFIXES and not path.name.startswith(LEFT_OUT_LIBRARIES)


def _distributions() -> set[str]:
    """Name TSQP's distribution and all that it requires, with their extras' requirements."""
    found: dict[str, set[str]] = {}
    waiting = [ROOT]
    while waiting:
        name, extras = waiting.pop()
        name = name.lower().replace("_", "-")
        new = set(extras) - found.get(name, set())
        if name in UNUSED or (name in found and not new):
            continue
        found[name] = found.get(name, set()) | set(extras)
        for text in _distribution(name).requires or ():
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *found[name])):
                waiting.append((requirement.name, tuple(requirement.extras)))
    return set(found)


def _distribution(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise SystemExit(
            f"{name} is not installed for {sys.executable}: run 'make test' once, or give PYTHON=... of an environment "
            "with pip install 'tsqp[serve]'."
        ) from None


def _package_files(name: str) -> Iterator[tuple[str, Path]]:
    """Yield places below site-packages and files."""
    distribution = _distribution(name)
    if name == ROOT[0]:  # it may be installed from a checkout
        spec = importlib.util.find_spec(name)
        for location in (spec.submodule_search_locations if spec else None) or ():
            for file in _kept(Path(location)):
                yield f"{name}/{file.relative_to(location).as_posix()}", file
    for recorded in distribution.files or ():
        place, parts = recorded.as_posix(), recorded.parts
        if ".." in parts or place.endswith(".pth") or place.startswith(LEFT_OUT_PATHS):
            continue
        if parts[0].endswith(".dist-info"):
            if recorded.name in DESCRIPTION and len(parts) == 2:  # noqa: PLR2004  not its licences' folder
                yield place, Path(str(distribution.locate_file(recorded)))
        elif not LEFT_OUT_FOLDERS.intersection(parts[:-1]) and _is_used(place):
            yield place, Path(str(distribution.locate_file(recorded)))


def _libraries(plan: dict[str, Path]) -> dict[str, Path]:
    """Find the system's libraries that the binaries load, but for those of glibc."""
    binaries = [str(file) for place, file in plan.items() if place == "bin/python3" or ".so" in file.name]
    told = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
    ours = {str(file.resolve()) for file in plan.values()}
    found: dict[str, Path] = {}
    for line in told.splitlines():
        name, arrow, target = (part.strip() for part in line.partition("=>"))
        if not arrow or name.partition(".so")[0] in GLIBC:
            continue
        if target == "not found":
            raise SystemExit(f"{name} is needed by a package and not found: install the system's package that has it.")
        file = Path(target.partition(" (")[0])
        if str(file.resolve()) not in ours:
            found[f"lib/{name}"] = file
    return found


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    print(f"{directory}: {build(directory)} files")
