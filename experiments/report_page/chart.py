"""One chart of a report: a measure of several runs against epochs, as SVG inside HTML.

Colours and dashes are classes (c0 …, d0 …), so that the page chooses them for light and dark.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from experiments.report_page.markup import Markup, element

WIDTH, HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 36
_MARKED, DRAWN = 40, 400  # points up to which each has a mark; from which some are left out
COLOURS, DASHES = 6, 4


class Curve(NamedTuple):
    """The points of one run, and the number that chooses its colour and dashes."""

    label: str
    style: int
    points: Sequence[tuple[float, float]]


class _Scale(NamedTuple):
    """Where values lie between 0 and 1, and which of them are written."""

    place: Callable[[float], float]
    ticks: list[float]


def chart(curves: Sequence[Curve], *, across: str, measure: str) -> Markup:
    """Draws the curves over each other.

    Args:
      curves: One or more, of one or more points each.
      across: What the first number of a point is.
      measure: What the second one is.
    """
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    xs = _linear([x for curve in curves for x, _ in curve.points])
    ys = _scale([y for curve in curves for _, y in curve.points])
    parts = []
    for tick in ys.ticks:
        y = _up(ys, tick)
        parts.append(element("line", x1=_LEFT, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(element("text", f"{tick:g}", x=_LEFT - 6, y=y, dy="0.35em", class_="end"))
    for tick in xs.ticks:
        x = _along(xs, tick)
        parts.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(element("text", f"{tick:g}", x=x, y=bottom + 16))
    parts.append(element("line", x1=_LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(element("text", across, x=(_LEFT + right) // 2, y=HEIGHT - 4))
    parts += [_line(curve, xs, ys) for curve in curves]
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{measure} against {across}, {len(curves)} curves",
    )


def swatch(style: int) -> Markup:
    """A short piece of a curve, for a legend."""
    line = element("line", x1=0, x2=28, y1=5, y2=5, class_=_classes(style))
    return element("svg", line, viewBox="0 0 28 10", class_="swatch", aria_hidden="true")


def _line(curve: Curve, xs: _Scale, ys: _Scale) -> Markup:
    every = math.ceil(len(curve.points) / DRAWN)
    points = [*curve.points[:-1:every], curve.points[-1]]
    places = [(_along(xs, x), _up(ys, y)) for x, y in points]
    shown = [element("polyline", points=" ".join(map(",".join, places)))]
    if len(points) <= _MARKED:
        shown += [element("circle", cx=x, cy=y, r=2) for x, y in places]
    return element("g", element("title", curve.label), *shown, class_=_classes(curve.style))


def _along(scale: _Scale, x: float) -> str:
    return f"{_LEFT + scale.place(x) * (WIDTH - _LEFT - _RIGHT):.1f}"


def _up(scale: _Scale, y: float) -> str:
    return f"{HEIGHT - _BOTTOM - scale.place(y) * (HEIGHT - _TOP - _BOTTOM):.1f}"


def _classes(style: int) -> str:
    return f"c{style % COLOURS} d{style // COLOURS % DASHES}"


def _scale(values: Sequence[float]) -> _Scale:
    """Logarithmic over a ratio of 10; zeros stay, on a linear first stretch."""
    positive = [value for value in values if value > 0]
    if not positive or min(values) < 0 or max(positive) < 10 * min(positive):
        return _linear(values)
    low, high = math.log10(min(positive)) - 0.08, math.log10(max(positive)) + 0.08
    least = 10**low
    zero = 0.12 if len(positive) < len(values) else 0.0  # the share of the first stretch

    def place(value: float) -> float:
        if value < least:
            return zero * value / least
        return zero + (1 - zero) * (math.log10(value) - low) / (high - low)

    decades = range(math.floor(low), math.ceil(high) + 1, math.ceil((high - low) / 6))
    digits = (1, 2, 5) if high - low < 2.3 else (1,)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return _Scale(place, [0.0, *ticks] if zero else ticks)


def _linear(values: Iterable[float]) -> _Scale:
    """From 0, to the next tick beyond the values."""
    low, high = min(0.0, *values), max(0.0, *values)
    if high - low < 1e-290:
        high = low + 1
    rough = (high - low) / 5
    decade = 10.0 ** math.floor(math.log10(rough))
    step = next(decade * digit for digit in (1, 2, 5, 10) if decade * digit >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    ticks = [float(f"{k * step:.6g}") for k in range(first, last + 1)]
    start, end = ticks[0], ticks[-1]
    return _Scale(lambda value: (value - start) / (end - start), ticks)
