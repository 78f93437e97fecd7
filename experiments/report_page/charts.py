"""Compute the learning curves of a report: one chart per measure, with a curve for each run.

The template writes a chart as SVG inside HTML. Colours and dashes are CSS classes (c0 …, d0 …), so
that the style sheet can choose them for light and for dark mode.
"""

import collections
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from experiments.report_page.workdirs import Run, measures

_COLOURS, _DASHES = 6, 4
_MARKED, THINNED = 40, 400  # points up to which each gets a mark; above which some are left out
_UNDRAWN = {"step", "epoch", "images_per_second"}


class Area(NamedTuple):
    """Sizes of a drawing and the edges of the plot in it, in SVG units."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


AREA = Area(width=340, height=210, left=46, right=328, top=10, bottom=174)


class Tick(NamedTuple):
    """A labelled position on an axis."""

    position: str  # in SVG units
    text: str


class Curve(NamedTuple):
    """One run in a chart."""

    label: str
    style: str  # CSS classes
    line: str  # "x,y x,y …" in SVG units
    marks: list[tuple[str, str]]  # a circle for each point; empty for a long curve


class Chart(NamedTuple):
    """One measure of all runs that have it."""

    title: str
    across: str  # label of the horizontal axis
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve]


class Curves(NamedTuple):
    """Everything in the section of learning curves."""

    legend: list[tuple[str, str]]  # CSS classes and text
    charts: list[Chart]
    thinned: bool  # whether points of some curve were left out
    many: bool  # whether lines must be thin


class _Scale(NamedTuple):
    """Maps values to [0, 1]."""

    place: Callable[[float], float]
    ticks: list[float]


def style(number: int) -> str:
    """Return the CSS classes for the curves of a group of runs."""
    return f"c{number % _COLOURS} d{number // _COLOURS % _DASHES}"


def curves(runs: Sequence[Run], styles: dict[str, str]) -> Curves | None:
    """Return one chart per measure, test measures first; None if there is nothing to draw.

    Args:
      runs: the runs, in the order in which they are drawn.
      styles: the CSS classes of each group of runs.
    """
    across = "epoch" if all("epoch" in row for run in runs for row in run.rows) else "step"
    drawn = [measure for measure in measures(runs) if measure not in _UNDRAWN]
    parts = ("test_", "train_")
    drawn.sort(key=lambda key: (*(not key.startswith(part) for part in parts), "loss" in key))
    if not drawn:
        return None
    charts, longest = [], 0
    for measure in drawn:
        lines = []
        for run in runs:
            if points := [(row[across], row[measure]) for row in run.rows if measure in row]:
                lines.append((run.label, styles[run.group], points))
                longest = max(longest, len(points))
        charts.append(_chart(heading(measure), across, lines))
    sizes = collections.Counter(run.group for run in runs)
    legend = [
        (own, f"{group} ({sizes[group]} seeds)" if sizes[group] > 1 else group)
        for group, own in styles.items()
    ]
    return Curves(legend, charts, thinned=longest > THINNED, many=len(runs) > 6)


def heading(measure: str) -> str:
    """Return a measure's name in words, with the unit of errors."""
    return measure.replace("_", " ") + (", %" if "error" in measure else "")


def _chart(
    title: str, across: str, lines: Sequence[tuple[str, str, Sequence[tuple[float, float]]]]
) -> Chart:
    """Scale labelled and styled curves, of at least one point each, to the plot's area."""
    xs = _linear([x for _, _, points in lines for x, _ in points])
    ys = _scale([y for _, _, points in lines for _, y in points])

    def along(x: float) -> str:
        return f"{AREA.left + xs.place(x) * (AREA.right - AREA.left):.1f}"

    def up(y: float) -> str:
        return f"{AREA.bottom - ys.place(y) * (AREA.bottom - AREA.top):.1f}"

    curves = []
    for label, style, points in lines:
        every = math.ceil(len(points) / THINNED)
        places = [(along(x), up(y)) for x, y in [*points[:-1:every], points[-1]]]
        line = " ".join(map(",".join, places))
        curves.append(Curve(label, style, line, places if len(places) <= _MARKED else []))
    return Chart(
        title,
        across,
        [Tick(along(x), f"{x:g}") for x in xs.ticks],
        [Tick(up(y), f"{y:g}") for y in ys.ticks],
        curves,
    )


def _scale(values: Sequence[float]) -> _Scale:
    """Return a logarithmic scale above a ratio of 10; zeros lie on a linear stretch below it."""
    # Tinier ones count as zeros, since their decades cannot be computed.
    positive = [value for value in values if value > 1e-290]
    if not positive or min(values) < 0 or max(positive) < 10 * min(positive):
        return _linear(values)
    low, high = math.log10(min(positive)) - 0.08, math.log10(max(positive)) + 0.08
    least = 10**low
    zero = 0.12 if len(positive) < len(values) else 0.0  # length of the linear stretch

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
    """Return a linear scale that includes 0 and ends at ticks."""
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
