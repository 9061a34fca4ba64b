"""What the commands of ``tsqp bench`` print with ``--json``; the other commands' reports are in ``reports.py``."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


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
    own account of its work, ``pcie_s`` the part of that in which tensors went to its device and back, ``wire_s`` what
    ``waited_s`` exceeds ``worker_s`` by. ``quantise_s``, ``mask_s``, ``ahead_s`` and ``check_s``, together
    ``protection_s``, and ``mask_wait_s``, waiting for masks, are parts of ``enclave_s``. ``peak_bytes`` is the
    process's largest resident memory less what it held once torch and TSQP were imported.
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
    pcie_s: float = 0.0
    peak_bytes: int = 0
    floor: Floor | None = None


class Ratio(Struct, frozen=True, kw_only=True):
    """One ratio of ``tsqp bench``, with its limit where there is one; ``ok`` is null where there is none."""

    name: str
    value: float
    limit: str
    ok: bool | None


class Hardware(Struct, frozen=True, kw_only=True):
    """The machine a benchmark ran on; ``gpu`` names those that torch can use."""

    cpu: str
    cores: int
    memory_gb: float
    torch: str
    python: str
    gpu: str = ""


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


class DecodePoint(Struct, frozen=True, kw_only=True):
    """One variant of ``tsqp bench decode`` with so many requests at once; seconds of a step, in which each has a token.

    ``all_s`` has one number for each run; ``tokens_per_s``, of all requests together, is ``batch`` / ``median_s``.
    The rest is of the run nearest the median: ``bytes_per_token`` went over the link to the worker, a step waited
    ``mask_wait_s`` for masks that were not ready, and meanwhile ``mask_fill_s`` was spent on filling the pool.
    """

    name: str
    settings: str
    level: str
    masks: Literal["", "ready", "made within"]
    batch: int
    tokens_per_s: float
    median_s: float
    p10_s: float
    p90_s: float
    p95_s: float
    all_s: list[float]
    bytes_per_token: float
    mask_wait_s: float
    mask_fill_s: float


class StepParts(Struct, frozen=True, kw_only=True):
    """One step of generation by part, seconds; the parts are those of the run nearest the median overhead.

    ``products_s`` is the time spent on asking for products (the look-up of the embedding is one) and having them:
    ``worker_s`` and ``wire_s`` were waited for, of the worker by its own account, and the rest is the enclave's:
    messages, copies, protection, and without a worker the products themselves. ``attention_s`` includes storing keys
    and values. ``overhead_s``, the median of ``all_overhead_s``, is what a step takes without these two: ``between_s``
    (norms, rotary, SwiGLU, Python between products; at `open` of these only the first norm, rotary and Python),
    ``sampling_s`` (telling who asked included) and ``scheduling_s``.
    """

    name: str
    sampling: str
    batch: int
    step_s: float
    products_s: float
    worker_s: float
    wire_s: float
    attention_s: float
    between_s: float
    sampling_s: float
    scheduling_s: float
    overhead_s: float
    all_overhead_s: list[float]


class DecodeReport(ModelMeasurement, frozen=True, kw_only=True):
    """``tsqp bench decode``: generation at every level, by the number of requests at once.

    Each request has a prompt of ``prompt_tokens`` and an answer of ``tokens``. Where masks were ready, they were for
    ``mask_pool`` tokens, and their products may take ``mask_pool_bytes``; where they were made within, the pool was the
    engine's own. Here turns begin without a run that does not count.
    """

    prompt_tokens: int
    tokens: int
    mask_pool: int
    mask_pool_bytes: int
    points: list[DecodePoint]
    steps: list[StepParts]


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
