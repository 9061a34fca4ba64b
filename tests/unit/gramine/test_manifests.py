"""What the manifests say: known keys, nothing insecure, and what the host may choose and what it may not."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import pytest
from gramine_manifests import (
    DEALERS,
    DEFAULTS,
    MANIFESTS,
    OWN,
    ROOT,
    RUNNER,
    RUNTIMEDIR,
    TEMPLATE,
    WORKERS,
    all_keys,
    is_trusted,
    measured,
    parsed,
    passed_through,
    render,
    unknown_keys,
)

from tsqp import config as settings
from tsqp.config import KINDS, EnclaveConfig, EngineConfig, ServeConfig, WorkerConfig
from tsqp.enclave.dealers import dealer_peers
from tsqp.engine.addresses import one_each
from tsqp.errors import ConfigError
from tsqp.levels import check_peers
from tsqp.sizing import STACK_BYTES
from tsqp.transport.keys import ephemeral

ADDRESSES = {
    "LLAMA_GPU_ENDPOINT",
    "LLAMA_GPU_PORT",
    "SECRET_PROVISION_SERVERS",
    "TSQP_DEALERS",
    "TSQP_HOST",
    "TSQP_LISTEN",
    "TSQP_PORT",
    "TSQP_WORKERS",
}
SIZES = {"TSQP_KV_MEMORY", "TSQP_MASK_MEMORY", "TSQP_MASK_POOL", "TSQP_MAX_MESSAGE_BYTES", "TSQP_MAX_QUEUED"}
SIZES |= {"TSQP_MAX_RUNNING", "TSQP_STEP_TOKENS"}
MACHINE_PATHS = ("/home", "/root", "/srv", "/tmp", "/usr/local", "/opt/")  # noqa: S108
TMP = "/tmp"  # noqa: S108
SHM = "/dev/shm"  # noqa: S108
every_manifest = pytest.mark.parametrize("name", MANIFESTS)


@every_manifest
def test_gramine_knows_every_key(name: str) -> None:
    assert unknown_keys(parsed(**MANIFESTS[name])) == []


def test_the_check_of_keys_finds_what_gramine_refuses() -> None:
    manifest = parsed()
    manifest["sgx"] |= {"require_avx": True, "max_threads": "4"}
    manifest["loader"]["env"]["A"] = {"passthrough": False}
    manifest["fs"]["mounts"].append({"type": "tmpfs", "path": "/x", "key_name": "k"})
    del manifest["libos"]["entrypoint"]
    found = {"sgx.require_avx", "sgx.max_threads", "loader.env.A", "fs.mounts.key_name", "libos.entrypoint"}
    assert set(unknown_keys(manifest)) == found


@every_manifest
def test_nothing_is_insecure(name: str) -> None:
    """There is no exception: no insecure key is used at all, nor any that is for debugging."""
    keys = set(all_keys(parsed(**MANIFESTS[name])))
    assert not {key for key in keys if "insecure" in key or "debug" in key}
    assert not keys & {"file_check_policy", "enable_stats", "profile", "vtune_profile", "argv_src_file", "env_src_file"}
    assert parsed(**MANIFESTS[name])["sgx"]["remote_attestation"] == "dcap"


@every_manifest
def test_the_host_gives_addresses_and_sizes_and_nothing_else(name: str) -> None:
    assert passed_through(parsed(**MANIFESTS[name])) <= ADDRESSES | SIZES


def test_what_protects_is_in_the_manifest() -> None:
    manifest = parsed(**DEALERS, **WORKERS, api_keys="api.keys", attestation="gramine")
    chosen = measured(manifest)
    assert chosen["TSQP_LEVEL"] == "masked"
    assert chosen["TSQP_MASKS"] == "dealers"
    assert chosen["TSQP_WORKER_KEYS"] == "/keys/worker-1.key,/keys/worker-2.key"
    assert chosen["TSQP_DEALER_KEYS"] == "/keys/dealer-1.key,/keys/dealer-2.key"
    assert chosen["TSQP_API_KEYS"] == "/keys/api-keys"
    assert chosen["TSQP_ATTESTATION"] == "gramine"
    for file in ("a.key", "b.key", "w.key", "v.key", "api.keys"):
        assert f"file:{file}" in manifest["sgx"]["trusted_files"]
    assert measured(parsed())["TSQP_MASKS"] == "enclave"
    assert "TSQP_MASKS" not in measured(parsed(level="verified"))


def settings_of(manifest: dict[str, Any], **host: str) -> dict[str, str]:
    """Return the environment inside, given the host's: what is not passed through is not seen."""
    allowed = {name: value for name, value in host.items() if name in passed_through(manifest)}
    return {**measured(manifest), **allowed}


def all_settings(inside: dict[str, str]) -> tuple[EnclaveConfig, EngineConfig, ServeConfig, WorkerConfig]:
    return (
        settings.load(EnclaveConfig, env=inside),
        settings.load(EngineConfig, env=inside),
        settings.load(ServeConfig, env=inside),
        settings.load(WorkerConfig, env=inside),
    )


@every_manifest
def test_every_variable_is_a_setting(name: str) -> None:
    """The engine refuses unknown ones."""
    all_settings(settings_of(parsed(**MANIFESTS[name])))
    known = {entry.metadata["env"] for kind in KINDS for entry in dataclasses.fields(kind)} | {"TSQP_CACHE"}
    ours = {name for name in parsed(**MANIFESTS[name])["loader"]["env"] if name.startswith(("TSQP_", "LLAMA_"))}
    assert ours <= known


def test_which_model_it_is_is_measured() -> None:
    """As a hash of each of its files, or by its digest where they are encrypted."""
    plain, encrypted = parsed(), parsed(**MANIFESTS["serve an encrypted model"])
    assert is_trusted(plain, f"file:{DEFAULTS['model']}")
    assert "TSQP_MODEL_DIGEST" not in measured(plain)
    assert not is_trusted(encrypted, f"file:{DEFAULTS['model']}")
    assert measured(encrypted)["TSQP_MODEL_DIGEST"] == "ab" * 32


HOSTILE = {
    "TSQP_LEVEL": "open",
    "TSQP_MASKS": "enclave",
    "TSQP_DEALER_KEYS": "",
    "TSQP_WORKER_KEY": "",
    "TSQP_CONFIG": "/hostile/config.toml",
    "TSQP_API_KEYS": "/hostile/keys",
    "TSQP_TLS_KEY": "/hostile/tls.pem",
    "TSQP_REUSE_PREFIXES": "on",
    "TSQP_INSECURE": "on",
    "TSQP_PADDING": "off",
    "LLAMA_MODEL_PATH": "/hostile/model",
    "LD_PRELOAD": "/hostile/evil.so",
    "SECRET_PROVISION_SET_KEY": "other",
    "SECRET_PROVISION_CA_CHAIN_PATH": "/hostile/ca.crt",
    "PYTHONPATH": "/hostile",
    "TSQP_WORKERS": "a:1,b:1",
}


@every_manifest
def test_a_hostile_host_changes_no_setting_that_protects(name: str) -> None:
    manifest = parsed(**{**MANIFESTS[name], "attestation": ""})
    inside, honest = settings_of(manifest, **HOSTILE), settings_of(manifest)
    assert {key: value for key, value in inside.items() if key not in ADDRESSES} == honest
    chosen, expected = all_settings(inside), all_settings(honest)
    assert (chosen[0], chosen[2:]) == (expected[0], expected[2:])


def keys_in(inside: dict[str, str], *names: str) -> dict[str, str]:
    """Put public keys in the place of the files, which are mounted inside only."""
    return {
        **inside,
        **{name: ",".join(ephemeral().public.decode() for _ in inside[name].split(",")) for name in names},
    }


def configs(inside: dict[str, str]) -> tuple[EnclaveConfig, EngineConfig]:
    enclave, engine, *_ = all_settings(inside)
    return enclave, engine


@pytest.mark.parametrize(
    ("workers", "dealers", "complaint"),
    [
        ("a:1,b:1", "c:1,d:1", None),
        ("a:1", "c:1,d:1", "1 workers and 2 worker keys"),
        ("a:1,b:1,e:1", "c:1,d:1", "3 workers and 2 worker keys"),
        (None, "c:1,d:1", "a worker's key was given but no worker"),
        ("a:1,b:1", "c:1", "1 dealers and 2 dealer keys"),
        ("a:1,b:1", "c:1,d:1,e:1", "3 dealers and 2 dealer keys"),
        ("a:1,b:1", None, "--masks dealers needs at least one --dealer"),
        ("a:1,b:1", "c:1,c:1", "the same address"),
    ],
)
def test_the_numbers_of_workers_and_dealers_are_those_of_their_keys(
    workers: str | None, dealers: str | None, complaint: str | None
) -> None:
    manifest = parsed(**DEALERS, **WORKERS)
    host = {name: value for name, value in (("TSQP_WORKERS", workers), ("TSQP_DEALERS", dealers)) if value}
    inside = keys_in(settings_of(manifest, **host), "TSQP_WORKER_KEYS", "TSQP_DEALER_KEYS")
    if complaint is None:
        assert len(one_each(*configs(inside))) == 2
        assert len(dealer_peers(configs(inside)[0], str.encode)) == 2
    else:
        with pytest.raises(ConfigError, match=re.escape(complaint)):
            one_each(*configs(inside))


def test_without_keys_there_is_one_worker_and_no_dealer() -> None:
    host = {"LLAMA_GPU_ENDPOINT": "127.0.0.1:1", "TSQP_WORKERS": "b:1,c:1", "TSQP_DEALERS": "d:1"}
    (only,) = one_each(*configs(settings_of(parsed(), **host)))
    assert (only.worker, only.dealers, only.masks, only.level) == ("127.0.0.1:1", (), "enclave", "masked")
    check_peers(only.level, only)


def test_the_manifest_and_not_the_host_lets_a_link_in_clear_leave_the_machine() -> None:
    host = {"LLAMA_GPU_ENDPOINT": "a:1", "TSQP_INSECURE": "on"}
    with pytest.raises(ConfigError, match="a:1 is beyond this machine, and without a key"):
        one_each(*configs(settings_of(parsed(), **host)))
    host["TSQP_INSECURE"] = "off"
    (only,) = one_each(*configs(settings_of(parsed(insecure="1"), **host)))
    check_peers(only.level, only)
    assert measured(parsed(insecure="1"))["TSQP_INSECURE"] == "on"


@every_manifest
def test_all_that_is_mounted_is_hashed_encrypted_or_private(name: str) -> None:
    manifest = parsed(**MANIFESTS[name])
    for mount in manifest["fs"]["mounts"]:
        kind = mount.get("type", "chroot")
        if kind == "chroot":
            assert is_trusted(manifest, mount["uri"]), mount
        elif kind == "untrusted_shm":
            assert mount["uri"] == f"dev:{mount['path']}"
            assert mount["path"].startswith(f"{SHM}/")
            assert mount["uri"] in manifest["sgx"]["allowed_files"]
        else:
            assert kind in ("tmpfs", "encrypted")
    assert manifest["fs"]["root"] == {"type": "tmpfs"}
    assert {"path": TMP, "type": "tmpfs"} in manifest["fs"]["mounts"]
    assert all(uri.startswith("dev:/dev/shm/") for uri in manifest["sgx"].get("allowed_files", []))


def test_shared_memory_is_named_object_by_object() -> None:
    manifest = parsed(**RUNNER, shm="tsqp-a tsqp-b")
    shared = [mount["path"] for mount in manifest["fs"]["mounts"] if mount.get("type") == "untrusted_shm"]
    assert shared == [f"{SHM}/tsqp-a", f"{SHM}/tsqp-b"]
    assert manifest["sgx"]["allowed_files"] == ["dev:/dev/shm/tsqp-a", "dev:/dev/shm/tsqp-b"]
    assert "allowed_files" not in parsed()["sgx"]


def test_an_encrypted_model_is_not_trusted_and_its_key_is_not_in_the_manifest() -> None:
    manifest = parsed(model_key="model")
    (mount,) = (mount for mount in manifest["fs"]["mounts"] if mount["path"] == "/models/tiny")
    assert (mount["type"], mount["key_name"]) == ("encrypted", "model")
    assert not is_trusted(manifest, mount["uri"])


def test_who_may_give_the_key_of_an_encrypted_model_is_measured_and_its_address_is_not() -> None:
    manifest = parsed(**MANIFESTS["serve with a provisioned key"])
    inside = measured(manifest)
    assert inside["SECRET_PROVISION_SET_KEY"] == "model"  # noqa: S105  a name
    assert inside["SECRET_PROVISION_CONSTRUCTOR"] == "1"  # noqa: S105  a name
    assert inside["LD_PRELOAD"] == "libsecret_prov_attest.so"
    (mount,) = (m for m in manifest["fs"]["mounts"] if m["path"] == inside["SECRET_PROVISION_CA_CHAIN_PATH"])
    assert is_trusted(manifest, mount["uri"])
    assert "SECRET_PROVISION_SERVERS" in passed_through(manifest)
    assert "LD_PRELOAD" not in parsed()["loader"]["env"]


def test_the_list_in_the_docs_names_every_manifest() -> None:
    text = (
        (ROOT / "docs" / "gramine.md")
        .read_text(encoding="utf-8")
        .partition("## Rendered manifests")[2]
        .partition("\n## ")[0]
    )
    rows = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert rows == list(MANIFESTS)


@pytest.mark.parametrize("role", [{}, RUNNER], ids=["serve", "runner"])
def test_an_own_key_comes_from_an_encrypted_file(role: dict[str, str]) -> None:
    manifest = parsed(**{**role, "worker_keys": "w.key", **OWN})
    inside = settings_of(manifest, TSQP_OWN_KEY="/hostile/own.key_secret")
    (mount,) = (mount for mount in manifest["fs"]["mounts"] if mount["path"] == inside["TSQP_OWN_KEY"])
    assert (mount["type"], mount["key_name"]) == ("encrypted", "own")
    assert not is_trusted(manifest, mount["uri"])
    assert "TSQP_OWN_KEY" not in settings_of(parsed(**role), TSQP_OWN_KEY="/hostile/own.key_secret")


@every_manifest
def test_no_path_of_a_machine_is_in_it(name: str) -> None:
    manifest = parsed(**MANIFESTS[name])
    uris = [mount["uri"] for mount in manifest["fs"]["mounts"] if "uri" in mount] + manifest["sgx"]["trusted_files"]
    for uri in uris:
        host = uri.partition(":")[2]
        assert not host.startswith(MACHINE_PATHS)
        assert not host.startswith("/") or host.startswith((RUNTIMEDIR, SHM))


@every_manifest
def test_the_same_parameters_give_the_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    once = render(**MANIFESTS[name])
    for variable in os.environ:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert render(**MANIFESTS[name]) == once


@pytest.mark.parametrize("variable", ["env", "python", "ldd"])
def test_who_renders_has_no_say(variable: str) -> None:
    """Gramine offers templates the environment, its own interpreter and ldd; none of them is the enclave's."""
    code = re.sub(r"\{#.*?#\}", "", TEMPLATE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.search(rf"{{[{{%][^}}]*\b{variable}[.(\[]", code)


def test_a_parameter_is_a_value_and_never_a_key() -> None:
    manifest = parsed(args='--prompt x"]\nsgx.debug=true', level='masked"\nsgx.debug = true\n#', model_name="a'b<c>&d")
    assert "debug" not in manifest["sgx"]
    assert manifest["loader"]["argv"][-3:] == ["--prompt", 'x"]', "sgx.debug=true"]
    assert measured(manifest)["LLAMA_MODEL_PATH"] == "/models/a'b<c>&d"


def test_arguments_are_fixed_and_the_interpreter_takes_no_code_from_elsewhere() -> None:
    assert parsed()["loader"]["argv"] == ["/opt/tsqp/bin/python3", "-I", "-B", "-m", "tsqp", "serve"]
    argv = parsed(**RUNNER, args="--tokens 256")["loader"]["argv"]
    assert argv == ["/opt/tsqp/bin/python3", "-I", "-B", "/app/tee_runner.py", "--tokens", "256"]
    assert argv[0] == parsed()["libos"]["entrypoint"]


@every_manifest
def test_no_process_is_started_and_every_kind_of_thread_has_its_number(name: str) -> None:
    manifest = parsed(**MANIFESTS[name], threads="7")
    assert manifest["sys"]["disallow_subprocesses"] is True
    numbers = measured(manifest)
    assert {numbers[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TSQP_THREADS")} == {"7"}
    assert {numbers[name] for name in ("OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "MALLOC_ARENA_MAX")} == {"1"}
    assert manifest["sys"]["stack"]["size"] == f"{STACK_BYTES >> 20}M"


def test_with_edmm_threads_and_memory_are_added_later() -> None:
    sgx, without = parsed(edmm="1")["sgx"], parsed()["sgx"]
    assert (sgx["edmm_enable"], sgx["use_exinfo"], sgx["max_threads"]) == (True, True, 1)
    assert (without["edmm_enable"], without["use_exinfo"], without["max_threads"]) == (False, False, 56)
    assert "preheat_enclave" not in sgx
