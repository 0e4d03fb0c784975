"""Line and bar charts as small pieces of HTML with inline SVG, without a plotting library.

Curves live in a unit square that is stretched to the width of the page; strokes keep their width. Ticks and legends are
HTML beside it. Values under the pointer come from data that the page's script reads; without a script the curves stay.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

__all__ = ["Bar", "Level", "Point", "Series", "bar_chart", "line_chart", "smooth", "ticks"]

Point = tuple[float, float]
"""(iteration, value)."""

_MOST_POINTS = 400
_UNIT = 1000  # size of the drawing square; integers are shorter than fractions


@dataclass(frozen=True)
class Series:
    """One curve; `color` is a number of the theme's palette, 0 being grey."""

    name: str
    points: Sequence[Point]
    color: int = 1
    style: Literal["line", "faint", "dots"] = "line"


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line to compare with."""

    name: str
    value: float
    color: int = 0


@dataclass(frozen=True)
class Bar:
    """One bar of a chart in per cent."""

    name: str
    value: float
    color: int = 0


def bar_chart(bars: Sequence[Bar]) -> str:
    """Horizontal bars on a scale from 0 to 100 per cent."""
    lines = []
    for bar in bars:
        width = min(max(bar.value, 0.0), 100.0)
        lines.append(
            f'<span>{escape(bar.name)}</span><div class="track"><div class="fill" style="width:{width:.2f}%;'
            f'background:var(--c{bar.color})"></div></div><span class="value">{bar.value:.1f} %</span>'
        )
    return f'<div class="bars">{"".join(lines)}</div>'


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    levels: Sequence[Level] = (),
    scale: Literal["auto", "linear", "log"] = "auto",
    unit: str = "",
    wide: bool = False,
) -> str:
    """A card with curves over iterations, or "" when no curve has a finite value.

    `scale="auto"` is logarithmic when all values are positive and span more than a factor of 30.
    """
    curves = [
        Series(s.name, points, s.color, s.style)
        for s in series
        if (points := _thinned(_finite(s.points), _MOST_POINTS))
    ]
    if not curves:
        return ""
    levels = [level for level in levels if math.isfinite(level.value)]
    values = [y for s in curves for _, y in s.points] + [level.value for level in levels]
    low, high = min(values), max(values)
    log = scale == "log" or (scale == "auto" and low > 0 and high / low > 30)
    axis = _Axis.fitted(low, high, log=log)
    first, last = min(s.points[0][0] for s in curves), max(s.points[-1][0] for s in curves)

    def x_of(x: float) -> float:
        return (x - first) / (last - first) if last > first else 0.5

    grid = "".join(f"M0 {_at(1 - axis.share(tick))}H{_UNIT}" for tick in axis.ticks)
    paths = [f'<path d="{grid}" stroke="var(--grid)" stroke-width="1"/>']
    paths += [
        f'<path d="M0 {_at(1 - axis.share(level.value))}H{_UNIT}" stroke="var(--c{level.color})" stroke-width="1.5" '
        f'stroke-dasharray="5 5" stroke-linecap="butt"/>'
        for level in levels
    ]
    for s in curves:
        spots = [f"{_at(x_of(x))} {_at(1 - axis.share(y))}" for x, y in s.points]
        if s.style != "dots" and len(spots) > 1:
            width, opacity = (1.2, 0.3) if s.style == "faint" else (2, 1)
            paths.append(
                f'<path d="M{"L".join(spots)}" stroke="var(--c{s.color})" stroke-width="{width}" opacity="{opacity}"/>'
            )
        if s.style == "dots" or len(spots) == 1:
            if len(spots) > 1:
                paths.append(f'<path d="M{"L".join(spots)}" stroke="var(--c{s.color})" stroke-width="2"/>')
            # A stroke of no length with round ends is a dot that stays round when the square is stretched.
            dots = "".join(f"M{spot}h0" for spot in spots)
            paths.append(f'<path d="{dots}" stroke="var(--c{s.color})" stroke-width="7"/>')

    y_labels = "".join(
        f'<span style="top:{100 * (1 - axis.share(tick)):.1f}%">{_short(tick)}</span>' for tick in axis.ticks
    )
    x_ticks = ticks(first, last, about=5) if last > first else [first]
    x_labels = "".join(
        f'<span style="left:{100 * x_of(tick):.1f}%"{_edge(x_of(tick))}>{_short(tick)}</span>' for tick in x_ticks
    )
    data = {
        "label": "iteration",
        "unit": unit,
        "x": [first, last],
        "series": [[s.name, s.color, [[x, _rounded(y)] for x, y in s.points]] for s in curves if s.style != "faint"],
    }
    ends = "; ".join(f"{s.name} from {_short(s.points[0][1])} to {_short(s.points[-1][1])}{unit}" for s in curves)
    legend = _legend(curves, levels, unit) if len(curves) + len(levels) > 1 else ""
    return (
        f'<figure class="card{" wide" if wide else ""}"><figcaption><h3>{escape(title)}</h3>{legend}</figcaption>'
        f'<div class="frame"><div class="ys">{y_labels}</div>'
        f'<div class="plot" data-plot="{escape(json.dumps(data, separators=(",", ":")))}">'
        f'<svg viewBox="0 0 {_UNIT} {_UNIT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"{title}: {ends}")}">{"".join(paths)}</svg>'
        f'<div class="cursor"></div><div class="tip"></div></div><div class="xs">{x_labels}</div></div></figure>'
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    """Points whose value is a finite number."""
    return [(x, y) for x, y in points if math.isfinite(y)]


def _thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` points: neighbours are averaged, the last point is kept."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    averaged = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
    return [points[0], *averaged[1:-1], points[-1]]


def smooth(points: Sequence[Point], *, span: int | None = None) -> list[Point]:
    """Mean over about `span` points around each (default: a fifteenth of all), in a window that shrinks at the ends.

    The window is symmetric, so a falling curve is not lifted as a running average of the past would lift it.
    """
    points = _finite(points)
    half = max(1, len(points) // 15 if span is None else span) // 2
    sums = list(itertools.accumulate((y for _, y in points), initial=0.0))
    averaged = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        averaged.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return averaged


def ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round numbers between two values, about as many as asked for."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    ticks: list[float]

    @classmethod
    def fitted(cls, low: float, high: float, *, log: bool) -> "_Axis":
        if log:
            margin = (high / low) ** 0.05
            low, high = low / margin, high * margin
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            steps = (1,) if len(decades) > 4 else (1, 3) if len(decades) > 3 else (1, 2, 5)
            marks = [m * 10.0**d for d in decades for m in steps]
            return cls(low, high, True, [mark for mark in marks if low <= mark <= high])
        if high == low:
            pad = abs(low) * 0.1 or 1.0
            low, high = low - pad, high + pad
        margin = 0.05 * (high - low)
        low, high = (0.0 if 0 <= low < margin else low - margin), high + margin
        return cls(low, high, False, ticks(low, high, about=5))

    def share(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _legend(curves: Sequence[Series], levels: Sequence[Level], unit: str) -> str:
    items = [
        f'<li><i{" class=faint" if s.style == "faint" else ""} style="background:var(--c{s.color})"></i>'
        f"{escape(s.name)}</li>"
        for s in curves
    ]
    items += [
        f'<li><i class="dashed" style="border-color:var(--c{level.color})"></i>'
        f"{escape(level.name)} {_short(level.value)}{escape(unit)}</li>"
        for level in levels
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _edge(share: float) -> str:
    return ' class="first"' if share < 0.03 else ' class="last"' if share > 0.97 else ""


def _at(share: float) -> int:
    return round(_UNIT * share)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _short(value: float) -> str:
    """A number for an axis: 0.05, 12k, 3e-6."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size >= 1e-3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
