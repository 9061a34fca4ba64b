"""What every command prints with ``--json``: one object of a documented type (docs/json-schema.json)."""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec
from msgspec import Struct


class WorkerReady(Struct, frozen=True, kw_only=True):
    """``tsqp worker`` and ``tsqp dealer``: printed once, when requests are answered.

    ``serves``: ``open`` float products, ``exact`` products of int8 codes, ``masks`` a dealer's mask products.

    ``public_key`` is what enclaves must be given to talk to it, in z85; null where its links are in clear.
    """

    model: str
    model_digest: str
    device: str
    dtype: str
    serves: Literal["open", "exact", "masks"]
    threads: int
    modules: int
    endpoints: list[str]
    protocol: int
    public_key: str | None


class KeysReport(Struct, frozen=True, kw_only=True):
    """``tsqp keys``: a key pair, or what is known of one. The public key is in z85; the secret one is never shown.

    ``public_file`` and ``secret_file`` are null where ``tsqp keys show`` was not given that file.
    """

    name: str
    public_key: str
    public_file: str | None
    secret_file: str | None


class PrefillReport(Struct, frozen=True, kw_only=True):
    """``tsqp prefill``. Times in seconds, sizes in bytes; the three parts and the counts are the median run's.

    ``enclave_s + waited_s`` is that run's time, ``worker_s`` the worker's own account of its work, ``wire_s`` what
    ``waited_s`` exceeds it by. Where ``micro_batches`` take turns the enclave computes while the worker does, so that
    the parts may add up to more than the time. ``masks`` is where masks came from, ``enclave`` or ``dealers``; null but
    at `masked`. ``verified_rows`` counts the rows of products that were checked, ``mask_rows_used`` the mask rows.
    ``mask_wait_s`` is the part of the run that waited for masks not in the pool; ``mask_fill_s`` is the time spent
    filling the pool for it, outside of ``prefill_s``. ``quantise_s``, ``mask_s``, ``ahead_s`` and ``check_s`` are the
    parts of ``enclave_s`` that protection takes, ``ahead_s`` what of it is done while the worker computes.
    ``next_tokens`` has one id per sequence, ``next_text`` is the first one's text (null without a tokenizer).
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


class Floor(Struct, frozen=True, kw_only=True):
    """The least that each part of a level could take, in seconds: measured alone in one process in the same run.

    ``enclave_s`` is ``rest_s`` and the protection of its products together. ``wire_s`` is computed from the bytes moved
    and the round trips. With overlap the level's floor is ``overlapped_s``, the largest of the three parts; without it
    ``serial_s``, their sum.
    """

    worker_s: float
    wire_s: float
    enclave_s: float
    rest_s: float
    quantise_s: float
    mask_s: float
    ahead_s: float
    check_s: float
    overlapped_s: float
    serial_s: float


class Variant(Struct, frozen=True, kw_only=True):
    """One measured variant. Times in seconds; ``settings`` says how it was run.

    The parts are those of the run nearest the median. ``enclave_s + waited_s`` is its time, ``worker_s`` the worker's
    own account of its work, ``wire_s`` what ``waited_s`` exceeds it by. ``quantise_s``, ``mask_s``, ``ahead_s`` and
    ``check_s``, together ``protection_s``, and ``mask_wait_s``, waiting for masks, are parts of ``enclave_s``.
    ``peak_bytes`` is the process's largest resident memory less what it held once torch and TSQP were imported.
    """

    name: str
    settings: str
    median_s: float
    p95_s: float
    all_s: list[float]
    bytes_per_token: float
    round_trips: int
    enclave_s: float
    worker_s: float
    wire_s: float
    protection_s: float = 0.0
    mask_wait_s: float = 0.0
    p10_s: float = 0.0
    p90_s: float = 0.0
    waited_s: float = 0.0
    micro_batches: int = 1
    quantise_s: float = 0.0
    mask_s: float = 0.0
    ahead_s: float = 0.0
    check_s: float = 0.0
    peak_bytes: int = 0
    floor: Floor | None = None


class Ratio(Struct, frozen=True, kw_only=True):
    """One ratio of ``tsqp bench``, with its limit where there is one; ``ok`` is null where there is none."""

    name: str
    value: float
    limit: str
    ok: bool | None


class Hardware(Struct, frozen=True, kw_only=True):
    """The machine a benchmark ran on."""

    cpu: str
    cores: int
    memory_gb: float
    torch: str
    python: str


class Measurement(Struct, frozen=True, kw_only=True):
    """What every report of ``tsqp bench`` begins with: when, what, how and on which machine."""

    date: str
    commit: str
    command: str
    hardware: Hardware
    ratios: list[Ratio]


class ModelMeasurement(Measurement, frozen=True, kw_only=True):
    """A measurement of a model.

    ``warm_up`` counts the runs before the first turn; each of the ``rounds`` turns begins with one more that does not
    count.
    """

    model: str
    dtype: str
    threads: int
    warm_up: int
    rounds: int


class BenchReport(ModelMeasurement, frozen=True, kw_only=True):
    """``tsqp bench prefill``: variants measured in turns within one run, and the ratios between their medians."""

    tokens: int
    variants: list[Variant]


class LevelsReport(ModelMeasurement, frozen=True, kw_only=True):
    """``tsqp bench levels``: each level by part, with its floor.

    ``copy_bytes_per_s`` and ``round_trip_s``, of 4 KB over shared memory, are what the wire's floor is computed from.
    """

    tokens: int
    copy_bytes_per_s: float
    round_trip_s: float
    variants: list[Variant]


class ScalingPoint(Struct, frozen=True, kw_only=True):
    """One level at one size. ``masks_ready`` is false where the mask pool was too small for the prompts."""

    level: str
    tokens: int
    batch: int
    median_s: float
    p10_s: float
    p90_s: float
    tokens_per_s: float
    bytes_per_token: float
    round_trips: int
    micro_batches: int
    masks_ready: bool


class ScalingReport(ModelMeasurement, frozen=True, kw_only=True):
    """``tsqp bench scaling``: prefill over prompt length, and over the number of prompts of ``batch_tokens`` tokens."""

    mask_pool: int
    batch_tokens: int
    lengths: list[ScalingPoint]
    batches: list[ScalingPoint]


class OverlapPoint(Struct, frozen=True, kw_only=True):
    """One delay and number of micro-batches; 1 is serial.

    ``hidden`` is the part of what the link costs a serial prefill that these micro-batches save, null where it has no
    meaning; ``times_undelayed`` compares with the serial prefill without a delay.
    """

    delay_ms: float
    micro_batches: int
    median_s: float
    p10_s: float
    p90_s: float
    enclave_s: float
    waited_s: float
    worker_s: float
    hidden: float | None
    times_undelayed: float


class OverlapReport(ModelMeasurement, frozen=True, kw_only=True):
    """``tsqp bench overlap``: prefill over a link with a delay each way, serial and in micro-batches."""

    level: str
    tokens: int
    batch: int
    points: list[OverlapPoint]


class TransportPoint(Struct, frozen=True, kw_only=True):
    """Round trips of one size over one transport; seconds."""

    bytes: int
    median_s: float
    p10_s: float
    p90_s: float


class TransportRow(Struct, frozen=True, kw_only=True):
    """One transport. ``missing`` says what is not installed, where it was not measured."""

    name: str
    settings: str
    points: list[TransportPoint]
    missing: str = ""


class TransportReport(Measurement, frozen=True, kw_only=True):
    """``tsqp bench transport``: round trips of messages of several sizes, transports in turns."""

    rounds: int
    rows: list[TransportRow]


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
    PrefillReport,
    PackReport,
    DoctorReport,
    BenchReport,
    LevelsReport,
    ScalingReport,
    OverlapReport,
    TransportReport,
    AuditReport,
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
