"""Line charts without a plotting library: values become paths of an inline SVG, drawn by `line_chart.html.jinja`.

Curves live in a square of 1000 units that is stretched to the width of the page; strokes keep their width. Ticks and
legends are HTML beside it. The page's script shows values under the pointer; without scripts the curves stay.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["Level", "LineChart", "Point", "Series", "line_chart", "smooth"]

Point = tuple[float, float]
"""(iteration, value)."""

_MOST_POINTS = 400
_UNIT = 1000  # integers are shorter than fractions


@dataclass(frozen=True)
class Series:
    """One curve; `color` is a number of the page's palette, 0 being grey."""

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


class _Path(NamedTuple):
    d: str
    color: int
    width: float
    opacity: float = 1


class _Tick(NamedTuple):
    share: float
    text: str


@dataclass(frozen=True)
class LineChart:
    """A chart ready to be drawn; positions are shares of the plot, from the left and from above."""

    title: str
    summary: str
    """First and last value of each curve, in words."""
    wide: bool
    unit: str
    curves: Sequence[Series]
    paths: Sequence[_Path]
    levels: Sequence[tuple[Level, int, str]]
    """Level, distance from above, value in words."""
    x_ticks: Sequence[_Tick]
    y_ticks: Sequence[_Tick]
    data: dict[str, object]
    """Values for the page's script, which shows them under the pointer."""


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    levels: Sequence[Level] = (),
    scale: Literal["auto", "linear", "log"] = "auto",
    unit: str = "",
    wide: bool = False,
) -> LineChart | None:
    """Curves over iterations; None when no curve has a finite value.

    `scale="auto"` is logarithmic when all values are positive and span more than a factor of 30.
    """
    curves = [Series(s.name, points, s.color, s.style) for s in series if (points := _thinned(_finite(s.points)))]
    if not curves:
        return None
    levels = [level for level in levels if math.isfinite(level.value)]
    values = [y for s in curves for _, y in s.points] + [level.value for level in levels]
    low, high = min(values), max(values)
    axis = _Axis.fitted(low, high, log=scale == "log" or (scale == "auto" and low > 0 and high / low > 30))
    first, last = min(s.points[0][0] for s in curves), max(s.points[-1][0] for s in curves)

    def x_share(x: float) -> float:
        return (x - first) / (last - first) if last > first else 0.5

    paths = []
    for s in curves:
        spots = [f"{_at(x_share(x))} {_at(axis.from_above(y))}" for x, y in s.points]
        if len(spots) > 1:
            width, opacity = (1.2, 0.3) if s.style == "faint" else (2, 1)
            paths.append(_Path(f"M{'L'.join(spots)}", s.color, width, opacity))
        if s.style == "dots" or len(spots) == 1:
            # A stroke of no length with round ends is a dot that stays round when the square is stretched.
            paths.append(_Path("".join(f"M{spot}h0" for spot in spots), s.color, 7))
    shown = [[s.name, s.color, [[x, float(f"{y:.5g}")] for x, y in s.points]] for s in curves if s.style != "faint"]
    ends = (f"{s.name} from {_short(s.points[0][1])} to {_short(s.points[-1][1])}{unit}" for s in curves)
    return LineChart(
        title=title,
        summary="; ".join(ends),
        wide=wide,
        unit=unit,
        curves=curves,
        paths=paths,
        levels=[(level, _at(axis.from_above(level.value)), _short(level.value)) for level in levels],
        x_ticks=[_Tick(x_share(x), _short(x)) for x in (_ticks(first, last) if last > first else [first])],
        y_ticks=[_Tick(axis.from_above(y), _short(y)) for y in axis.ticks],
        data={"label": "iteration", "unit": unit, "x": [first, last], "series": shown},
    )


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


def _ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round numbers between two values, about `about` of them."""
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
        return cls(low, high, False, _ticks(low, high))

    def from_above(self, value: float) -> float:
        if self.log:
            return 1 - math.log(value / self.low) / math.log(self.high / self.low)
        return 1 - (value - self.low) / (self.high - self.low)


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _thinned(points: list[Point]) -> list[Point]:
    """At most about `_MOST_POINTS` points: neighbours are averaged, the first and the last point are kept."""
    if len(points) <= _MOST_POINTS:
        return points
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    averaged = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
    return [points[0], *averaged[1:-1], points[-1]]


def _at(share: float) -> int:
    return round(_UNIT * share)


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
