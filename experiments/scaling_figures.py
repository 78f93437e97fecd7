"""The figure of `experiments.benchmark_scaling`."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from experiments.figure_style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    STYLE,
    settle_ticks,
)

# The first is the thickest, so that lines that coincide are seen.
_LINES = (
    *((BLUE, 3.2), (RED, 2.4), (GREEN, 1.6), (ORANGE, 0.8)),
    *((PINK, 2.4), (GREY, 1.6), ("black", 0.8)),
)
_PANELS = {
    "Memory of one device (MB)": lambda row: row["memory_mb"],
    "Handed over by one device (MB)": lambda row: sum(row["sent_mb"].values()),
}


@STYLE
def scaling(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws memory and communication against the number of devices, a row of panels a target.

    Args:
      rows: As `benchmark_scaling.describe` makes them.
    """
    names = list(dict.fromkeys(row["target"] for row in rows))
    figure = Figure((7.2, 2.3 * len(names)))
    grid = figure.subplots(len(names), len(_PANELS), squeeze=False)
    for line_of_axes, target in zip(grid, names, strict=True):
        own = [row for row in rows if row["target"] == target]
        kinds = list(dict.fromkeys(row["kind"] for row in own))
        for axes, (title, value) in zip(line_of_axes, _PANELS.items(), strict=True):
            for kind, (colour, width) in zip(kinds, _LINES, strict=False):
                points = [
                    (row["data"] * row["capsules"], value(row))
                    for row in own
                    if row["kind"] == kind
                ]
                shown = [(x, y) for x, y in points if y > 0]  # one device sends nothing
                (line,) = axes.loglog(*zip(*shown, strict=True), "o-", color=colour)
                line.set(linewidth=width, markersize=2 * width)
                line.set(label=kind, clip_on=False)
            axes.set_title(f"{title}, {target}")
            counts = sorted({row["data"] * row["capsules"] for row in own})
            axes.xaxis.set_major_locator(FixedLocator(counts))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_xlim(min(counts) / 1.1, 1.1 * max(counts))
            axes.grid(visible=True)
        line_of_axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in grid[-1]:
        axes.set_xlabel("devices")
    settle_ticks(figure)
    return figure
