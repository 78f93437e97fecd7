"""The figure of `experiments.benchmark_scaling`."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from experiments.figure_style import BLUE, GREEN, ORANGE, RED, STYLE, settle_ticks

_COLOURS = BLUE, RED, GREEN, ORANGE
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
            for kind, colour in zip(kinds, _COLOURS, strict=False):
                points = [
                    (row["data"] * row["capsules"], value(row))
                    for row in own
                    if row["kind"] == kind
                ]
                shown = [(x, y) for x, y in points if y > 0]  # one device sends nothing
                (line,) = axes.loglog(*zip(*shown, strict=True), "o-", color=colour, lw=1)
                line.set(label=kind, clip_on=False)
            axes.set_title(f"{title}, {target}")
            counts = sorted({row["data"] * row["capsules"] for row in own})
            axes.xaxis.set_major_locator(FixedLocator(counts))
            axes.xaxis.set_minor_locator(NullLocator())
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(ScalarFormatter())
            axes.set_xlim(min(counts) / 1.1, 1.1 * max(counts))
            axes.grid(visible=True)
        line_of_axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in grid[-1]:
        axes.set_xlabel("devices")
    settle_ticks(figure)
    return figure
