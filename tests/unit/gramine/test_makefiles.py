"""The Makefiles, with stand-ins for Gramine's programs: what they make, when they make it again, and what they say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gramine_manifests import loads, measured, unknown_keys

ROOT = Path(__file__).parents[3]
MRENCLAVE = "5a" * 32
# As Gramine's: definitions, a template, an output. It does no more than render.
MANIFEST = """
import sys
sys.path.insert(0, {tests!r})
from gramine_manifests import render
words = sys.argv[1:]
given = dict(word[2:].split("=", 1) for word in words if word.startswith("-D"))
template, out = (word for word in words if not word.startswith("-D"))
text = render(**given)
open(out, "w").write("" if "fail" in given["args"] else text)
sys.exit("fail" in given["args"])
"""
SIGN = """
import shutil, sys
words = sys.argv[1:]
source, out = words[words.index("--manifest") + 1], words[words.index("--output") + 1]
assert words[words.index("--date") + 1] == "0000-00-00"
shutil.copy(source, out)
open(source.removesuffix(".manifest") + ".sig", "w").write("signed with " + words[-1])
"""
VIEW = f"""
print('{{"mr_enclave": "{MRENCLAVE}"}}')
"""


VERSION = """
import sys
print("Gramine {version} (0123456789abcdef)" if sys.argv[1:] == ["--version"] else "Usage")
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "gramine-manifest": MANIFEST.format(tests=str(ROOT / "tests")),
        "gramine-direct": VERSION.format(version="1.9"),
        "gramine-sgx-sign": SIGN,
        "gramine-sgx-sigstruct-view": VIEW,
    }
    for name, text in programs.items():
        write_program(folder / name, text)
    return folder


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path, tiny_llama: Path) -> Path:
    """A copy of what the Makefiles use, with a runtime tree and a model that are up to date and hold nothing."""
    top = tmp_path / "checkout"
    for folder in ("gramine", "tee_gpu", "tee_only_llama"):
        left_out = shutil.ignore_patterns(
            "runtime", "models", ".build", "*.manifest", "*.sgx", "*.sig", "*.complete", "__pycache__"
        )
        shutil.copytree(ROOT / folder, top / folder, ignore=left_out)
    (top / "src" / "tsqp").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", top)
    (top / "gramine" / "runtime").mkdir()
    for kind in ("plain", "packed"):
        shutil.copytree(tiny_llama, top / "gramine" / "models" / kind / "tiny")
    (top / "gramine" / "runtime.complete").touch()
    return top


def make(
    checkout: Path, folder: str, *words: str, tools: Path | None = None, size: str = "4G"
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*([str(tools)] if tools else []), "/usr/bin", "/bin"])
    sizes = [f"ENCLAVE_SIZE={size}", "MAX_THREADS=56"] if size else []
    return subprocess.run(
        ["make", f"PYTHON={sys.executable}", "MODEL_NAME=tiny", *sizes, *words],
        cwd=checkout / folder,
        env={"PATH": path},  # nothing of a make that runs these tests
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


MADE = [("tee_gpu", {"tee_runner", "server"}), ("tee_only_llama", {"tee_runner"}), ("gramine", {"serve"})]


@pytest.mark.parametrize(("folder", "programs"), MADE)
def test_make_renders_each_program(folder: str, programs: set[str], checkout: Path, tools: Path) -> None:
    done = make(checkout, folder, tools=tools)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (checkout / folder).glob("*.manifest")} == {f"{name}.manifest" for name in programs}
    for name in programs:
        manifest = loads((checkout / folder / f"{name}.manifest").read_text(encoding="utf-8"))
        assert unknown_keys(manifest) == []
        assert f"gramine-direct ./{name}" in done.stdout
        for uri in manifest["sgx"]["trusted_files"][1:]:
            assert (checkout / folder / uri.removeprefix("file:")).exists(), uri


def test_what_is_up_to_date_is_not_made_again_and_another_value_makes_it(checkout: Path, tools: Path) -> None:
    make(checkout, "gramine", tools=tools)
    again = make(checkout, "gramine", tools=tools)
    assert "gramine-direct" not in again.stdout
    make(checkout, "gramine", "LEVEL=verified", tools=tools)
    manifest = loads((checkout / "gramine" / "serve.manifest").read_text(encoding="utf-8"))
    assert measured(manifest)["TSQP_LEVEL"] == "verified"


def test_the_size_is_worked_out_unless_it_is_given(checkout: Path, tools: Path) -> None:
    assert make(checkout, "tee_only_llama", tools=tools, size="").returncode == 0
    text = (checkout / "tee_only_llama" / "tee_runner.manifest").read_text(encoding="utf-8")
    assert loads(text)["sgx"]["enclave_size"] == "4G"
    make(checkout, "tee_only_llama", tools=tools, size="32G")
    text = (checkout / "tee_only_llama" / "tee_runner.manifest").read_text(encoding="utf-8")
    assert loads(text)["sgx"]["enclave_size"] == "32G"


def test_without_gramine_one_sentence_says_how_to_get_it(checkout: Path) -> None:
    if shutil.which("gramine-manifest", path="/usr/bin:/bin"):
        pytest.skip("Gramine is installed here")
    done = make(checkout, "tee_gpu")
    assert done.returncode != 0
    sentence, *rest = done.stderr.splitlines()
    assert sentence.startswith("Gramine is not installed: install the package gramine")
    assert all(line.startswith("make: ***") for line in rest)
    assert not list((checkout / "tee_gpu").glob("*.manifest"))
    assert make(checkout, "tee_gpu", "clean").returncode == 0


@pytest.mark.parametrize(("version", "named"), [("1.8", "1.8"), ("1.3.1", "1.3.1"), ("x", "of an unknown version")])
def test_a_gramine_that_is_too_old_is_named_and_makes_nothing(
    version: str, named: str, checkout: Path, tools: Path
) -> None:
    write_program(tools / "gramine-direct", VERSION.format(version=version))
    done = make(checkout, "tee_gpu", tools=tools)
    assert done.returncode != 0
    sentence, *rest = done.stderr.splitlines()
    assert sentence.startswith(f"Gramine {named} is too old: this manifest needs 1.9 or later; upgrade")
    assert all(line.startswith("make: ***") for line in rest)
    assert not list((checkout / "tee_gpu").glob("*.manifest"))


@pytest.mark.parametrize("version", ["1.9", "1.9.1", "1.10", "2.0"])
def test_a_newer_gramine_is_taken(version: str, checkout: Path, tools: Path) -> None:
    write_program(tools / "gramine-direct", VERSION.format(version=version))
    assert make(checkout, "tee_only_llama", tools=tools).returncode == 0


def test_signing_prints_the_measurement_and_needs_no_key_in_the_checkout(checkout: Path, tools: Path) -> None:
    done = make(checkout, "tee_gpu", "SGX=1", "SGX_SIGNER_KEY=/keys/mine.pem", tools=tools)
    assert done.returncode == 0, done.stderr
    assert f"tee_runner MRENCLAVE {MRENCLAVE}" in done.stdout
    assert f"server MRENCLAVE {MRENCLAVE}" in done.stdout
    made = {path.name for path in (checkout / "tee_gpu").iterdir()}
    assert {"tee_runner.manifest.sgx", "tee_runner.sig", "server.manifest.sgx", "server.sig"} <= made
    assert (checkout / "tee_gpu" / "server.sig").read_text(encoding="utf-8") == "signed with /keys/mine.pem"


def test_debugging_changes_the_log_and_never_the_enclave(checkout: Path, tools: Path) -> None:
    make(checkout, "gramine", "DEBUG=1", tools=tools)
    manifest = loads((checkout / "gramine" / "serve.manifest").read_text(encoding="utf-8"))
    assert manifest["loader"]["log_level"] == "debug"
    assert "debug" not in manifest["sgx"]


def test_what_fails_leaves_no_manifest(checkout: Path, tools: Path) -> None:
    assert make(checkout, "gramine", "ARGS=fail", tools=tools).returncode != 0
    assert not (checkout / "gramine" / "serve.manifest").exists()


@pytest.mark.parametrize("variable", ["WORKER_KEYS", "DEALER_KEYS", "API_KEYS"])
@pytest.mark.parametrize("file", ["a.key_secret", "tls.pem"])
def test_a_secret_key_is_refused(variable: str, file: str, checkout: Path, tools: Path) -> None:
    (checkout / "gramine" / file).touch()
    done = make(checkout, "gramine", f"{variable}={file}", tools=tools)
    assert done.returncode != 0
    assert "secret keys do not belong into a manifest" in done.stderr


def test_an_encrypted_model_needs_its_digest(checkout: Path, tools: Path) -> None:
    done = make(checkout, "gramine", "MODEL_KEY=model", tools=tools)
    assert done.returncode != 0
    assert "an encrypted model is not measured: give MODEL_DIGEST too" in done.stderr


def test_a_key_that_is_provisioned_is_that_of_an_encrypted_model(checkout: Path, tools: Path) -> None:
    (checkout / "gramine" / "ca.crt").touch()
    done = make(checkout, "gramine", "PROVISION_CA=ca.crt", tools=tools)
    assert done.returncode != 0
    assert "PROVISION_CA is for the key of an encrypted model: give MODEL_KEY too" in done.stderr
    shutil.copytree(checkout / "gramine" / "models" / "packed", checkout / "gramine" / "models" / "encrypted")
    given = ("PROVISION_CA=ca.crt", "MODEL_KEY=model", f"MODEL_DIGEST={'ab' * 32}")
    done = make(checkout, "gramine", *given, tools=tools)
    assert done.returncode == 0, done.stderr
    manifest = loads((checkout / "gramine" / "serve.manifest").read_text(encoding="utf-8"))
    assert "file:ca.crt" in manifest["sgx"]["trusted_files"]
    assert measured(manifest)["SECRET_PROVISION_SET_KEY"] == "model"  # noqa: S105  a name


@pytest.mark.parametrize("given", ["OWN_KEY=own.key_secret", "OWN_KEY_KEY=own"])
def test_an_own_key_is_taken_from_an_encrypted_file_only(given: str, checkout: Path, tools: Path) -> None:
    done = make(checkout, "gramine", given, tools=tools)
    assert done.returncode != 0
    assert "an own key is read from an encrypted file only" in done.stderr


def test_clean_and_distclean_leave_what_was_there(checkout: Path, tools: Path) -> None:
    before = {path.name for path in (checkout / "gramine").iterdir()}
    make(checkout, "gramine", "SGX=1", tools=tools)
    make(checkout, "gramine", "clean")
    assert {path.name for path in (checkout / "gramine").iterdir()} == before
    make(checkout, "gramine", "distclean")
    assert {path.name for path in (checkout / "gramine").iterdir()} == before - {
        "runtime",
        "runtime.complete",
        "models",
    }


def test_nothing_that_is_made_is_committed() -> None:
    made = [
        "gramine/runtime/bin/python3",
        "gramine/runtime.complete",
        "gramine/models/plain/x",
        "tee_gpu/server.manifest",
    ]
    made += ["tee_gpu/server.manifest.sgx", "tee_gpu/server.sig", "tee_gpu/.build/server.defines"]
    told = subprocess.run(["git", "check-ignore", *made], cwd=ROOT, capture_output=True, text=True, check=False)
    if told.returncode == 128:
        pytest.skip("this is no checkout")
    assert told.stdout.split() == made
