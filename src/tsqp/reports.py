"""What every command prints with ``--json``: one object of a documented type (docs/json-schema.json)."""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec
from msgspec import Struct

from tsqp.measurements import (
    BenchReport,
    DecodeReport,
    LevelsReport,
    OverlapReport,
    ScalingReport,
    TransportReport,
)
from tsqp.plan.reports import PlanCheckReport, PlanReport


class WorkerReady(Struct, frozen=True, kw_only=True):
    """``tsqp worker`` and ``tsqp dealer``: printed once, when requests are answered.

    ``serves``: ``open`` float products, ``exact`` products of int8 codes, ``masks`` a dealer's mask products.

    ``public_key`` is what enclaves must be given to talk to it, in z85; null where its links are in clear.
    ``tensor_parallel`` is how many processes compute each product together; ``device``, ``threads`` and
    ``memory_limit`` are of the first. ``memory_limit`` is the number of bytes of its own memory beyond which it ends;
    null where that cannot be watched.
    """

    model: str
    model_digest: str
    device: str
    dtype: str
    serves: Literal["open", "exact", "masks"]
    threads: int
    tensor_parallel: int
    modules: int
    endpoints: list[str]
    protocol: int
    public_key: str | None
    memory_limit: int | None


class KeysReport(Struct, frozen=True, kw_only=True):
    """``tsqp keys``: a key pair, or what is known of one. The public key is in z85; the secret one is never shown.

    ``public_file`` and ``secret_file`` are null where ``tsqp keys show`` was not given that file.
    """

    name: str
    public_key: str
    public_file: str | None
    secret_file: str | None


class VerifyReport(Struct, frozen=True, kw_only=True):
    """``tsqp verify``: what a server has proved. It is printed only if that is what the policy asks for.

    ``measurements`` are hexadecimal, and of SGX also the product's number and security version. ``claims`` are those of
    docs/attestation.md; ``advisories`` are Intel's that apply to the platform.
    """

    url: str
    tee: Literal["sgx", "tdx"]
    measurements: dict[str, str]
    tcb_status: str
    advisories: list[str]
    claims: dict[str, str | list[str]]


class PrefillReport(Struct, frozen=True, kw_only=True):
    """``tsqp prefill``. Times in seconds, sizes in bytes; the three parts and the counts are the median run's.

    ``enclave_s + waited_s`` is that run's time, ``worker_s`` the worker's own account of its work, ``pcie_s`` the part
    of that in which tensors went to its device and back, ``wire_s`` what ``waited_s`` exceeds it by. Where
    ``micro_batches`` take turns the enclave computes while the worker does, so that the parts may add up to more than
    the time. ``masks`` is where masks came from, ``enclave`` or ``dealers``; null but at `masked`. ``verified_rows``
    counts the rows of products that were checked, ``mask_rows_used`` the mask rows. ``mask_wait_s`` is the part of the
    run that waited for masks not in the pool; ``mask_fill_s`` is the time spent filling the pool for it, outside of
    ``prefill_s``. ``quantise_s``, ``mask_s``, ``ahead_s`` and ``check_s`` are the parts of ``enclave_s`` that
    protection takes, ``ahead_s`` what of it is done while the worker computes. ``next_tokens`` has one id per sequence,
    ``next_text`` is the first one's text (null without a tokenizer).
    """

    model: str
    level: str
    masks: Literal["enclave", "dealers"] | None
    tokens: int
    batch: int
    dtype: str
    threads: int
    repeats: int
    prefill_s: float
    prefill_s_all: list[float]
    tokens_per_s: float
    round_trips: int
    bytes_sent: int
    bytes_received: int
    enclave_s: float
    worker_s: float
    pcie_s: float
    waited_s: float
    wire_s: float
    micro_batches: int
    verified_rows: int
    mask_rows_used: int
    mask_wait_s: float
    mask_fill_s: float
    quantise_s: float
    mask_s: float
    ahead_s: float
    check_s: float
    next_tokens: list[int]
    next_text: str | None


class PackReport(Struct, frozen=True, kw_only=True):
    """``tsqp pack``. Sizes in bytes. ``licence_files`` is empty where none lay beside the model.

    ``codes_digest`` is what a worker of these codes announces; ``manifest_digest`` is of the whole packed model.
    """

    model: str
    out: str
    source_digest: str
    codes_digest: str
    manifest_digest: str
    groups: int
    worker_bytes: int
    enclave_bytes: int
    licence_files: list[str]
    seconds: float


class ExportReport(Struct, frozen=True, kw_only=True):
    """``tsqp export``. Sizes in bytes; ``stayed`` says why, by module.

    A worker of ``floats/`` announces ``source_digest``, one of ``worker/`` ``codes_digest``.
    """

    model: str
    out: str
    dtype: str
    source_digest: str
    codes_digest: str
    manifest_digest: str
    groups: int
    moved: list[str]
    stayed: dict[str, str]
    worker_bytes: int
    floats_bytes: int
    seconds: float


class SizePart(Struct, frozen=True, kw_only=True):
    """What one part of an enclave takes."""

    name: str
    bytes: int


class SizeReport(Struct, frozen=True, kw_only=True):
    """``tsqp size``. ``enclave_size`` and ``max_threads`` are what a Gramine manifest takes.

    ``enclave_bytes`` is the same size: a power of two, a fifth above ``needed_bytes``, the sum of ``parts``, at least.
    """

    model: str
    level: str
    threads: int
    max_running: int
    parts: list[SizePart]
    needed_bytes: int
    enclave_bytes: int
    enclave_size: str
    max_threads: int


class Check(Struct, frozen=True, kw_only=True):
    """One line of ``tsqp doctor``. ``advice`` says what to do where the status is not ``ok``."""

    name: str
    status: Literal["ok", "note", "fail"]
    found: str
    advice: str = ""


class DoctorReport(Struct, frozen=True, kw_only=True):
    """``tsqp doctor``. ``ok`` is false when a check failed; the exit code is then 3."""

    ok: bool
    checks: list[Check]


class AuditFinding(Struct, frozen=True, kw_only=True):
    """One attack or test of ``tsqp audit``.

    ``value`` is what ``measures`` names: a fraction of the prompt's tokens or distinct tokens, a count, or a p-value,
    which ``p_value`` then repeats. ``ok`` says whether it is as ``expected``: recovery where nothing protects, chance
    where something does; null where nothing is expected.
    """

    subject: str
    attack: str
    measures: str
    value: float
    p_value: float | None
    expected: str
    ok: bool | None
    note: str


class AuditReport(Struct, frozen=True, kw_only=True):
    """``tsqp audit``. ``ok`` is false when a finding is not as expected; the exit code is then 1.

    ``simulated`` names what was computed from another recording instead of recorded at the wire.
    """

    model: str
    tokens: int
    distinct_tokens: int
    vocabulary: int
    levels: list[str]
    schemes: list[str]
    simulated: list[str]
    ok: bool
    findings: list[AuditFinding]


class TopReport(Struct, frozen=True, kw_only=True):
    """``tsqp top``: what a worker, a dealer or a server did in ``interval_s`` seconds, by its own account.

    Rates are per second, of that interval. ``serves`` is a server's level, else what is answered: ``open``, ``exact``
    or ``masks``. ``bytes_in`` and ``bytes_out`` are a worker's with its clients, a server's with its worker. ``batch``
    is how many requests a product answered, or the rows of a server's last step. ``waiting`` requests wait, ``running``
    ones are generated. ``memory_bytes`` is what is taken of a GPU or, on a CPU, by the worker's process; of a server
    ``cache_used`` is the share of its key-value cache, and ``workers_usable`` of its ``workers`` are in use. ``parts``
    has the share of the interval that each part took;
    where several go on at once they add up to more than 1. Counted since the start: ``errors``, answers that are one;
    ``failed``, generations that ended with one; ``refused``; ``integrity_failures``. What one of the kinds does not
    have is null.
    """

    time: str
    url: str
    kind: Literal["worker", "dealer", "server"]
    software: str
    model: str
    serves: str
    device: str | None
    dtype: str | None
    ready: bool
    reason: str
    uptime_s: float
    interval_s: float
    clients: int | None
    requests_per_s: float
    requests_by_kind_per_s: dict[str, float]
    rows_per_s: float | None
    tokens_per_s: float | None
    prompt_tokens_per_s: float | None
    bytes_in_per_s: float
    bytes_out_per_s: float
    waiting: int
    waiting_bytes: int | None
    running: int | None
    batch: float
    memory_bytes: int | None
    memory_total_bytes: int | None
    cache_used: float | None
    pool_held: int | None
    pool_wanted: int | None
    workers: int | None
    workers_usable: int | None
    parts: dict[str, float]
    errors: int
    failed: int | None
    refused: int | None
    integrity_failures: int | None


class PoolMember(Struct, frozen=True, kw_only=True):
    """A worker or dealer of a pool.

    ``phase`` is ``placing`` while its node is looked for, ``placed``, ``starting``, ``ready`` or ``draining``.
    ``party`` is whose node it is on, for dealers. ``url`` and ``key``, in z85, are what enclaves are told, ``pid`` and
    ``actor_pid`` of its process and of what watches that, ``waiting`` the requests that wait there.
    """

    name: str
    kind: Literal["worker", "dealer"]
    phase: str
    node: str
    party: str
    url: str
    key: str | None
    pid: int
    actor_pid: int
    waiting: int
    reason: str


class PoolReport(Struct, frozen=True, kw_only=True):
    """``tsqp cluster``. ``address`` is of the Ray cluster, ``directory`` what enclaves are given.

    ``workers`` and ``dealers`` are how many are wanted, ``workers_ready`` and ``dealers_ready`` how many can be used.
    ``restarts`` counts members that were replaced; ``reasons`` say why members are missing, or were.
    """

    pool: str
    address: str
    directory: str
    workers: int
    workers_ready: int
    least: int
    most: int
    dealers: int
    dealers_ready: int
    restarts: int
    members: list[PoolMember]
    reasons: list[str]


class ErrorDetail(Struct, frozen=True, kw_only=True):
    """What went wrong: the error's type, its sentence, and the exit code."""

    type: str
    message: str
    exit_code: int


class ErrorReport(Struct, frozen=True, kw_only=True):
    """Any command that fails, instead of its own object."""

    error: ErrorDetail


REPORTS = (
    WorkerReady,
    KeysReport,
    VerifyReport,
    PrefillReport,
    PackReport,
    ExportReport,
    SizeReport,
    PlanReport,
    PlanCheckReport,
    DoctorReport,
    BenchReport,
    LevelsReport,
    ScalingReport,
    OverlapReport,
    DecodeReport,
    TransportReport,
    AuditReport,
    TopReport,
    PoolReport,
    ErrorReport,
)


def dumps(report: Struct) -> str:
    """Return a report as one line of JSON."""
    return msgspec.json.encode(report).decode()


def schema() -> dict[str, Any]:
    """Return the JSON Schema of all reports."""
    _, components = msgspec.json.schema_components(REPORTS, ref_template="#/$defs/{name}")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": components}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))  # noqa: T201  `make schema` redirects it
