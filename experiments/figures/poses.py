"""Figures of networks whose input moves: functions of arrays that return a Matplotlib figure.

Shape letters: S steps of a sweep; N examples. No function uses pyplot or writes a file.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from experiments.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, STYLE, settle_ticks

_COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, GREY)
_DASHES = ("-", "--", ":", "-.")
_ROWS = (
    "Length, as a share of the unmoved digit's",
    "Angle to the unmoved digit's vector (degrees)",
    "The parameter, as decoded from the vector",
)


class Curve(NamedTuple):
    """What vectors do along a sweep."""

    lengths: np.ndarray  # [S, N], as a share of the unmoved example's
    angles: np.ndarray  # [S, N], degrees from the unmoved example's direction
    read: np.ndarray  # [S, N], the parameter as `decoded` from the vector


@STYLE
def accuracy_sweeps(
    curves: Mapping[str, Mapping[str, Sequence[float]]], steps: Mapping[str, Sequence[float]]
) -> Figure:
    """Draws accuracy in percent against each transformation, a line a run.

    Args:
      curves: For each run, its accuracies at the steps of each transformation.
      steps: The values of each transformation, by the axis' label.
    """
    names = [run if len(run) <= 66 else f"…{run[-65:]}" for run in curves]
    columns = max(1, 75 // (max(map(len, names)) + 6))  # the widest letters fit
    figure = Figure((7.2, 2.1 + 0.16 * math.ceil(len(names) / columns)))
    panels = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    for axes, (label, values) in zip(panels, steps.items(), strict=True):
        for number, (name, own) in enumerate(zip(names, curves.values(), strict=True)):
            (line,) = axes.plot(values, own[label], marker="o", label=name, clip_on=False)
            line.set(
                color=_COLOURS[number % len(_COLOURS)],
                linestyle=_DASHES[number // len(_COLOURS) % len(_DASHES)],
            )
        axes.set(xlabel=label, ylim=(0, 100))
        axes.grid(visible=True)
    panels[0].set_title("Accuracy (%)")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns)
    settle_ticks(figure)
    return figure


@STYLE
def equivariance_curves(
    curves: Mapping[str, Mapping[str, Curve]], steps: Mapping[str, ArrayLike]
) -> Figure:
    """Draws length, direction and decoded parameter against each transformation.

    Lines are medians over the examples, bands reach from their lower to their upper quartile.

    Args:
      curves: For each network, its curves of each transformation.
      steps: The values of each transformation, by the axis' label.
    """
    figure = Figure((7.2, 5.4))
    grid = figure.subplots(3, len(steps), sharex="col", squeeze=False)
    for column, (label, values) in zip(grid.T, steps.items(), strict=True):
        for number, (network, own) in enumerate(curves.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            for axes, rows in zip(column, own[label], strict=True):
                low, middle, high = np.percentile(rows, (25, 50, 75), axis=1)
                axes.fill_between(values, low, high, color=colour, alpha=0.2, linewidth=0)
                axes.plot(values, middle, color=colour, label=network)
        column[2].plot(values, values, color=GREY, linestyle=":", label="exact")
        column[2].set(xlabel=label)
    for row, title in zip(grid, _ROWS, strict=True):
        row[0].set_title(title)
        for axes in row:
            axes.grid(visible=True)
    for row in grid[:2]:  # of one unit in all columns
        top = max(axes.get_ylim()[1] for axes in row)
        for axes in row:
            axes.set_ylim(0, top)
    figure.legend(*grid[2, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    settle_ticks(figure)
    return figure
