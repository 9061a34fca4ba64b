"""One report of each command of ``tsqp bench``, with text that must be escaped."""

from __future__ import annotations

from typing import Any

from tsqp.measurements import (
    BenchReport,
    DecodePoint,
    DecodeReport,
    Floor,
    Hardware,
    LevelsReport,
    Measurement,
    OverlapPoint,
    OverlapReport,
    Ratio,
    ScalingPoint,
    ScalingReport,
    StepParts,
    TransportPoint,
    TransportReport,
    TransportRow,
    Variant,
)

HEADING: dict[str, Any] = {
    "date": "2026-11-23",
    "commit": "abc",
    "command": "tsqp bench <b>",
    "hardware": Hardware(cpu="<b>CPU", cores=2, memory_gb=8.0, torch="2", python="3.11"),
    "ratios": [
        Ratio(name="one", value=0.9, limit="at most 1", ok=True),
        Ratio(name="two", value=1.9, limit="at most 1", ok=False),
        Ratio(name="three", value=3.0, limit="", ok=None),
    ],
}
MODEL: dict[str, Any] = {"model": "smol<b>", "dtype": "float32", "threads": 2, "warm_up": 2, "rounds": 3}
FLOOR = Floor(
    worker_s=0.05,
    wire_s=0.01,
    enclave_s=0.04,
    rest_s=0.02,
    quantise_s=0.01,
    mask_s=0.0,
    ahead_s=0.0,
    check_s=0.01,
    overlapped_s=0.05,
    serial_s=0.1,
)


def variant(name: str, *, split: bool = True) -> Variant:
    """One variant, in one process or with a worker."""
    return Variant(
        name=name,
        settings="as it is",
        median_s=0.2,
        p10_s=0.18,
        p90_s=0.22,
        p95_s=0.25,
        all_s=[0.2],
        bytes_per_token=9e5 if split else 0,
        round_trips=122 if split else 0,
        enclave_s=0.08 if split else 0.2,
        waited_s=0.12 if split else 0.0,
        worker_s=0.09 if split else 0.0,
        wire_s=0.03 if split else 0.0,
        protection_s=0.03,
        quantise_s=0.01,
        check_s=0.02,
        peak_bytes=10**8,
        floor=FLOOR if split else None,
    )


def scaling(level: str, tokens: int, batch: int) -> ScalingPoint:
    """One point, without bytes where there is no link."""
    linked = level in ("open", "masked")
    return ScalingPoint(
        level=level,
        tokens=tokens,
        batch=batch,
        median_s=0.001 * tokens * batch,
        p10_s=0.001,
        p90_s=0.1,
        tokens_per_s=1000.0,
        bytes_per_token=8e5 * linked,
        round_trips=122 * linked,
        micro_batches=2,
        masks_ready=tokens < 64,
    )


def decoding(name: str, batch: int, tokens_per_s: float) -> DecodePoint:
    """One variant of generation, with bytes where there is a link."""
    masked = name.startswith("masked")
    step_s = batch / tokens_per_s
    return DecodePoint(
        name=name,
        settings="as it <b>is",
        level="masked" if masked else name,
        masks="ready" if name == "masked" else "made within" if masked else "",
        batch=batch,
        tokens_per_s=tokens_per_s,
        median_s=step_s,
        p10_s=0.9 * step_s,
        p90_s=1.1 * step_s,
        p95_s=1.2 * step_s,
        all_s=[step_s],
        bytes_per_token=1e6 * (masked or name == "open"),
        mask_wait_s=0.01 * (name == "masked-sustained"),
        mask_fill_s=0.0,
    )


def step_parts(name: str, sampling: str = "greedy", overhead_s: float = 0.0025) -> StepParts:
    """A step of 16 requests whose parts add up."""
    return StepParts(
        name=name,
        sampling=sampling,
        batch=16,
        step_s=0.04 + overhead_s,
        products_s=0.035,
        worker_s=0.025,
        wire_s=0.004,
        attention_s=0.005,
        between_s=overhead_s - 0.001,
        sampling_s=0.0006,
        scheduling_s=0.0004,
        overhead_s=overhead_s,
        all_overhead_s=[overhead_s],
    )


VARIANTS = [variant("local", split=False), variant("open"), variant("masked")]
LEVELS = ("open", "masked", "local", "monolithic")
REPORTS: tuple[Measurement, ...] = (
    BenchReport(**HEADING, **MODEL, tokens=128, variants=VARIANTS),
    LevelsReport(**HEADING, **MODEL, tokens=128, variants=VARIANTS, copy_bytes_per_s=1e10, round_trip_s=5e-5),
    ScalingReport(
        **HEADING,
        **MODEL,
        mask_pool=64,
        batch_tokens=16,
        lengths=[scaling(level, tokens, 1) for tokens in (16, 64) for level in LEVELS],
        batches=[scaling(level, 16, batch) for batch in (1, 8) for level in LEVELS],
    ),
    OverlapReport(
        **HEADING,
        **MODEL,
        level="open",
        tokens=512,
        batch=1,
        points=[
            OverlapPoint(
                delay_ms=delay,
                micro_batches=count,
                median_s=0.3 + delay / 10 / count,
                p10_s=0.2,
                p90_s=0.4,
                enclave_s=0.1,
                waited_s=0.2,
                worker_s=0.2,
                hidden=0.8 if delay and count > 1 else None,
                times_undelayed=1.1,
            )
            for delay in (0.0, 1.0)
            for count in (1, 2)
        ],
    ),
    DecodeReport(
        **HEADING,
        **MODEL,
        prompt_tokens=32,
        tokens=64,
        mask_pool=1536,
        mask_pool_bytes=10**9,
        points=[
            decoding(name, batch, rate * batch**0.7)
            for name, rate in (
                ("transformers-active", 20.0),
                ("local", 40.0),
                ("open", 30.0),
                ("masked-sustained", 9.0),
            )
            for batch in (1, 16)
        ],
        steps=[step_parts("local"), step_parts("open"), step_parts("open", "top-p 0.9", 0.004)],
    ),
    TransportReport(
        **HEADING,
        rounds=3,
        rows=[
            TransportRow(
                name="tcp",
                settings="ZeroMQ <b>",
                points=[
                    TransportPoint(bytes=size, median_s=size * 1e-9, p10_s=size * 8e-10, p90_s=size * 2e-9)
                    for size in (4096, 128 * 3072 * 4, 8 << 20)
                ],
            ),
            TransportRow(name="gRPC", settings="protobuf", points=[], missing="needs grpcio"),
        ],
    ),
)
