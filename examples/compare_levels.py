"""Run one real prompt at every level and print what each costs. ``make demo`` runs this.

It uses nothing but ``tsqp prefill --json``, so it also shows how to script TSQP.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

LEVELS = {
    "open": "linear layers, and norms and SwiGLU between them, on a worker process; all else in the enclave process",
    "verified": "int8 weights and exact integers; every product of the worker's is checked",
    "masked": "the same, and the worker sees uniform random words only",
    "local": "the same engine, all in one process",
    "monolithic": "Hugging Face transformers, all in one process",
}
READS = {"open": "everything", "verified": "everything", "masked": "noise"}
PROMPT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, “and "
    "what is the use of a book,” thought Alice “without pictures or conversations?” So she was considering in her own "
    "mind (as well as she could, for the hot day made her feel very sleepy and stupid), whether the pleasure of making "
    "a daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White"
)


def prefill(level: str) -> dict[str, Any]:
    """Run one level and return the report; end with the command's own message and code if it fails."""
    command = [sys.executable, "-m", "tsqp", "prefill", "--level", level, "--prompt", PROMPT, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def main() -> None:
    """Compare the levels on one prompt."""
    console = Console(highlight=False, width=112)
    reports = {}
    for level, meaning in LEVELS.items():
        console.print(f"[bold]{level}[/]: {meaning}")
        reports[level] = prefill(level)
    baseline = reports["monolithic"]["prefill_s"]
    first = reports["open"]
    table = Table(
        title=f"{first['model']}, prefill of {first['tokens']} tokens, {first['dtype']}, {first['threads']} threads"
    )
    for heading in ("level", "prefill", "tokens/s", "vs monolithic", "moved", "worker reads", "checked", "next token"):
        table.add_column(heading, justify="left" if heading in ("level", "worker reads", "next token") else "right")
    for level, report in reports.items():
        moved = report["bytes_sent"] + report["bytes_received"]
        table.add_row(
            level,
            f"{report['prefill_s'] * 1e3:.0f} ms",
            f"{report['tokens_per_s']:.0f}",
            f"{report['prefill_s'] / baseline:.2f} x",
            f"{moved / 1e6:.0f} MB" if moved else "-",
            READS.get(level, "-"),
            f"{report['verified_rows']} rows" if report["verified_rows"] else "-",
            f"{report['next_tokens'][0]} {report['next_text']!r}",
        )
    console.print(table)
    for level in ("open", "masked"):
        times = [f"{part} {reports[level][f'{part}_s'] * 1e3:.0f} ms" for part in ("enclave", "worker", "wire")]
        console.print(f"Where {level} spent its time: {', '.join(times)}.")
    masked = reports["masked"]
    console.print(
        f"The masks of masked, {masked['mask_rows_used']} rows, were made before it in {masked['mask_fill_s']:.2f} s; "
        "each is used once. Dealers can make them instead."
    )
    agree = len({tuple(report["next_tokens"]) for report in reports.values()}) == 1
    console.print("All predict the same next token." if agree else "[red]The levels disagree on the next token.[/]")
    console.print("What a worker can reconstruct at each level: tsqp audit --html audit.html")
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
