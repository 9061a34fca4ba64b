"""Settings: which source wins, the published names and defaults, and that nothing wrong passes in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.config import EnclaveConfig, EngineConfig, ServeConfig, WorkerConfig, load
from tsqp.errors import ConfigError

Kind = type[Any]
KINDS: list[Kind] = [WorkerConfig, EnclaveConfig, EngineConfig, ServeConfig]


def settings_file(directory: Path, text: str | bytes) -> dict[str, str]:
    """Write a settings file and return the environment that names it."""
    path = directory / "tsqp.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return {"TSQP_CONFIG": str(path)}


def test_published_defaults() -> None:
    worker, enclave = load(WorkerConfig, env={}), load(EnclaveConfig, env={})
    assert (worker.port, worker.dtype, worker.device, worker.listen) == (50051, "float32", None, ())
    assert (enclave.worker, enclave.dtype, enclave.level) == (None, "float32", "open")
    assert worker.model == enclave.model
    assert worker.max_message_bytes == enclave.max_message_bytes == 1 << 30


@pytest.mark.parametrize(
    ("kind", "name", "text", "field", "value"),
    [
        (WorkerConfig, "LLAMA_MODEL_PATH", "/models/m", "model", "/models/m"),
        (WorkerConfig, "LLAMA_GPU_DEVICE", "cuda:1", "device", "cuda:1"),
        (WorkerConfig, "LLAMA_GPU_PORT", "6000", "port", 6000),
        (WorkerConfig, "LLAMA_DTYPE", "bfloat16", "dtype", "bfloat16"),
        (WorkerConfig, "TSQP_LISTEN", "localhost:1, ipc:///x,", "listen", ("localhost:1", "ipc:///x")),
        (WorkerConfig, "TSQP_THREADS", "3", "threads", 3),
        (WorkerConfig, "TSQP_MAX_MESSAGE_BYTES", "65536", "max_message_bytes", 65536),
        (WorkerConfig, "TSQP_KEY", "/keys/w.key_secret", "key", "/keys/w.key_secret"),
        (EnclaveConfig, "TSQP_WORKER_KEY", "w.key", "worker_key", "w.key"),
        (EnclaveConfig, "LLAMA_GPU_ENDPOINT", "gpu:50051", "worker", "gpu:50051"),
        (EnclaveConfig, "TSQP_LEVEL", "local", "level", "local"),
        (EnclaveConfig, "TSQP_CONNECT_TIMEOUT_S", "0.5", "connect_timeout_s", 0.5),
        (EnclaveConfig, "TSQP_REQUEST_TIMEOUT_S", "7", "request_timeout_s", 7.0),
        (EngineConfig, "TSQP_WORKERS", "a:1, shm:///b", "workers", ("a:1", "shm:///b")),
        (EngineConfig, "TSQP_WORKER_KEYS", "a.key,b.key", "worker_keys", ("a.key", "b.key")),
        (EngineConfig, "TSQP_KV_MEMORY", "1000000", "kv_memory", 1_000_000),
        (EngineConfig, "TSQP_MAX_RUNNING", "3", "max_running", 3),
        (EngineConfig, "TSQP_MAX_QUEUED", "4", "max_queued", 4),
        (EngineConfig, "TSQP_STEP_TOKENS", "64", "step_tokens", 64),
        (EngineConfig, "TSQP_DEFAULT_TOKENS", "50", "default_tokens", 50),
        (EngineConfig, "TSQP_REUSE_PREFIXES", "off", "reuse_prefixes", "off"),
        (ServeConfig, "TSQP_MAX_REQUESTS", "5", "max_requests", 5),
    ],
)
def test_every_variable_sets_its_field(kind: Kind, name: str, text: str, field: str, value: object) -> None:
    assert getattr(load(kind, env={name: text}), field) == value


def test_flags_beat_the_environment_and_that_beats_the_file(tmp_path: Path) -> None:
    env = settings_file(tmp_path, "[worker]\nport = 1111\ndtype = 'float16'\nlisten = ['a:1']\n[enclave]\nworker='w:1'")
    assert load(WorkerConfig, env=env) == WorkerConfig(port=1111, dtype="float16", listen=("a:1",))
    env["LLAMA_GPU_PORT"] = "2222"
    assert load(WorkerConfig, env=env).port == 2222
    assert load(WorkerConfig, {"port": 3333, "dtype": None}, env) == WorkerConfig(
        port=3333, dtype="float16", listen=("a:1",)
    )
    assert load(EnclaveConfig, env=env).worker == "w:1"


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_GPU_PORT", "4444")
    assert load(WorkerConfig).port == 4444


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_variable_of_ours_is_refused_and_others_are_not_read(kind: Kind) -> None:
    with pytest.raises(ConfigError, match=r"TSQP_LEVLE is not a TSQP setting.*TSQP_LEVEL"):
        load(kind, env={"TSQP_LEVLE": "open"})
    assert load(kind, env={"LLAMA_LOG": "x", "PATH": "", "TSQP_CACHE": "/c"}) == kind()


@pytest.mark.parametrize(
    ("kind", "name", "text", "message"),
    [
        (WorkerConfig, "LLAMA_GPU_PORT", "http", "environment variable LLAMA_GPU_PORT: expected int, got 'http'"),
        (WorkerConfig, "LLAMA_GPU_PORT", "", "expected int, got ''"),
        (WorkerConfig, "LLAMA_GPU_PORT", "50051.0", "expected int"),
        (WorkerConfig, "LLAMA_GPU_PORT", "0", "port 0: expected at least 1 and at most 65535"),
        (WorkerConfig, "LLAMA_GPU_PORT", "65536", "port 65536: expected at least 1 and at most 65535"),
        (WorkerConfig, "LLAMA_DTYPE", "float64", "unknown dtype 'float64': expected one of float32, float16, bfloat16"),
        (WorkerConfig, "LLAMA_MODEL_PATH", "", "LLAMA_MODEL_PATH: expected str, got ''"),
        (WorkerConfig, "TSQP_ALLOW", " , ", "TSQP_ALLOW is empty: give a value, or leave it out"),
        (WorkerConfig, "TSQP_THREADS", "0", "threads 0: expected at least 1"),
        (WorkerConfig, "TSQP_THREADS", "99999999999", "threads 99999999999: expected"),
        (WorkerConfig, "TSQP_MAX_MESSAGE_BYTES", "1000", "max_message_bytes 1000: expected at least 65536"),
        (WorkerConfig, "TSQP_MAX_MESSAGE_BYTES", "9" * 30, "max_message_bytes 9+: expected"),
        (EnclaveConfig, "TSQP_LEVEL", "secret", "unknown level 'secret'"),
        (EnclaveConfig, "TSQP_CONNECT_TIMEOUT_S", "soon", "expected float, got 'soon'"),
        (EnclaveConfig, "TSQP_CONNECT_TIMEOUT_S", "0", "connect_timeout_s 0.0: expected at least 0.01"),
        (EnclaveConfig, "TSQP_REQUEST_TIMEOUT_S", "nan", "request_timeout_s nan: expected"),
        (EnclaveConfig, "TSQP_REQUEST_TIMEOUT_S", "inf", "request_timeout_s inf: expected"),
        (EnclaveConfig, "TSQP_REQUEST_TIMEOUT_S", "-1", "request_timeout_s -1.0: expected"),
        (EngineConfig, "TSQP_KV_MEMORY", "1 GiB", "TSQP_KV_MEMORY: expected int, got '1 GiB'"),
        (EngineConfig, "TSQP_KV_MEMORY", "0", "kv_memory 0: expected at least 1"),
        (EngineConfig, "TSQP_MAX_RUNNING", "0", "max_running 0: expected at least 1 and at most 65536"),
        (EngineConfig, "TSQP_MAX_QUEUED", "-1", "max_queued -1: expected at least 1"),
        (EngineConfig, "TSQP_STEP_TOKENS", "63", "step_tokens 63: expected at least 64"),
        (EngineConfig, "TSQP_REUSE_PREFIXES", "yes", "unknown reuse_prefixes 'yes': expected one of on, off"),
    ],
)
def test_a_wrong_value_names_the_setting_and_what_was_expected(kind: Kind, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(kind, env={name: text})


def test_flags_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="port 70000"):
        load(WorkerConfig, {"port": 70000}, {})
    with pytest.raises(ConfigError, match="unknown level"):
        load(EnclaveConfig, {"level": "secret"}, {})


@pytest.mark.parametrize(("kind", "name"), [(WorkerConfig, "key"), (EnclaveConfig, "worker_key")])
def test_an_empty_key_is_a_mistake_and_not_a_link_in_clear(kind: Kind, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is empty"):
        load(kind, {name: ""}, {})
    with pytest.raises(ConfigError, match="expected str, got ''"):
        load(kind, env={f"TSQP_{name.upper()}": ""})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[worker", "not valid TOML"),
        (b"[worker]\nmodel = '\xff'", "not valid TOML"),
        ("[gpu]", r"unknown table \[gpu\]; known: enclave, engine, serve, worker"),
        ("port = 1", r"unknown table \[port\]"),
        ("worker = 5", "worker is not a table"),
        ("[worker]\nprot = 1", r"unknown key 'prot' in \[worker\]; known: .*port"),
        ("[worker]\nport = true", r"\[worker\] port: expected int, got True"),
        ("[worker]\nport = 1.5", "port: expected int, got 1.5"),
        ("[worker]\nport = inf", "port: expected int, got inf"),
        ("[worker]\nport = [1]", "port: expected int"),
        ("[worker]\nmodel = 1", "model: expected str, got 1"),
        ("[worker]\nlisten = [1]", "listen: expected a list of strings"),
        ("[worker]\nlisten = 1", "listen: expected a list of strings"),
    ],
)
def test_a_wrong_file_is_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(WorkerConfig, env=settings_file(tmp_path, text))


def test_numbers_too_large_for_a_float_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected float"):
        load(EnclaveConfig, env=settings_file(tmp_path, f"[enclave]\nrequest_timeout_s = {'9' * 400}"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml: cannot read it \(No such file"):
        load(WorkerConfig, env={"TSQP_CONFIG": str(tmp_path / "missing.toml")})
    with pytest.raises(ConfigError, match="cannot read it"):
        load(WorkerConfig, env={"TSQP_CONFIG": str(tmp_path)})


NAMES = ["LLAMA_GPU_PORT", "LLAMA_DTYPE", "TSQP_LISTEN", "TSQP_THREADS", "TSQP_REQUEST_TIMEOUT_S", "TSQP_LEVEL"]


@settings(deadline=None)
@given(
    env=st.dictionaries(
        st.sampled_from(NAMES), st.text() | st.integers().map(str) | st.floats().map(str), max_size=len(NAMES)
    )
)
def test_any_environment_gives_settings_in_range_or_a_config_error(env: dict[str, str]) -> None:
    try:
        worker, enclave = load(WorkerConfig, env=env), load(EnclaveConfig, env=env)
    except ConfigError:
        return
    assert 0 < worker.port < 65536
    assert worker.threads is None or worker.threads >= 1
    assert 0 < enclave.request_timeout_s < float("inf")


def test_settings_cannot_be_changed() -> None:
    config: Any = load(WorkerConfig, env={})
    with pytest.raises(AttributeError):
        config.port = 1
