"""Rewrite table and picture of both READMEs from the newest benchmarks/results/prefill-*.json: `make readme`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import msgspec

from tsqp.measurements import BenchReport, Variant

mpl.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "prefill.svg"
BLOCK = re.compile(r"(<!-- table:prefill -->\n).*?(<!-- /table -->)", re.DOTALL)
SHOWN = (
    "open",
    "open-ipc",
    "verified",
    "masked",
    "masked-sustained",
    "masked-dealer-sustained",
    "local",
    "local-int8",
    "monolithic",
    "legacy",
    "legacy-matmul",
)
MEANING = {
    "README.md": {
        "head": ("", "time", "/ monolithic", "round trips", "KB per token"),
        "open": "`open`: split, worker over shared memory",
        "open-ipc": "`open`: split, worker over ipc",
        "verified": "`verified`: int8, every product checked, over shared memory",
        "masked": "`masked`: the same, and the worker sees uniform words; masks ready",
        "masked-sustained": "`masked`, the enclave making its masks meanwhile",
        "masked-dealer-sustained": "`masked`, masks from a dealer meanwhile (on the same two cores)",
        "local": "`local`: same engine, one process",
        "local-int8": "`local` over the packed int8 model",
        "monolithic": "`monolithic`: transformers",
        "legacy": "first published client, same worker",
        "legacy-matmul": "the same with its attention products on the worker",
        "note": "Prefill of {tokens} tokens, {dtype}, bundled model; {cpu}, {cores} cores shared by all processes, "
        "{threads} threads each; medians of {rounds} turns in one run (`{command}`, {date}).",
    },
    "README.zh-CN.md": {
        "head": ("", "时间", "/ monolithic", "往返次数", "每 token KB"),
        "open": "`open`：拆分，worker 走共享内存",
        "open-ipc": "`open`：拆分，worker 走 ipc",
        "verified": "`verified`：int8，逐行校验每个乘积，走共享内存",
        "masked": "`masked`：同上，且 worker 只看到均匀随机字；掩码已备好",
        "masked-sustained": "`masked`，飞地同时自行计算掩码",
        "masked-dealer-sustained": "`masked`，掩码由 dealer 同时提供（同一台机器的两个核）",
        "local": "`local`：同一引擎，单进程",
        "local-int8": "`local`，使用打包的 int8 模型",
        "monolithic": "`monolithic`：transformers",
        "legacy": "最早发布的客户端，同一 worker",
        "legacy-matmul": "同上，注意力乘法也在 worker 上",
        "note": "预填充 {tokens} 个 token，{dtype}，自带模型；{cpu}，所有进程共用 {cores} 核，每进程 {threads} 线程；"
        "同一次运行中 {rounds} 轮的中位数（`{command}`，{date}）。",
    },
}


def newest(results: Path = ROOT / "benchmarks" / "results") -> BenchReport:
    """Read the newest result of 128 tokens, ``prefill-DATE.json``; those of others are ``prefill-TOKENS-DATE.json``."""
    files = sorted(results.glob("prefill-[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9].json"))
    return msgspec.json.decode(files[-1].read_bytes(), type=BenchReport)


def shown_variants(report: BenchReport) -> dict[str, Variant]:
    """Return the rows of the table; the baseline is the better of transformers' two OpenMP settings."""
    by_name = {variant.name: variant for variant in report.variants}
    both = (by_name["monolithic-active"], by_name["monolithic-passive"])
    by_name["monolithic"] = min(both, key=lambda variant: variant.median_s)
    return {name: by_name[name] for name in SHOWN}


def table(report: BenchReport, words: Mapping[str, Sequence[str]]) -> str:
    """Return the table in Markdown."""
    variants = shown_variants(report)
    baseline_s = variants["monolithic"].median_s
    rows: list[Sequence[object]] = [words["head"], ("---", "---:", "---:", "---:", "---:")]
    for name, variant in variants.items():
        trips, moved = (
            (str(variant.round_trips), f"{variant.bytes_per_token / 1e3:.0f}") if variant.round_trips else ("", "")
        )
        ratio = f"{variant.median_s / baseline_s:.2f}"
        rows.append((words[name], f"{variant.median_s * 1e3:.0f} ms", ratio, trips, moved))
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    machine = report.hardware
    note = str(words["note"]).format(
        cpu=machine.cpu,
        cores=machine.cores,
        tokens=report.tokens,
        dtype=report.dtype,
        threads=report.threads,
        rounds=report.rounds,
        command=report.command,
        date=report.date,
    )
    return "\n".join([*lines, "", note, ""])


def draw(report: BenchReport) -> None:
    """Draw time by part, one bar per row of the table."""
    variants = shown_variants(report)
    plt.rcParams.update({"svg.hashsalt": "tsqp", "font.size": 11, "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(7.6, 4.6))
    names = list(reversed(variants))
    for name in names:
        variant = variants[name]
        if variant.worker_s:
            # Of the worker's part what the enclave waited for; what it computed meanwhile is in the enclave's.
            worker_s = min(variant.worker_s, variant.waited_s or variant.worker_s)
            parts = [("enclave", variant.enclave_s), ("worker", worker_s), ("wire", variant.wire_s)]
        else:
            parts = [("all parts", variant.median_s)]
        left = 0.0
        for part, seconds in parts:
            axes.barh(name, seconds * 1e3, left=left, color=COLOURS[part], label=part, height=0.62)
            left += seconds * 1e3
        axes.text(left + 5, names.index(name), f"{variant.median_s * 1e3:.0f} ms", va="center")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    order = [part for part in COLOURS if part in unique]
    axes.legend([unique[part] for part in order], order, loc="upper right", frameon=False)
    axes.set_xlabel(f"prefill of {report.tokens} tokens, milliseconds (median)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.margins(x=0.12)
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None}, facecolor="white")


COLOURS = {"enclave": "#33638d", "worker": "#c98b1b", "wire": "#8a8a8a", "all parts": "#6aa27f"}


def main() -> None:
    """Rewrite both READMEs and the picture."""
    report = newest()
    for name, words in MEANING.items():
        file = ROOT / name
        text = file.read_text(encoding="utf-8")
        block = table(report, words)
        file.write_text(BLOCK.sub(lambda match, block=block: match[1] + block + match[2], text), encoding="utf-8")  # type: ignore[misc]
    draw(report)


if __name__ == "__main__":
    main()
