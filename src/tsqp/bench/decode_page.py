"""The part of the page that is about ``tsqp bench decode``: tokens per second by batch, and a step by part."""

from __future__ import annotations

from tsqp.bench.page_parts import ms, section, table
from tsqp.bench.svg import Axis, Bar, Line, legend, lines, stacked_bars
from tsqp.measurements import DecodePoint, DecodeReport, StepParts

# In the order of their colours, so that worker and wire have the same ones on every page.
PARTS = ("products: enclave", "worker", "wire", "attention", "between products", "sampling", "scheduling")


def sections(report: DecodeReport) -> list[str]:
    """Return the sections of the page."""
    names = list(dict.fromkeys(point.name for point in report.points))
    series = [
        Line(name, [(point.batch, point.tokens_per_s) for point in report.points if point.name == name])
        for name in names
    ]
    batches = list(dict.fromkeys(point.batch for point in report.points))
    x = Axis("requests at once", log=True, write=lambda value: f"{value:g}", ticks=batches)
    settings = {point.name: point.settings for point in report.points}
    bars = [Bar(f"{step.name}, {step.sampling}", parts(step), f"{ms(step.step_s)} ms") for step in report.steps]
    return [
        section(
            "Tokens per second over requests at once",
            f"All requests together, each with a prompt of {report.prompt_tokens} tokens and an answer of "
            f"{report.tokens}; both axes are logarithmic.",
            lines(series, x, Axis("tokens per second", log=True)),
            legend(names),
        ),
        section(
            f"A step of {report.steps[0].batch} requests, by part",
            "Milliseconds. Of the worker's part only what the enclave waited for is shown. The overhead is what is "
            "neither products nor attention: norms, rotary and SwiGLU, which at open the worker computes but for the "
            "first norm and rotary, sampling, and scheduling.",
            stacked_bars(bars, PARTS, "time by part"),
            legend(PARTS),
            table(
                ("step", "overhead, median", *PARTS),
                list(map(_in_numbers, report.steps)),
            ),
        ),
        section(
            "Every variant",
            _masks(report),
            table(_HEADINGS, [_row(point) for point in report.points], words=2),
            table(("variant", "settings"), list(settings.items()), words=2),
        ),
    ]


def parts(step: StepParts) -> list[tuple[str, float]]:
    """Return a step's parts, in milliseconds; they add up to its time."""
    seconds = (
        step.products_s - step.worker_s - step.wire_s,
        step.worker_s,
        step.wire_s,
        step.attention_s,
        step.between_s,
        step.sampling_s,
        step.scheduling_s,
    )
    return [(name, max(0.0, value) * 1e3) for name, value in zip(PARTS, seconds, strict=True)]


def _in_numbers(step: StepParts) -> list[str]:
    inner = (f"{value:.2f}" for _, value in parts(step))
    return [f"{step.name}, {step.sampling}", f"{step.overhead_s * 1e3:.2f}", *inner]


def _masks(report: DecodeReport) -> str:
    return (
        f"Medians of all runs. Where masks were ready, the pool held those of {report.mask_pool} tokens, prompts and a "
        f"row of the head for each included: at most {report.mask_pool_bytes / 1e6:,.0f} MB. Where they were made "
        "within, the pool was the engine's own, filled as it always is. The last columns are what a step waited for "
        "masks and what went into filling meanwhile."
    )


_MASK_HEADINGS = ("waiting for masks", "filling")
_HEADINGS = ("variant", "masks", "requests", "tokens/s", "a step, ms", "p10 to p90", "p95", "KB/token", *_MASK_HEADINGS)


def _row(point: DecodePoint) -> list[str]:
    return [
        point.name,
        point.masks,
        str(point.batch),
        f"{point.tokens_per_s:.1f}",
        ms(point.median_s),
        f"{ms(point.p10_s)} to {ms(point.p90_s)}",
        ms(point.p95_s),
        f"{point.bytes_per_token / 1e3:.0f}" if point.bytes_per_token else "",
        *(map(ms, (point.mask_wait_s, point.mask_fill_s)) if point.masks else ("", "")),
    ]
