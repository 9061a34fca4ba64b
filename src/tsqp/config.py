"""Settings, parsed once at the edge of a process: flags over environment over file over defaults.

The published variables (``LLAMA_*``) keep their names and defaults; ours are ``TSQP_*``. A settings file is TOML,
named by ``TSQP_CONFIG``, with one table per role (``[worker]``, ``[enclave]``, ``[engine]``, ``[serve]``). Unknown keys
and unparsable values raise. docs/configuration.md lists every setting.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tsqp import logs
from tsqp.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DTYPES = ("float32", "float16", "bfloat16")
# In which activations may travel at the level open; int8 has one scale per token, and a residual stream in bfloat16.
WIRE_DTYPES = (*DTYPES, "int8")
LEVELS = ("open", "local", "verified", "masked", "monolithic")
# Levels that need a packed model, and send the worker integers.
EXACT_LEVELS = ("verified", "masked")
WORKER_LEVELS = ("open", *EXACT_LEVELS)
SERVICES = ("auto", "open", "exact", "masks")
# How a server proves what it is: by the TEE it is in, not at all, for development, or by a TEE of this kind.
ATTESTATIONS = ("auto", "off", "none", "gramine", "tdx")
DEFAULT_PORT = 50051
DEALER_PORT = 50052
DEFAULT_TOKENS = 1024

# Read where they are used, before any settings object exists.
_OTHER_VARIABLES = frozenset({"TSQP_CONFIG", "TSQP_CACHE", "TSQP_NATIVE", "TSQP_API_KEY"})


_MAX_THREADS = 4096
_MAX_RANKS = 1024
# A week; a poll counts milliseconds in 32 bits.
_MAX_TIMEOUT_S = 604800
_MAX_MESSAGE_BYTES = 1 << 40


def _setting(
    default: Any,  # noqa: ANN401
    env: str,
    choices: tuple[str, ...] | None = None,
    limits: tuple[float, float] | None = None,
) -> Any:  # noqa: ANN401
    """Declare a field: its default, the variable that sets it, and what it may be."""
    return field(default=default, metadata={"env": env, "choices": choices, "limits": limits})


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Settings of a worker process.

    ``device`` None means ``cuda:0`` where there is one, else the CPU, and says so; a device the user names must
    exist. ``listen`` empty means ``tcp://127.0.0.1:<port>`` and, without a key, shared memory at a place that enclaves
    of the same user know (``transport/nearby.py``); for a dealer port 50052 alone. ``key`` names the file of a secret
    key; None means links in clear. ``allow``: the public keys of the clients that may connect, as files or as text;
    empty means any client that knows this worker's. ``insecure``: whether it may listen beyond this machine without a
    key. ``memory_limit``: at how many bytes of its own memory the process ends; None allows what the model takes and
    room beside it. ``serves``: float products (``open``), exact products of int8
    codes (``exact``), a dealer's mask products (``masks``), or by the model: ``exact`` for a packed one.
    ``tensor_parallel``: how many processes hold the weights, each some rows of every group
    (``worker/ranks``); None means one, or as many as torchrun started.
    ``cuda_graphs``: whether a GPU's products that repeat are captured. ``max_clients``: connections that are served.
    ``max_client_requests`` and ``max_client_bytes``: what one of them may have waiting, replies included
    (``worker/clients.py``). ``metrics``: where Prometheus reads what it does, ``host:port``; None means nowhere.
    ``log_level`` and ``log_format``: what is logged to standard error, and how (``tsqp/logs.py``).
    """

    SECTION: typing.ClassVar[str] = "worker"

    model: str = _setting("smollm2", "LLAMA_MODEL_PATH")
    device: str | None = _setting(None, "LLAMA_GPU_DEVICE")
    port: int = _setting(DEFAULT_PORT, "LLAMA_GPU_PORT", limits=(1, 65535))
    dtype: str = _setting("float32", "LLAMA_DTYPE", choices=DTYPES)
    listen: tuple[str, ...] = _setting((), "TSQP_LISTEN")
    threads: int | None = _setting(None, "TSQP_THREADS", limits=(1, _MAX_THREADS))
    max_message_bytes: int = _setting(1 << 30, "TSQP_MAX_MESSAGE_BYTES", limits=(1 << 16, _MAX_MESSAGE_BYTES))
    key: str | None = _setting(None, "TSQP_KEY")
    allow: tuple[str, ...] = _setting((), "TSQP_ALLOW")
    insecure: str = _setting("off", "TSQP_INSECURE", choices=("on", "off"))
    memory_limit: int | None = _setting(None, "TSQP_MEMORY_LIMIT", limits=(1, 1 << 50))
    serves: str = _setting("auto", "TSQP_SERVES", choices=SERVICES)
    tensor_parallel: int | None = _setting(None, "TSQP_TENSOR_PARALLEL", limits=(1, _MAX_RANKS))
    cuda_graphs: str = _setting("on", "TSQP_CUDA_GRAPHS", choices=("on", "off"))
    metrics: str | None = _setting(None, "TSQP_METRICS")
    log_level: str = _setting("info", "TSQP_LOG_LEVEL", choices=logs.LEVELS)
    log_format: str = _setting("text", "TSQP_LOG_FORMAT", choices=logs.FORMS)
    max_clients: int = _setting(256, "TSQP_MAX_CLIENTS", limits=(1, 1 << 16))
    max_client_requests: int = _setting(64, "TSQP_MAX_CLIENT_REQUESTS", limits=(1, 1 << 16))
    max_client_bytes: int = _setting(256 << 20, "TSQP_MAX_CLIENT_BYTES", limits=(1, 1 << 40))


@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveConfig:
    """Settings of an enclave process.

    ``worker`` None means: one of this user's with this model that runs on the default port here, else one started for
    the run. ``worker_key``: the worker's public key, as a file or as text; None means a link in clear.
    ``own_key`` names the file of a secret key that encrypted links use, for peers that let only some in; None means a
    fresh one for each connection. ``insecure``: whether a link may leave this machine without a key. ``masks`` None
    means ``dealers`` where there are any, else ``enclave``; ``dealer_keys`` are the dealers' public keys in the same
    order. ``mask_pool`` is for how many tokens masks are kept ready; None means one prompt in ``tsqp prefill``, what a
    step can take in an engine, and none in a library call. ``codes`` names a packed model whose ``worker/`` is on this
    machine; None streams the codes from the worker. ``retries``: how often a product is sent again when the link
    fails. ``wire_dtype``: in which activations travel at `open`; None means ``dtype``. ``micro_batches``: into how many
    parts a prefill is cut that take turns, so that one is computed while another's product is away; None chooses by the
    prompt's length. ``model_digest``: which the model must have (``levels.digest_of``); None takes any.
    """

    SECTION: typing.ClassVar[str] = "enclave"

    model: str = _setting("smollm2", "LLAMA_MODEL_PATH")
    model_digest: str | None = _setting(None, "TSQP_MODEL_DIGEST")
    worker: str | None = _setting(None, "LLAMA_GPU_ENDPOINT")
    worker_key: str | None = _setting(None, "TSQP_WORKER_KEY")
    own_key: str | None = _setting(None, "TSQP_OWN_KEY")
    insecure: str = _setting("off", "TSQP_INSECURE", choices=("on", "off"))
    dtype: str = _setting("float32", "LLAMA_DTYPE", choices=DTYPES)
    wire_dtype: str | None = _setting(None, "TSQP_WIRE_DTYPE", choices=WIRE_DTYPES)
    level: str = _setting("open", "TSQP_LEVEL", choices=LEVELS)
    masks: str | None = _setting(None, "TSQP_MASKS", choices=("enclave", "dealers"))
    dealers: tuple[str, ...] = _setting((), "TSQP_DEALERS")
    dealer_keys: tuple[str, ...] = _setting((), "TSQP_DEALER_KEYS")
    mask_pool: int | None = _setting(None, "TSQP_MASK_POOL", limits=(0, 1 << 30))
    mask_memory: int = _setting(1 << 30, "TSQP_MASK_MEMORY", limits=(0, 1 << 50))
    codes: str | None = _setting(None, "TSQP_CODES")
    retries: int = _setting(1, "TSQP_RETRIES", limits=(0, 100))
    micro_batches: int | None = _setting(None, "TSQP_MICRO_BATCHES", limits=(1, 1024))
    threads: int | None = _setting(None, "TSQP_THREADS", limits=(1, _MAX_THREADS))
    connect_timeout_s: float = _setting(5.0, "TSQP_CONNECT_TIMEOUT_S", limits=(0.01, _MAX_TIMEOUT_S))
    request_timeout_s: float = _setting(120.0, "TSQP_REQUEST_TIMEOUT_S", limits=(0.01, _MAX_TIMEOUT_S))
    max_message_bytes: int = _setting(1 << 30, "TSQP_MAX_MESSAGE_BYTES", limits=(1 << 16, _MAX_MESSAGE_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of an engine, which continues many prompts together.

    ``workers``: addresses, all of which are used that can be; where there are none, ``EnclaveConfig.worker``.
    ``worker_keys`` are their public keys in the same order; none means ``EnclaveConfig.worker_key``. ``directory``:
    where a pool says which workers there are now, a URL or a file, in place of ``workers``; a worker must hold one of
    ``worker_keys`` then, and at most ``directory_workers`` are used. ``worker_rows``: a
    step is divided over one more worker for each so many rows. ``kv_memory`` is for keys and values, in bytes.
    ``max_running``: requests that are generated together. ``max_queued``: requests of one API key that wait for room.
    ``step_tokens``: how many tokens a step computes at most, of prompts and answers together. ``default_tokens``: how
    long an answer to a chat may be that names no limit; room is taken for all of them. ``reuse_prefixes``: whether
    beginnings of prompts are found again, within one API key; None means at every level but `masked`.
    """

    SECTION: typing.ClassVar[str] = "engine"

    workers: tuple[str, ...] = _setting((), "TSQP_WORKERS")
    worker_keys: tuple[str, ...] = _setting((), "TSQP_WORKER_KEYS")
    directory: str | None = _setting(None, "TSQP_DIRECTORY")
    directory_workers: int = _setting(8, "TSQP_DIRECTORY_WORKERS", limits=(1, 64))
    worker_rows: int = _setting(16, "TSQP_WORKER_ROWS", limits=(1, 1 << 16))
    kv_memory: int = _setting(1 << 30, "TSQP_KV_MEMORY", limits=(1, 1 << 50))
    max_running: int = _setting(64, "TSQP_MAX_RUNNING", limits=(1, 1 << 16))
    max_queued: int = _setting(256, "TSQP_MAX_QUEUED", limits=(1, 1 << 20))
    step_tokens: int = _setting(256, "TSQP_STEP_TOKENS", limits=(64, 1 << 16))
    default_tokens: int = _setting(DEFAULT_TOKENS, "TSQP_DEFAULT_TOKENS", limits=(1, 1 << 30))
    reuse_prefixes: str | None = _setting(None, "TSQP_REUSE_PREFIXES", choices=("on", "off"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of the HTTP server that ``tsqp serve`` puts before an enclave.

    ``served_model`` is the model's name in the API; None means the model's own. ``api_keys`` names the file of hashed
    API keys; None means that no key is asked for, which is allowed on loopback only. ``tls_cert`` and ``tls_key`` are
    PEM files; None means HTTP in clear. ``attestation``: what proves to clients which code runs here; with one the
    server makes its own TLS key. ``padding``: whether answers are padded to few sizes; None means at `masked`.
    ``max_requests``: generations by HTTP at once, above which clients are told to come back. ``max_choices``: prompts
    times ``n`` in one request. ``drain_s``: how long running requests may go on once the server is told to stop.
    ``log_level`` and ``log_format`` as of a worker.
    """

    SECTION: typing.ClassVar[str] = "serve"

    host: str = _setting("127.0.0.1", "TSQP_HOST")
    port: int = _setting(8000, "TSQP_PORT", limits=(0, 65535))
    served_model: str | None = _setting(None, "TSQP_SERVED_MODEL")
    api_keys: str | None = _setting(None, "TSQP_API_KEYS")
    tls_cert: str | None = _setting(None, "TSQP_TLS_CERT")
    tls_key: str | None = _setting(None, "TSQP_TLS_KEY")
    attestation: str = _setting("auto", "TSQP_ATTESTATION", choices=ATTESTATIONS)
    padding: str | None = _setting(None, "TSQP_PADDING", choices=("on", "off"))
    max_body_bytes: int = _setting(4 << 20, "TSQP_MAX_BODY_BYTES", limits=(1024, 1 << 32))
    max_requests: int = _setting(64, "TSQP_MAX_REQUESTS", limits=(1, 1 << 16))
    max_choices: int = _setting(128, "TSQP_MAX_CHOICES", limits=(1, 1 << 16))
    log_level: str = _setting("info", "TSQP_LOG_LEVEL", choices=logs.LEVELS)
    log_format: str = _setting("text", "TSQP_LOG_FORMAT", choices=logs.FORMS)
    drain_s: float = _setting(30.0, "TSQP_DRAIN_S", limits=(0, _MAX_TIMEOUT_S))


KINDS = (WorkerConfig, EnclaveConfig, EngineConfig, ServeConfig)
Config = TypeVar("Config", WorkerConfig, EnclaveConfig, EngineConfig, ServeConfig)


def load(
    kind: type[Config],
    flags: Mapping[str, object] | None = None,
    env: Mapping[str, str] | None = None,
    defaults: Mapping[str, object] | None = None,
) -> Config:
    """Build a settings object.

    Args:
        kind: one of ``KINDS``.
        flags: values from the command line by field name; None values count as not given.
        env: the environment; the process's own by default.
        defaults: a command's own, instead of the fields'.

    Raises:
        ConfigError: an unknown key or variable, or a value of the wrong type or out of range.
    """
    env = os.environ if env is None else env
    _refuse_unknown_variables(env)
    values = {**(defaults or {}), **_from_file(kind, env)}
    for entry in dataclasses.fields(kind):
        name = entry.metadata["env"]
        if name in env:
            values[entry.name] = _parse(kind, entry, env[name], f"environment variable {name}")
    values |= {key: value for key, value in (flags or {}).items() if value is not None}
    config = kind(**values)
    for entry in dataclasses.fields(kind):
        _check(entry, getattr(config, entry.name))
    return config


def _refuse_unknown_variables(env: Mapping[str, str]) -> None:
    known = {entry.metadata["env"] for kind in KINDS for entry in dataclasses.fields(kind)}
    for name in env:
        if name.startswith("TSQP_") and name not in known | _OTHER_VARIABLES:
            raise ConfigError(
                f"environment variable {name} is not a TSQP setting. "
                f"Known: {', '.join(sorted(known | _OTHER_VARIABLES))}."
            )


def _from_file(kind: type[Config], env: Mapping[str, str]) -> dict[str, Any]:
    name = env.get("TSQP_CONFIG")
    if not name:
        return {}
    try:
        with Path(name).open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"TSQP_CONFIG={name}: cannot read it ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"TSQP_CONFIG={name}: not valid TOML ({error}).") from error
    sections = {each.SECTION for each in KINDS}
    if unknown := set(document) - sections:
        raise ConfigError(f"{name}: unknown table [{min(unknown)}]; known: {', '.join(sorted(sections))}.")
    entries = {entry.name: entry for entry in dataclasses.fields(kind)}
    table = document.get(kind.SECTION, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{name}: {kind.SECTION} is not a table; write [{kind.SECTION}].")
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in entries:
            raise ConfigError(f"{name}: unknown key {key!r} in [{kind.SECTION}]; known: {', '.join(sorted(entries))}.")
        values[key] = _parse(kind, entries[key], value, f"{name}, [{kind.SECTION}] {key}")
    return values


def _parse(kind: type[Config], entry: dataclasses.Field[Any], value: object, origin: str) -> object:
    """Turn a string or a TOML value into the field's type."""
    target = typing.get_type_hints(kind)[entry.name]
    if isinstance(target, types.UnionType):
        target = next(option for option in typing.get_args(target) if option is not type(None))
    if typing.get_origin(target) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            found = tuple(item.strip() for item in items if item.strip())
            if not found:  # an empty list of who may enter must not come to mean everybody
                raise ConfigError(f"{origin} is empty: give a value, or leave it out.")
            return found
    elif target is str and isinstance(value, str) and value:
        return value
    elif target in (int, float) and isinstance(value, (str, int, target)) and not isinstance(value, bool):
        try:
            return target(value)
        except (ValueError, OverflowError):
            pass
    wanted = "a list of strings" if typing.get_origin(target) is tuple else target.__name__
    raise ConfigError(f"{origin}: expected {wanted}, got {value!r}.")


def _check(entry: dataclasses.Field[Any], value: Any) -> None:  # noqa: ANN401
    choices, limits = entry.metadata["choices"], entry.metadata["limits"]
    if value == "":  # as from a shell variable that is not set: no key must not come to mean no encryption
        raise ConfigError(f"{entry.name} is empty: give a value, or leave it out.")
    if choices and value is not None and value not in choices:
        raise ConfigError(f"unknown {entry.name} {value!r}: expected one of {', '.join(choices)}.")
    if limits and value is not None and not limits[0] <= value <= limits[1]:
        raise ConfigError(f"{entry.name} {value!r}: expected at least {limits[0]} and at most {limits[1]}.")
