"""What deploy/ names exists, and what it promises to keep out is out. Nothing is built or started here."""

from __future__ import annotations

import configparser
import dataclasses
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from tsqp import config as settings
from tsqp.cli import app
from tsqp.config import DEALER_PORT, DEFAULT_PORT, KINDS, EnclaveConfig, EngineConfig, ServeConfig, WorkerConfig
from tsqp.serve import server
from tsqp.serve.gate import HEALTH

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CONTAINERFILES = sorted(DEPLOY.glob("*.Containerfile"))
UNITS = sorted(DEPLOY.glob("systemd/*.service"))
DROP_IN = DEPLOY / "systemd" / "tsqp-serve.service.d" / "tdx.conf"
CLUSTER = sorted(DEPLOY.glob("kubernetes/*.yaml"))
VARIABLES = {entry.metadata["env"] for kind in KINDS for entry in dataclasses.fields(kind)} | settings._OTHER_VARIABLES
USER = 10001
DIGEST = "debian@sha256:" + "0123456789abcdef" * 4
# A secret as a value, not as the path of a file: PEM, a CURVE key, an API key.
SECRET = re.compile(r"-----BEGIN|secret-key *=|tsqp-[A-Za-z0-9_-]{40,}")


def _instructions(file: Path) -> list[tuple[str, str]]:
    """Read a Containerfile: instructions in their order, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def _stages(file: Path) -> dict[str, list[tuple[str, str]]]:
    stages: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for word, rest in _instructions(file):
        if word == "FROM":
            current = stages.setdefault(rest.split()[-1], [])
        current.append((word, rest))
    return stages


def _lineage(stages: dict[str, list[tuple[str, str]]], name: str) -> Iterator[tuple[str, str]]:
    """Yield a stage's instructions after those of the stages that it is made from."""
    parent = stages[name][0][1].split()[0]
    if parent in stages:
        yield from _lineage(stages, parent)
    yield from stages[name]


def _unit(file: Path) -> list[tuple[str, str, str]]:
    """Read a unit: section, key and value of each line, since keys may be there twice."""
    text = file.read_text(encoding="utf-8")
    configparser.RawConfigParser(strict=False).read_string(text)  # it is well formed
    found: list[tuple[str, str, str]] = []
    section = ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.append((section, key, value))
    return found


def _service(file: Path) -> dict[str, str]:
    return {key: value for section, key, value in _unit(file) if section == "Service"}


def _objects(kind: str | None = None) -> list[dict[str, Any]]:
    every = [found for file in CLUSTER for found in yaml.safe_load_all(file.read_text(encoding="utf-8"))]
    return [found for found in every if kind in {None, found["kind"]}]


def _pods() -> list[dict[str, Any]]:
    return [found["spec"]["template"]["spec"] for found in _objects("Deployment")]


def _containers() -> list[dict[str, Any]]:
    return [each for pod in _pods() for each in (*pod.get("initContainers", ()), *pod["containers"])]


def _command_lines() -> list[list[str]]:
    """Return every way in which a command of tsqp is started, from the command's name on."""
    found = [container["args"] for container in _containers() if "args" in container]
    for file in UNITS:
        words = shlex.split(_service(file)["ExecStart"])
        if "tsqp" in words:
            found.append(words[words.index("tsqp") + 1 :])
    for file in CONTAINERFILES:
        found += [yaml.safe_load(rest) for word, rest in _instructions(file) if word == "CMD"]
    return found


def _environments() -> Iterator[tuple[str, str]]:
    for file in (*UNITS, DROP_IN):
        for _, key, value in _unit(file):
            if key == "Environment":
                yield from (tuple(word.split("=", 1)) for word in shlex.split(value))  # type: ignore[misc]
    for file in CONTAINERFILES:
        for word, rest in _instructions(file):
            if word == "ENV":
                yield from (tuple(each.split("=", 1)) for each in shlex.split(rest))  # type: ignore[misc]
    for container in _containers():
        for variable in container.get("env", ()):
            yield variable["name"], variable.get("value", "")


def test_everything_is_there() -> None:
    assert [file.name for file in CONTAINERFILES] == ["enclave.Containerfile", "worker.Containerfile"]
    assert len(UNITS) == 4
    assert len(CLUSTER) == 3


def test_every_command_and_option_is_one_of_tsqp() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = _command_lines()
    assert {line[0] for line in lines} == {"worker", "dealer", "serve"}
    for name, *words in lines:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_every_command_and_option_in_the_guide_is_one_of_tsqp() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8").replace("\\\n", " ").replace("\n", " \n")
    known = set(VARIABLES) | {"TSQP_WORKER_PORT"}
    assert set(re.findall(r"\b(?:TSQP|LLAMA)_[A-Z_]+\b", text)) <= known
    started = re.findall(r"(?:^|`|bin/)tsqp ([a-z]+)([^`\n]*)", text, re.MULTILINE)
    assert {"pack", "keys", "serve", "verify", "doctor", "size"} <= {name for name, _ in started}
    for name, rest in started:
        # tsqp size comes with the Gramine manifests, and --encrypt not at all.
        if name != "size" and "--encrypt" not in rest:
            options = {option for parameter in commands[name].params for option in parameter.opts}
            assert set(re.findall(r"--[a-z-]+", rest)) <= options, name
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert "make deploy-lock" in text
    assert "deploy-lock" in targets


def test_every_variable_is_a_setting_and_its_value_is_taken() -> None:
    ours = {name: value for name, value in _environments() if name.startswith(("TSQP_", "LLAMA_"))}
    assert set(ours) <= VARIABLES
    assert {"TSQP_WORKERS", "TSQP_CACHE", "TSQP_ATTESTATION"} <= set(ours)
    del ours["TSQP_CONFIG"]
    for kind in (WorkerConfig, EnclaveConfig, EngineConfig, ServeConfig):
        load: Callable[..., object] = settings.load
        load(kind, env=ours)


def test_the_example_of_a_settings_file_is_taken() -> None:
    env = {"TSQP_CONFIG": str(DEPLOY / "systemd" / "serve.toml")}
    enclave, engine = settings.load(EnclaveConfig, env=env), settings.load(EngineConfig, env=env)
    assert settings.load(ServeConfig, env=env).host == "0.0.0.0"  # noqa: S104  it is compared
    assert len(enclave.dealers) == len(enclave.dealer_keys)
    assert len(engine.workers) == len(engine.worker_keys)


def test_every_path_of_the_checkout_exists() -> None:
    for file in CONTAINERFILES:
        for word, rest in _instructions(file):
            if word == "COPY" and not rest.startswith("--from"):
                for source in shlex.split(rest)[:-1]:
                    made = source in {"deploy/worker.lock", "gramine"}  # by the operator; by the Gramine manifests
                    assert made or (ROOT / source).exists(), source


def test_no_file_names_a_moving_tag_or_holds_a_secret() -> None:
    for file in DEPLOY.rglob("*"):
        if file.is_file() and file.suffix != ".pyc":
            text = file.read_text(encoding="utf-8")
            assert ":latest" not in text, file
            assert not SECRET.search(text), file


@pytest.mark.parametrize("name", ["TOKEN", "PASSWORD", "SECRET", "API_KEY="])
def test_no_secret_is_in_an_environment(name: str) -> None:
    assert not [each for each, _ in _environments() if name.rstrip("=") in each and not each.endswith("_KEYS")]
    assert not [each for each, value in _environments() if each in {"TSQP_KEY", "TSQP_TLS_KEY"} and value]


@pytest.mark.parametrize("file", CONTAINERFILES, ids=lambda file: file.name)
class TestContainerfiles:
    def test_the_base_is_given_with_its_digest(self, file: Path) -> None:
        stages = _stages(file)
        assert ("ARG", "BASE_IMAGE") in _instructions(file), "no default"
        assert stages["base"][0] == ("FROM", "${BASE_IMAGE} AS base")
        for name, instructions in stages.items():
            parent = instructions[0][1].split()[0]
            assert name == "base" or parent in stages, "every stage comes from the base"
        assert any('pinned.sh "$BASE_IMAGE"' in rest for word, rest in stages["base"] if word == "RUN")
        first = next(rest for word, rest in stages["base"] if word == "RUN")
        assert first.index("pinned.sh") < first.index("snapshot.sh") < first.index("apt-get")

    def test_pip_takes_only_what_a_hash_names(self, file: Path) -> None:
        installs = re.findall(
            r"pip install [^&]*", " && ".join(rest for word, rest in _instructions(file) if word == "RUN")
        )
        assert len(installs) == 2
        for install in installs:
            assert "--no-deps" in install
            assert "--require-hashes" in install or ("--no-index" in install and install.split()[-1] == ".")
            assert "--no-compile" in install

    def test_what_runs_is_not_root_and_writes_no_byte_code(self, file: Path) -> None:
        stages = _stages(file)
        final = [name for name, each in stages.items() if any(word == "ENTRYPOINT" for word, _ in each)]
        assert final
        assert list(stages)[-1] in final, "the last stage is what is built where none is named"
        for name in final:
            lineage = list(_lineage(stages, name))
            assert [rest for word, rest in lineage if word == "USER"][-1] == f"{USER}:{USER}"
            assert any(word == "ENV" and "PYTHONDONTWRITEBYTECODE=1" in rest for word, rest in lineage)
            assert any(word == "ENV" and "SOURCE_DATE_EPOCH" in rest for word, rest in lineage)
            entry = yaml.safe_load(next(rest for word, rest in reversed(lineage) if word == "ENTRYPOINT"))
            python = ["/opt/tsqp/venv/bin/python", "-I", "-B", "-m", "tsqp"]
            assert entry in (["gramine-sgx", "serve"], python)

    def test_no_secret_key_reaches_a_layer(self, file: Path) -> None:
        for word, rest in _instructions(file):
            assert word != "ADD"
            assert not (word == "COPY" and re.search(r"\.pem|key_secret|enclave-key", rest))
            assert not (word in {"ARG", "ENV"} and re.search(r"SIGNER|SECRET|PASSWORD|TOKEN", rest))
        ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
        assert {".git", "**/*.key_secret", "**/*.pem", "src/tsqp/_native*.so"} <= set(ignored)


def test_the_signing_key_is_mounted_for_one_command() -> None:
    signing = [rest for _, rest in _instructions(DEPLOY / "enclave.Containerfile") if "SGX_SIGNER_KEY" in rest]
    assert len(signing) == 1
    assert signing[0].startswith("--mount=type=secret,id=enclave-key,required=true")


def test_the_enclaves_makefile_has_every_parameter() -> None:
    makefile = ROOT / "gramine" / "enclave.mk"
    if not makefile.exists():
        pytest.skip("this checkout has no Gramine manifests")
    known = set(re.findall(r"^([A-Z_]+) +\?=", makefile.read_text(encoding="utf-8"), re.MULTILINE))
    given = re.findall(r'"([A-Z_]+) := ', (DEPLOY / "enclave.Containerfile").read_text(encoding="utf-8"))
    assert given
    assert set(given) <= known
    assert "SGX_SIGNER_KEY" in known


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("", "has no digest"),
        ("debian:12-slim", "has no digest"),
        ("debian@sha256:abc", "64 hexadecimal digits"),
        (DIGEST[:-1] + "G", "64 hexadecimal digits"),
        (DIGEST, None),
        (DIGEST.replace("@", ":12-slim@"), None),
    ],
)
def test_a_tag_is_no_base_image(image: str, message: str | None) -> None:
    done = subprocess.run(["sh", str(DEPLOY / "pinned.sh"), image], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (message is None)
    assert (message or "") in done.stderr


_SOURCES = """Types: deb
# http://snapshot.debian.org/archive/debian/20250203T000000Z
URIs: http://deb.debian.org/debian
Suites: bookworm

Types: deb
# http://snapshot.debian.org/archive/debian-security/20250203T000000Z
URIs: http://deb.debian.org/debian-security
Suites: bookworm-security
"""


def _snapshot(sources: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "debian.sources").write_text(sources, encoding="utf-8")
    script = ["sh", str(DEPLOY / "snapshot.sh"), str(folder / "debian.sources"), str(folder)]
    return subprocess.run(script, capture_output=True, text=True, check=False)


def test_packages_are_of_the_day_of_the_base_image(tmp_path: Path) -> None:
    assert _snapshot(_SOURCES, tmp_path).returncode == 0
    uris = re.findall(r"^URIs: (.*)$", (tmp_path / "debian.sources").read_text(encoding="utf-8"), re.MULTILINE)
    assert uris == [
        "http://snapshot.debian.org/archive/debian/20250203T000000Z",
        "http://snapshot.debian.org/archive/debian-security/20250203T000000Z",
    ]
    assert "Check-Valid-Until" in (tmp_path / "snapshot").read_text(encoding="utf-8")


@pytest.mark.parametrize("sources", [_SOURCES.replace("# http", "# ftp"), _SOURCES.replace("# http", "# ftp", 1)])
def test_a_source_without_a_snapshot_is_refused(sources: str, tmp_path: Path) -> None:
    assert _snapshot(sources, tmp_path).returncode == 1


HARDENED = {
    "LimitCORE": "0",
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "DynamicUser": "yes",
    "UMask": "0077",
    "DevicePolicy": "closed",
    "SystemCallArchitectures": "native",
}
# Which may make code at run time: CUDA's driver, and the loader of an enclave.
MAKES_CODE = {"tsqp-worker", "tsqp-serve-sgx"}


@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.stem)
class TestUnits:
    def test_it_is_hardened(self, file: Path) -> None:
        service = _service(file)
        assert service.items() >= HARDENED.items()
        assert service["CapabilityBoundingSet"] == ""
        assert service["MemoryDenyWriteExecute"] == ("no" if file.stem in MAKES_CODE else "yes")
        assert "User" not in service

    def test_secret_keys_are_credentials_and_their_copies_are_for_the_user_alone(self, file: Path) -> None:
        service = _service(file)
        if "key_secret" not in file.read_text(encoding="utf-8"):
            return
        name, _, source = service["LoadCredential"].partition(":")
        assert source.startswith("/etc/tsqp/")
        copied = shlex.split(service["ExecStartPre"])
        assert copied == ["/usr/bin/install", "-m", "0400", f"%d/{name}", f"%t/{file.stem}/{name}"]
        words = shlex.split(service["ExecStart"])
        assert words[words.index("--key") + 1] == copied[-1]
        assert service["RuntimeDirectory"] == file.stem
        assert service["RuntimeDirectoryMode"] == "0700"

    def test_it_is_not_started_again_where_that_is_no_use(self, file: Path) -> None:
        service = _service(file)
        assert service["Restart"] == "on-failure"
        codes = service["RestartPreventExitStatus"].split()
        assert codes == (["3", "5"] if "serve" in file.stem else ["3"])

    def test_a_server_has_time_to_end_its_answers(self, file: Path) -> None:
        if "serve" in file.stem:
            assert int(_service(file)["TimeoutStopSec"]) > _stopping_s()

    def test_systemd_knows_every_key(self, file: Path, tmp_path: Path) -> None:
        if shutil.which("systemd-analyze") is None:
            pytest.skip("systemd is not installed")
        text = re.sub(r"^WorkingDirectory=.*$", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        text = re.sub(r"/opt/tsqp/venv/bin/python|/usr/bin/gramine-sgx", "/bin/true", text)
        (tmp_path / file.name).write_text(text, encoding="utf-8")
        command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / file.name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert file.name not in done.stderr, done.stderr


def _stopping_s() -> float:
    return ServeConfig().drain_s + server._LAST_WORDS_S + 1


def test_a_tdx_guest_adds_one_capability_and_one_place_to_write() -> None:
    lines = [(key, value) for section, key, value in _unit(DROP_IN) if section == "Service"]
    assert lines == [
        ("Environment", "TSQP_ATTESTATION=tdx"),
        ("AmbientCapabilities", "CAP_DAC_OVERRIDE"),
        ("CapabilityBoundingSet", ""),
        ("CapabilityBoundingSet", "CAP_DAC_OVERRIDE"),
        ("ReadWritePaths", "/sys/kernel/config/tsm/report"),
    ]


class TestKubernetes:
    def test_each_role_has_what_it_needs(self) -> None:
        for role in ("worker", "dealer", "serve"):
            kinds = [each["kind"] for each in _objects() if f"tsqp-{role}" in each["metadata"]["name"]]
            assert kinds == ["Namespace", "Deployment", "Service", "NetworkPolicy"]

    def test_images_are_named_by_digest(self) -> None:
        assert all(re.fullmatch(r"[\w./-]+@sha256:[0-9a-f]{64}", container["image"]) for container in _containers())

    def test_pods_are_not_root_and_write_nothing_but_their_volumes(self) -> None:
        for pod in _pods():
            context = pod["securityContext"]
            assert context["runAsNonRoot"] is True
            assert context["runAsUser"] == context["runAsGroup"] == USER
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert pod["automountServiceAccountToken"] is False
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for container in _containers():
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "privileged" not in context

    def test_no_service_adds_variables_that_tsqp_refuses(self) -> None:
        """A service tsqp-worker would make TSQP_WORKER_PORT, and any unknown TSQP_ variable ends the program."""
        assert all(pod["enableServiceLinks"] is False for pod in _pods())

    def test_secret_keys_are_files_that_one_user_can_read(self) -> None:
        secrets = [volume for pod in _pods() for volume in pod["volumes"] if "secret" in volume]
        assert len(secrets) == 2
        assert all(volume["secret"]["defaultMode"] == 0o400 for volume in secrets)
        for pod in _pods():
            for copier in pod.get("initContainers", ()):
                assert copier["command"][:3] == ["install", "-m", "0400"]
                args = pod["containers"][0]["args"]
                assert args[args.index("--key") + 1] == copier["command"][-1]
                volume = next(each for each in pod["volumes"] if each["name"] == "key")
                assert volume["emptyDir"]["medium"] == "Memory"
                assert not any(mount["name"] == "secret" for mount in pod["containers"][0]["volumeMounts"])
        assert not any("valueFrom" in variable for each in _containers() for variable in each.get("env", ()))

    def test_probes_ask_for_what_the_server_answers_everybody(self) -> None:
        (container,) = _objects("Deployment")[1]["spec"]["template"]["spec"]["containers"]
        assert container["name"] == "serve"
        paths = {
            kind: container[kind]["httpGet"]["path"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")
        }
        assert paths == {"startupProbe": "/healthz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
        assert set(paths.values()) <= set(HEALTH)
        assert {container[kind]["httpGet"]["scheme"] for kind in paths} == {"HTTPS"}

    def test_ports_are_those_that_are_listened_on(self) -> None:
        ports = {each["name"]: each["ports"] for pod in _pods() for each in pod["containers"]}
        assert ports["worker"][0]["containerPort"] == WorkerConfig().port == DEFAULT_PORT
        assert ports["dealer"][0]["containerPort"] == DEALER_PORT
        assert ports["serve"][0]["containerPort"] == ServeConfig().port

    def test_a_server_has_time_to_end_its_answers(self) -> None:
        pod = _objects("Deployment")[1]["spec"]["template"]["spec"]
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert pod["terminationGracePeriodSeconds"] > _stopping_s() + float(command[1])

    def test_resources_of_the_hardware_are_asked_for(self) -> None:
        limits = {each["name"]: each["resources"]["limits"] for pod in _pods() for each in pod["containers"]}
        assert limits["worker"]["nvidia.com/gpu"] == "1"
        assert {"sgx.intel.com/enclave", "sgx.intel.com/epc", "sgx.intel.com/provision"} <= set(limits["serve"])
        assert not [name for name in limits["dealer"] if "/" in name]

    def test_workers_and_dealers_reach_nobody(self) -> None:
        for policy in _objects("NetworkPolicy"):
            spec = policy["spec"]
            assert spec["policyTypes"] == ["Ingress", "Egress"]
            assert spec["podSelector"]["matchLabels"] == {"app": policy["metadata"]["name"]}
            if policy["metadata"]["name"] != "tsqp-serve":
                assert spec["egress"] == []
                assert all(rule["from"] for rule in spec["ingress"])


def test_the_same_parameters_render_the_same_manifest_twice() -> None:
    manifests = pytest.importorskip("gramine_manifests", reason="this checkout has no Gramine manifests")
    given = {
        "model_name": "tiny",
        "worker_keys": "keys/worker.key",
        "dealer_keys": "keys/dealer-a.key",
        "api_keys": "keys/api-keys",
        "attestation": "gramine",
    }
    assert manifests.render(**given).encode() == manifests.render(**given).encode()
