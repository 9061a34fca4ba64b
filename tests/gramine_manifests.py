"""Renders the manifests as Gramine 1.9 does, and checks them against the keys that it knows. Needs no Gramine."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "gramine" / "enclave.manifest.template"
RUNTIMEDIR = "/usr/lib/x86_64-linux-gnu/gramine/runtime/glibc"

DEFAULTS = {
    "role": "serve",
    "program": "-m tsqp serve",
    "script": "",
    "args": "",
    "runtime": "runtime",
    "model": "models/packed/tiny",
    "model_name": "tiny",
    "model_key": "",
    "model_digest": "",
    "dtype": "float32",
    "level": "masked",
    "serves": "open",
    "worker_keys": "",
    "dealer_keys": "",
    "api_keys": "",
    "provision_ca": "",
    "insecure": "0",
    "own_key": "",
    "own_key_key": "",
    "shm": "",
    "attestation": "",
    "threads": "4",
    "omp_wait_policy": "PASSIVE",
    "edmm": "0",
    "isvsvn": "1",
    "isvprodid": "4",
    "log_level": "error",
    "enclave_size": "4G",
    "max_threads": "56",
}
RUNNER = {"role": "runner", "program": "/app/tee_runner.py", "script": "tee_runner.py", "isvprodid": "1"}
SERVER = {"role": "server", "program": "/app/server.py", "script": "server.py", "isvprodid": "2"}
LOCAL = {"role": "local", "program": "/app/tee_runner.py", "script": "tee_runner.py", "isvprodid": "3"}
DEALERS = {"dealer_keys": "a.key b.key"}
WORKERS = {"worker_keys": "w.key v.key"}
OWN = {"own_key": "own.key_secret", "own_key_key": "own"}
# Every program, and every parameter that changes more than a value.
MANIFESTS: dict[str, dict[str, str]] = {
    "runner": RUNNER,
    "runner with a key": {**RUNNER, "worker_keys": "w.key"},
    "runner over shared memory": {**RUNNER, "shm": "tsqp-a tsqp-b"},
    "server": SERVER,
    "local": {**LOCAL, "args": "--tokens 256"},
    "serve": {},
    "serve with dealers": {**DEALERS, **WORKERS, "api_keys": "api.keys"},
    "serve verified": {"level": "verified"},
    "serve local": {"level": "local"},
    "serve with EDMM": {"edmm": "1"},
    "serve an encrypted model": {"model_key": "model", "model_digest": "ab" * 32},
    "serve with a provisioned key": {"model_key": "model", "model_digest": "ab" * 32, "provision_ca": "ca.crt"},
    "serve attested": {"attestation": "gramine"},
    "runner in clear": {**RUNNER, "insecure": "1"},
    "server in clear": {**SERVER, "insecure": "1"},
    "serve with an own key": {**WORKERS, **OWN},
    "runner with an own key": {**RUNNER, "worker_keys": "w.key", **OWN},
}

_MOUNT: dict[str, Any] = {
    "chroot": {"type": str, "path": str, "uri": str},
    "encrypted": {"type": str, "path": str, "uri": str, "key_name": str, "enable_recovery": bool},
    "tmpfs": {"type": str, "path": str},
    "untrusted_shm": {"type": str, "path": str, "uri": str},
}
# The keys of Gramine 1.9; a type, or a table of more.
KEYS: dict[str, Any] = {
    "loader": {
        "argv": [str],
        "argv_src_file": str,
        "insecure__use_cmdline_argv": bool,
        "env": {"*": (str, dict)},
        "env_src_file": str,
        "insecure__use_host_env": bool,
        "insecure__disable_aslr": bool,
        "log_level": str,
        "log_file": str,
        "uid": int,
        "gid": int,
        "entrypoint": {"uri": str, "sha256": str},
    },
    "libos": {"entrypoint": str, "check_invalid_pointers": bool},
    "fs": {"mounts": [dict], "root": dict, "start_dir": str, "insecure__keys": {"*": str}},
    "sys": {
        "stack": {"size": str},
        "brk": {"max_size": str},
        "fds": {"limit": int},
        "enable_extra_runtime_domain_names_conf": bool,
        "enable_sigterm_injection": bool,
        "disallow_subprocesses": bool,
        "experimental__enable_flock": bool,
        "insecure__allow_eventfd": bool,
        "allowed_ioctls": [dict],
        "ioctl_structs": {"*": object},
        "debug__mock_syscalls": [dict],
    },
    "sgx": {
        "debug": bool,
        "edmm_enable": bool,
        "enclave_size": str,
        "max_threads": int,
        "remote_attestation": str,
        "trusted_files": [(str, dict)],
        "allowed_files": [str],
        "file_check_policy": str,
        "isvprodid": int,
        "isvsvn": int,
        "seal_key": {"flags_mask": str, "xfrm_mask": str, "misc_mask": str},
        "cpu_features": {"avx": str, "avx512": str, "amx": str, "mpx": str, "pkru": str},
        "preheat_enclave": bool,
        "use_exinfo": bool,
        "insecure__allow_memfaults_without_exinfo": bool,
        "insecure__rpc_thread_num": int,
        "enable_stats": bool,
        "profile": {"*": object},
        "vtune_profile": bool,
    },
}


def render(**parameters: str) -> str:
    """Return a manifest as gramine-manifest makes it; a parameter that is not given has its default."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)  # noqa: S701  as Gramine
    environment.globals["gramine"] = SimpleNamespace(runtimedir=lambda: RUNTIMEDIR)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**{**DEFAULTS, **parameters})


def loads(text: str) -> dict[str, Any]:
    """Return a manifest's content."""
    return tomllib.loads(text)


def parsed(**parameters: str) -> dict[str, Any]:
    """Return a rendered manifest's content."""
    return loads(render(**parameters))


def unknown_keys(manifest: Mapping[str, Any]) -> list[str]:
    """List what Gramine refuses: unknown keys, and values of another type. Required ones that are missing too."""
    found = list(_unknown(manifest, KEYS, ""))
    for mount in [*manifest.get("fs", {}).get("mounts", []), {"path": "/", **manifest.get("fs", {}).get("root", {})}]:
        known = _MOUNT.get(mount.get("type", "chroot"), {})
        found += [f"fs.mounts.{key}" for key, value in mount.items() if not isinstance(value, known.get(key, ()))]
    for name, value in manifest.get("loader", {}).get("env", {}).items():
        if isinstance(value, dict) and value != {"passthrough": True}:
            found.append(f"loader.env.{name}")
    needed = (("libos", "entrypoint"), ("fs", "mounts"))
    return found + [".".join(path) for path in needed if path[1] not in manifest.get(path[0], {})]


def _unknown(value: object, known: Any, path: str) -> Iterator[str]:
    if isinstance(known, dict):
        if not isinstance(value, dict):
            yield path
            return
        for key, part in value.items():
            below = known.get(key, known.get("*"))
            if below is None:
                yield f"{path}.{key}".lstrip(".")
            else:
                yield from _unknown(part, below, f"{path}.{key}")
    elif isinstance(known, list):
        if not isinstance(value, list) or not all(isinstance(part, known[0]) for part in value):
            yield path.lstrip(".")
    elif not isinstance(value, known) or (known is int and isinstance(value, bool)):
        yield path.lstrip(".")


def all_keys(value: object) -> Iterator[str]:
    """Yield every key of a manifest, at any depth."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from all_keys(part)
    elif isinstance(value, list):
        for part in value:
            yield from all_keys(part)


def passed_through(manifest: Mapping[str, Any]) -> set[str]:
    """Name the variables whose values the host gives."""
    return {name for name, value in manifest["loader"]["env"].items() if not isinstance(value, str)}


def measured(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables whose values are in the manifest."""
    return {name: value for name, value in manifest["loader"]["env"].items() if isinstance(value, str)}


def is_trusted(manifest: Mapping[str, Any], uri: str) -> bool:
    """Tell whether a file, or all in a directory, is hashed."""
    return any(
        entry in (uri, f"{uri}/") or (entry.endswith("/") and uri.startswith(entry))
        for entry in manifest["sgx"]["trusted_files"]
    )
