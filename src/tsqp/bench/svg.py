"""Plots as inline SVG, by hand: no script, no font, no colour but the page's own, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

_WIDTH = 760
_BAR, _BAR_STEP = 22, 38
_PER_CHARACTER = 7.2
_RIGHT = 80
_PLOT_HEIGHT = 300
_LEFT, _TOP, _BOTTOM = 64, 14, 42
# A logarithmic axis with fewer decades than this shows the steps between them too.
_FEW_DECADES = 2.0
_NICE = (1, 2, 5)


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of parts laid end to end; ``mark`` is drawn as a line across it, and ``note`` stands behind it."""

    label: str
    parts: Sequence[tuple[str, float]]
    note: str
    mark: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot: its name, and points from left to right."""

    name: str
    points: Sequence[tuple[float, float]] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its title, whether it is logarithmic, how values are written, and where they are, if not anywhere."""

    title: str
    log: bool = False
    write: Callable[[float], str] = lambda value: f"{value:,.4g}"
    ticks: Sequence[float] | None = None


def legend(names: Sequence[str]) -> str:
    """Return what each colour means; the order is that of the colours, and those with an empty name are not used."""
    items = "".join(
        f'<span><span class="dot c{number}"></span>{escape(name)}</span>' for number, name in enumerate(names) if name
    )
    return f'<div class="legend">{items}</div>'


def stacked_bars(bars: Sequence[Bar], names: Sequence[str], title: str) -> str:
    """Draw horizontal bars.

    Args:
        bars: from top to bottom.
        names: of the parts, in the order of their colours.
        title: for those who cannot see it.
    """
    labels = _room([bar.label for bar in bars])
    longest = max((max(sum(value for _, value in bar.parts), bar.mark or 0.0) for bar in bars), default=0.0) or 1.0
    scale = (_WIDTH - labels - _RIGHT) / longest
    drawn = []
    for number, bar in enumerate(bars):
        top, left = number * _BAR_STEP + 8, float(labels)
        drawn.append(f'<text class="lab" x="{labels - 10}" y="{top + 16}" text-anchor="end">{escape(bar.label)}</text>')
        for name, value in bar.parts:
            width = value * scale
            drawn.append(
                f'<rect class="c{names.index(name)}" x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_BAR}">'
                f"<title>{escape(bar.label)}: {escape(name)} {value:.4g}</title></rect>"
            )
            left += width
        if bar.mark is not None:
            at = labels + bar.mark * scale
            drawn.append(f'<path class="mark" d="M{at:.1f} {top - 4}V{top + _BAR + 4}"/>')
            left = max(left, at)
        drawn.append(f'<text class="val" x="{left + 7:.1f}" y="{top + 16}">{escape(bar.note)}</text>')
    return _svg("".join(drawn), len(bars) * _BAR_STEP + 6, title)


def lines(series: Sequence[Line], x: Axis, y: Axis) -> str:
    """Draw lines with a dot at each point; a series without points keeps its colour for the others' sake."""
    xs = [value for line in series for value, _ in line.points]
    ys = [value for line in series for _, value in line.points]
    if not xs:
        return ""
    across, up = _scale(xs, x), _scale(ys, y, padded=True)
    width, height = _WIDTH - _LEFT - 20, _PLOT_HEIGHT - _TOP - _BOTTOM

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return _LEFT + across(point[0]) * width, _TOP + (1 - up(point[1])) * height

    drawn = []
    for value in _ticks(ys, y, padded=True):
        _, top = place((xs[0], value))
        drawn.append(f'<path class="grid" d="M{_LEFT} {top:.1f}H{_WIDTH - 20}"/>')
        drawn.append(f'<text class="tick" x="{_LEFT - 8}" y="{top + 4:.1f}" text-anchor="end">{y.write(value)}</text>')
    for value in _ticks(xs, x):
        left, _ = place((value, ys[0]))
        drawn.append(
            f'<text class="tick" x="{left:.1f}" y="{_PLOT_HEIGHT - 22}" text-anchor="middle">{x.write(value)}</text>'
        )
    for number, line in enumerate(series):
        points = [place(point) for point in line.points]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
        drawn.append(f'<polyline class="line l{number}" points="{path}"/>')
        drawn += [
            f'<circle class="c{number}" cx="{left:.1f}" cy="{top:.1f}" r="4"><title>{escape(line.name)}: '
            f"{x.write(value[0])}, {value[1]:,.4g}</title></circle>"
            for (left, top), value in zip(points, line.points, strict=True)
        ]
    middle = _LEFT + width / 2
    drawn.append(
        f'<text class="axis-title" x="{middle}" y="{_PLOT_HEIGHT - 3}" text-anchor="middle">{escape(x.title)}</text>'
    )
    return _svg("".join(drawn), _PLOT_HEIGHT, f"{y.title} over {x.title}")


def log_bars(bars: Sequence[tuple[str, float, str]], title: str) -> str:
    """Draw one horizontal bar per label, value and note, on a logarithmic scale that begins below the smallest."""
    if not bars:
        return ""
    axis = Axis("", log=True)
    values = [value for _, value, _ in bars]
    low = math.log10(min(values)) - 0.35
    span = max(math.log10(max(values)) - low, 0.5)
    labels = _room([label for label, _, _ in bars])
    width = _WIDTH - labels - _RIGHT - 40
    drawn = []
    height = len(bars) * (_BAR_STEP - 8) + 8
    for value in _ticks(values, axis):
        if math.log10(value) >= low:
            at = labels + (math.log10(value) - low) / span * width
            drawn.append(f'<path class="grid" d="M{at:.1f} 0V{height}"/>')
            drawn.append(f'<text class="tick" x="{at:.1f}" y="{height + 15}" text-anchor="middle">{value:,g}</text>')
    for number, (label, value, note) in enumerate(bars):
        top = number * (_BAR_STEP - 8) + 6
        length = (math.log10(value) - low) / span * width
        drawn.append(f'<text class="lab" x="{labels - 10}" y="{top + 15}" text-anchor="end">{escape(label)}</text>')
        drawn.append(f'<rect class="c0" x="{labels}" y="{top}" width="{length:.1f}" height="20"/>')
        drawn.append(f'<text class="val" x="{labels + length + 7:.1f}" y="{top + 15}">{escape(note)}</text>')
    return _svg("".join(drawn), height + 20, title)


def _room(labels: Sequence[str]) -> int:
    """Return how wide the longest label is, with some space around it."""
    return int(max(map(len, labels), default=0) * _PER_CHARACTER) + 24


def _scale(values: Sequence[float], axis: Axis, *, padded: bool = False) -> Callable[[float], float]:
    """Return what maps values to 0 to 1: logarithms, or from 0 where there is room above."""
    if axis.log:
        low, high = math.log10(min(values)), math.log10(max(values))
        room = 0.08 * max(high - low, 0.3) if padded else 0.0
        low, span = low - room, max(high - low + 2 * room, 1e-9)
        return lambda value: (math.log10(value) - low) / span
    top = max(values) * (1.08 if padded else 1.0) or 1.0
    return lambda value: value / top


def _ticks(values: Sequence[float], axis: Axis, *, padded: bool = False) -> list[float]:
    """Choose round values within the range."""
    if axis.ticks is not None:
        return list(axis.ticks)
    low, high = min(values), max(values)
    if axis.log:
        few = math.log10(high / low) < _FEW_DECADES
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = [step * 10.0**decade for decade in decades for step in (_NICE if few else (1,))]
        return [value for value in every if low * 0.93 <= value <= high * 1.07]
    step = 10.0 ** math.floor(math.log10(high or 1.0))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if (high or 1.0) / (step * part) <= 6)  # noqa: PLR2004
    limit = high * (1.05 if padded else 1.0)
    return [step * number for number in range(int(limit / step) + 1)]


def _svg(body: str, height: float, title: str) -> str:
    return f'<svg class="plot" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">{body}</svg>'
