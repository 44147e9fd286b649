"""Charts of the report as HTML and SVG: they scale to the screen, and their text does not.

Lines and areas are SVG without text, stretched to their frame; bars, dots and all labels are HTML, so that they stay
readable on a phone. Everything that is not ours is escaped. The module knows numbers and names, not profiles.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reelforge.tools.profiling.report_style import colour

_SCALE = 1000.0


def text(value: object) -> str:
    """Return a value as text for HTML."""
    return html.escape(str(value), quote=True)


@dataclass(frozen=True)
class Bar:
    """A bar of a lane or a track: from ``start`` to ``end``, in the chart's unit; ``marked``: seen even if short."""

    start: float
    end: float
    colour: str
    label: str
    title: str
    marked: bool = False


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from ``low`` to ``high``, in the chart's unit."""

    low: float
    high: float
    unit: str
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Return where a value lies, 0 to 1; values outside are put at the border."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return 0.0 if high == low else (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Return about five round values."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1, max(1, (last - first + 1) // 5))]
        return nice_ticks(self.low, self.high)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round values between two limits, at most about ``count``."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Return a number with about three digits, as people write it."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 1:
        return f"{value:.3g}"
    return f"{value:.2g}"


def milliseconds(value: float) -> str:
    """Return a time in the unit that suits it."""
    if value >= 60_000:
        return f"{value / 60_000:.1f} min"
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{number(value)} ms"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Return a legend of (label, colour)."""
    items = "".join(f'<span style="--c:{colour(name)}">{text(label)}</span>' for label, name in entries)
    return f'<div class="legend">{items}</div>'


def lanes(rows: Sequence[tuple[str, Sequence[Bar]]], axis: Axis) -> str:
    """Return rows of bars over a common axis of time."""
    parts = ['<div class="lanes">']
    for name, bars in rows:
        parts.append(f'<div class="small muted">{text(name)}</div><div class="lane">')
        for bar in bars:
            left, width = axis.place(bar.start), axis.place(bar.end) - axis.place(bar.start)
            fits = width > 0.012 * len(bar.label) + 0.01
            kind = "mark" if bar.marked else "" if fits else "thin"
            label = text(bar.label) if not kind else ""
            parts.append(
                f'<i class="{kind}" title="{text(bar.title)}" style="left:{left:.3%};'
                f'width:{width:.3%};background:{colour(bar.colour)}">{label}</i>'
            )
        parts.append("</div>")
    ticks = nice_ticks(axis.low, axis.high, 4)
    marks = ""
    for index, tick in enumerate(ticks):
        # Numbers at the borders stay inside; the unit is said once.
        place, last = axis.place(tick), index == len(ticks) - 1
        side = "start" if index == 0 else "end" if last and place > 0.9 else "middle"
        shown = f"{number(tick)} {text(axis.unit)}" if last else number(tick)
        marks += f'<span class="{side}" style="left:{place:.2%}">{shown}</span>'
    return "".join(parts) + f'<div></div><div class="axis">{marks}</div></div>'


def bar_rows(rows: Sequence[tuple[str, Sequence[Bar], str]], longest: float) -> str:
    """Return named bars, each made of parts that follow each other, with a value at the end."""
    parts = ['<div class="bars">']
    for name, bars, value in rows:
        pieces = "".join(
            f'<i title="{text(bar.title)}" style="width:{(bar.end - bar.start) / longest if longest else 0:.3%};'
            f'background:{colour(bar.colour)}"></i>'
            for bar in bars
        )
        parts.append(
            f'<div class="name small">{text(name)}</div><div class="track">{pieces}</div>'
            f'<div class="value small">{text(value)}</div>'
        )
    return "".join(parts) + "</div>"


@dataclass(frozen=True)
class Line:
    """A line through points, in the chart's units."""

    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 2.0
    dashed: bool = False
    opacity: float = 1.0


@dataclass(frozen=True)
class Area:
    """What lies between two lines with the same abscissas."""

    lower: Sequence[tuple[float, float]]
    upper: Sequence[tuple[float, float]]
    colour: str
    opacity: float = 0.75


@dataclass(frozen=True)
class Dot:
    """A point with a tooltip."""

    x: float
    y: float
    colour: str
    title: str


@dataclass(frozen=True)
class Label:
    """Words that end at a point, above it."""

    x: float
    y: float
    words: str


def plot(
    x: Axis,
    y: Axis,
    shapes: Sequence[Line | Area],
    dots: Sequence[Dot] = (),
    caption: str = "",
    labels: Sequence[Label] = (),
) -> str:
    """Return a chart with axes."""
    drawn = "".join(_area(shape, x, y) if isinstance(shape, Area) else _line(shape, x, y) for shape in shapes)
    grid = "".join(
        f'<line x1="0" x2="{_SCALE:.0f}" y1="{_up(y.place(tick)):.1f}" y2="{_up(y.place(tick)):.1f}" '
        f'stroke="var(--line)" stroke-width="1"/>'
        for tick in y.ticks()
    )
    marks = "".join(_dot(dot, x, y) for dot in dots) + "".join(_label(label, x, y) for label in labels)
    down = "".join(f'<span style="bottom:{y.place(tick):.2%}">{number(tick)}</span>' for tick in y.ticks())
    across = "".join(f'<span style="left:{x.place(tick):.2%}">{number(tick)}</span>' for tick in x.ticks())
    words = f"{x.unit.capitalize()}. {caption}"
    return (
        f'<figure><div class="plot" role="img" aria-label="{text(caption)}">'
        f'<div class="unit">{text(y.unit)}</div><div class="y">{down}</div>'
        f'<div class="frame"><svg viewBox="0 0 {_SCALE:.0f} {_SCALE:.0f}" preserveAspectRatio="none" '
        f'aria-hidden="true">{grid}{drawn}</svg>{marks}</div>'
        f'<div class="x">{across}</div></div><figcaption>{text(words)}</figcaption></figure>'
    )


def _up(place: float) -> float:
    return _SCALE * (1 - place)


def _path(points: Iterable[tuple[float, float]], x: Axis, y: Axis) -> str:
    return " L".join(f"{_SCALE * x.place(across):.1f} {_up(y.place(up)):.1f}" for across, up in points)


def _line(line: Line, x: Axis, y: Axis) -> str:
    dashes = ' stroke-dasharray="6 5"' if line.dashed else ""
    return (
        f'<path d="M{_path(line.points, x, y)}" stroke="{colour(line.colour)}" stroke-width="{line.width}" '
        f'stroke-linejoin="round" opacity="{line.opacity}"{dashes}/>'
    )


def _area(area: Area, x: Axis, y: Axis) -> str:
    outline = _path([*area.upper, *reversed(area.lower)], x, y)
    return f'<path d="M{outline} Z" style="fill:{colour(area.colour)}" opacity="{area.opacity}"/>'


def _dot(dot: Dot, x: Axis, y: Axis) -> str:
    left, bottom = x.place(dot.x), y.place(dot.y)
    place = f"left:{left:.2%};bottom:{bottom:.2%}"
    return f'<span class="dot" title="{text(dot.title)}" style="{place};background:{colour(dot.colour)}"></span>'


def _label(label: Label, x: Axis, y: Axis) -> str:
    right, bottom = 1 - x.place(label.x), y.place(label.y)
    return f'<span class="tag" style="right:{right:.2%};bottom:{bottom:.2%}">{text(label.words)}</span>'
