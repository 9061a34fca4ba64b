"""What pages of ``tsqp bench`` are put together from. Every text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def section(title: str, text: str, *parts: str) -> str:
    """Return a card with a heading and a sentence above it."""
    return f'<h2>{escape(title)}</h2><p class="soft">{escape(text)}</p><div class="card">{"".join(parts)}</div>'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Return a table; all columns but the first ``words`` hold numbers."""

    def cells(kind: str, texts: Sequence[str]) -> str:
        return "".join(
            f"<{kind}{' class=n' if place >= words else ''}>{escape(text)}</{kind}>" for place, text in enumerate(texts)
        )

    head = cells("th", headings)
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def ms(seconds: float) -> str:
    """Write seconds as milliseconds."""
    return f"{seconds * 1e3:.1f}"
