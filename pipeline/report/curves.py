"""Curves as SVG: a line, and a band where there are intervals, for each model, with its name at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from pipeline.report.text import significant

WIDTH, HEIGHT, LEFT, BOTTOM = 340, 180, 44, 20
NAMES_WIDTH = 90
"""Room for names right of the curves."""
LOG_SPAN = 30.0
"""Ratio of values above which their axis is logarithmic."""
STYLES = 8
NAME_DISTANCE = 11.0
"""Least distance of two names, one above the other."""


@dataclass(frozen=True)
class Curve:
    """A line, with a band where ``low`` and ``high`` are finite; gaps where there is no value.

    ``style`` numbers its colour; −1 is that of the reference.
    """

    name: str
    style: int
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Chart:
    """Some curves, drawn; ``logarithmic`` says how the axis of values is."""

    svg: Markup
    logarithmic: bool


def draw_curves(
    curves: Sequence[Curve], label: str, x_name: str, *, x_logarithmic: bool = False, y_floor: float = 0.0
) -> Chart:
    """Draw curves over a common axis.

    Parameters
    ----------
    curves : sequence of Curve
    label : str
        Says what is drawn, to those who don't see it.
    x_name : str
        Name of the quantity along x, such as ``t``.
    x_logarithmic : bool
        For positive x.
    y_floor : float
        Values below this share of the largest are left out of a logarithmic axis.
    """
    values = np.concatenate([np.empty(0), *(curve.y for curve in curves)])
    finite = values[np.isfinite(values)]
    if not len(finite):
        return Chart(Markup("<svg></svg>"), False)
    positive = finite[finite > max(0.0, y_floor * finite.max())]
    logarithmic = len(positive) > 0 and finite.min() >= 0 and positive.max() > LOG_SPAN * positive.min()
    low, high = (positive.min(), positive.max()) if logarithmic else (min(0.0, finite.min()), finite.max())
    xs = np.concatenate([curve.x for curve in curves])
    axes = _Axes(
        float(low), float(high), logarithmic, float(np.nanmin(xs)), float(np.nanmax(xs)), x_logarithmic
    )
    lines = "".join(_draw_line(curve, axes) for curve in curves)
    svg = (
        f'<svg class="lines" viewBox="0 0 {WIDTH + NAMES_WIDTH} {HEIGHT + BOTTOM}" role="img" '
        f'aria-label="{escape(label)}">{axes.draw(x_name)}{lines}{_draw_names(curves, axes)}</svg>'
    )
    return Chart(Markup(svg), bool(logarithmic))


@dataclass(frozen=True)
class _Axes:
    """Axes of a chart, and places on them."""

    low: float
    high: float
    logarithmic: bool
    first: float
    last: float
    x_logarithmic: bool

    def x(self, value: float) -> float:
        first, last = self.first, self.last
        if self.x_logarithmic:
            first, last, value = math.log(first), math.log(last), math.log(value)
        return LEFT + (WIDTH - LEFT) * (value - first) / ((last - first) or 1.0)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return 8 + (HEIGHT - 8) * (1 - (value - low) / ((high - low) or 1.0))

    def shows(self, value: float) -> bool:
        """Tell whether there is a value, and a place for it."""
        return math.isfinite(value) and (value >= self.low or not self.logarithmic)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            step = max(1, (last - first) // 3)
            decades = [10.0**k for k in range(first, last + 1, step)]
            return decades if len(decades) > 1 else [self.low, self.high]
        return np.linspace(self.low, self.high, 3).tolist()

    def draw(self, x_name: str) -> str:
        lines = [
            f'<path class="axis" d="M{LEFT} 8V{HEIGHT}H{WIDTH}"/>',
            f'<text x="{LEFT}" y="{HEIGHT + 14}">{escape(x_name)} = {significant(self.first)}</text>',
            f'<text x="{WIDTH}" y="{HEIGHT + 14}" text-anchor="end">{significant(self.last)}</text>',
        ]
        for tick in self.ticks():
            lines.append(
                f'<text x="{LEFT - 4}" y="{self.y(tick) + 3:.1f}" text-anchor="end">{tick:.2g}</text>'
                f'<path class="grid" d="M{LEFT} {self.y(tick):.1f}H{WIDTH}"/>'
            )
        return "".join(lines)


def _style(curve: Curve) -> str:
    return "truth" if curve.style < 0 else f"m{curve.style % STYLES}"


def _draw_line(curve: Curve, axes: _Axes) -> str:
    """Draw a curve's band and line."""
    columns = (column.tolist() for column in (curve.x, curve.y, curve.low, curve.high))
    points = [(axes.x(x), *values) for x, *values in zip(*columns, strict=True) if axes.shows(values[0])]
    if not points:
        return ""
    line = " ".join(f"{x:.1f},{axes.y(y):.1f}" for x, y, _, _ in points)
    banded = [(x, low, high) for x, _, low, high in points if math.isfinite(low) and math.isfinite(high)]
    upper = [f"{x:.1f},{axes.y(high):.1f}" for x, _, high in banded]
    lower = [f"{x:.1f},{axes.y(low):.1f}" for x, low, _ in reversed(banded)]
    band = f'<polygon class="band" points="{" ".join([*upper, *lower])}"/>' if len(banded) > 1 else ""
    return f'<g class="{_style(curve)}">{band}<polyline points="{line}"/></g>'


def _draw_names(curves: Sequence[Curve], axes: _Axes) -> str:
    """Write each curve's name at its end, none upon another."""
    ends = []
    for curve in curves:
        shown = [place for place, value in enumerate(curve.y.tolist()) if axes.shows(value)]
        if shown:
            x, y = axes.x(float(curve.x[shown[-1]])), axes.y(float(curve.y[shown[-1]])) + 3
            ends.append((y, x, curve))
    ends.sort(key=lambda end: end[0])
    heights = [y for y, _, _ in ends]
    for place in range(1, len(heights)):
        heights[place] = max(heights[place], heights[place - 1] + NAME_DISTANCE)
    lowest = HEIGHT + 3.0
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], lowest)
        lowest = heights[place] - NAME_DISTANCE
    return "".join(
        f'<g class="{_style(curve)}"><text x="{x + 4:.1f}" y="{height:.1f}">{escape(curve.name)}</text></g>'
        for height, (_, x, curve) in zip(heights, ends, strict=True)
    )
