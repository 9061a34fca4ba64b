"""Which files become part of the enclave: enough to run, few enough to start, and none that tells where it was made."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import model_files
import pytest
import runtime_tree
from workers import packed_tiny


@pytest.fixture(scope="module")
def plan() -> dict[str, Path]:
    return runtime_tree.planned()


def test_it_is_small(plan: dict[str, Path]) -> None:
    """Gramine's start-up grows with the square of the number of trusted files: about 2 s for 5,000."""
    assert len(plan) < 6000


def test_nothing_is_in_it_that_no_program_opens(plan: dict[str, Path]) -> None:
    for place in plan:
        assert not {"__pycache__", "include", "tests", "test"}.intersection(place.split("/")[:-1]), place
        assert not place.endswith((".pyi", ".pyc", ".h", ".pth", ".a")), place
        assert "/setuptools/" not in place
    for name in ("pytest", "mypy", "transformers", "matplotlib", "grpc", "hypothesis", "pip", "sympy"):
        assert not [place for place in plan if f"/site-packages/{name}/" in place]


def test_what_runs_is_in_it(plan: dict[str, Path]) -> None:
    packages = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    for place in ("tsqp/cli/serve.py", "tsqp/serve/page/index.html", "torch/__init__.py", "torch/lib/libtorch_cpu.so"):
        assert f"{packages}/{place}" in plan
    assert plan["bin/python3"] == Path(sys.executable).resolve()
    libraries = {place.split("/")[1] for place in plan if place.count("/") == 1 and ".so" in place}
    assert "libstdc++.so.6" in libraries
    assert not {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"} & libraries


def test_nothing_in_it_tells_where_it_was_made(plan: dict[str, Path]) -> None:
    described = [place for place in plan if ".dist-info/" in place]
    assert described
    assert {place.rpartition("/")[2] for place in described} <= {"METADATA", "entry_points.txt"}


def test_the_same_packages_give_the_same_plan(plan: dict[str, Path]) -> None:
    assert list(runtime_tree.planned().items()) == list(plan.items())


def test_a_build_for_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_tree, "_distributions", lambda: {"torch"})
    monkeypatch.setattr(runtime_tree, "_package_files", lambda _: [("torch/lib/libtorch_cuda.so", Path("x"))])
    with pytest.raises(SystemExit, match="install its CPU build"):
        runtime_tree.planned()


def test_a_missing_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("runtime_tree.metadata.distribution", missing)
    with pytest.raises(SystemExit, match=r"tsqp is not installed .*pip install 'tsqp\[serve\]'"):
        runtime_tree.planned()


def test_a_copy_appears_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_text("x", encoding="utf-8")
    monkeypatch.setattr(runtime_tree, "planned", lambda: {"bin/python3": source, "lib/a.py": source})
    out = tmp_path / "runtime"
    assert runtime_tree.build(out) == 2
    assert (out / "bin" / "python3").stat().st_mode & 0o777 == 0o755
    assert (out / "lib" / "a.py").stat().st_mode & 0o777 == 0o644
    monkeypatch.setattr(runtime_tree, "planned", lambda: {"lib/b.py": source, "lib/c.py": tmp_path / "missing"})
    with pytest.raises(FileNotFoundError):
        runtime_tree.build(out)
    assert (out / "lib" / "a.py").exists()
    monkeypatch.setattr(runtime_tree, "planned", lambda: {"lib/b.py": source})
    runtime_tree.build(out)
    assert [path.name for path in out.rglob("*.py")] == ["b.py"]


def test_an_enclave_gets_no_codes_and_no_more_of_a_model_than_it_reads(tiny_llama: Path, tmp_path: Path) -> None:
    packed = packed_tiny(tiny_llama, tmp_path / "packed")
    model_files.copy("packed", str(packed), tmp_path / "inside")
    assert {path.name for path in (tmp_path / "inside").iterdir()} == {
        path.name for path in (packed / "enclave").iterdir()
    }
    model_files.copy("plain", str(tiny_llama), tmp_path / "plain")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {"config.json", "model.safetensors"} <= names <= {path.name for path in tiny_llama.iterdir()}
