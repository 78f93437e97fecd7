"""Figures of accuracy and equivariance over sweeps of image transformations.

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
_ROW_TITLES = (
    "Length relative to the untransformed digit's",
    "Angle to the untransformed digit's vector (degrees)",
    "Parameter decoded from the vector",
)


class SweepCurves(NamedTuple):
    """Vectors of examples along a sweep, compared with those of the untransformed examples."""

    lengths: np.ndarray  # [S, N], relative to the untransformed example's
    angles: np.ndarray  # [S, N], degrees from the untransformed example's direction
    decoded: np.ndarray  # [S, N], the transformation's parameter decoded by regression


@STYLE
def accuracy_sweeps(
    curves: Mapping[str, Mapping[str, Sequence[float]]], steps: Mapping[str, Sequence[float]]
) -> Figure:
    """Draw accuracy over each transformation's parameter, one line per run.

    Args:
      curves: Accuracies in percent at the steps, by run and by transformation.
      steps: Parameter values by transformation, whose name labels the axis.
    """
    names = [run if len(run) <= 66 else f"…{run[-65:]}" for run in curves]
    columns = max(1, 75 // (max(map(len, names)) + 6))  # fits even if all letters are W
    figure = Figure((7.2, 2.1 + 0.16 * math.ceil(len(names) / columns)))
    panels = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    for axes, (label, values) in zip(panels, steps.items(), strict=True):
        for number, (name, run_curves) in enumerate(zip(names, curves.values(), strict=True)):
            (line,) = axes.plot(values, run_curves[label], marker="o", label=name, clip_on=False)
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
    curves: Mapping[str, Mapping[str, SweepCurves]], steps: Mapping[str, ArrayLike]
) -> Figure:
    """Draw length, direction and decoded parameter over each transformation's parameter.

    Lines are medians over the examples, bands the interquartile range.

    Args:
      curves: Curves by network and by transformation.
      steps: Parameter values by transformation, whose name labels the axis.
    """
    figure = Figure((7.2, 5.4))
    grid = figure.subplots(3, len(steps), sharex="col", squeeze=False)
    for column, (label, values) in zip(grid.T, steps.items(), strict=True):
        for number, (network, network_curves) in enumerate(curves.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            for axes, examples in zip(column, network_curves[label], strict=True):
                low, middle, high = np.percentile(examples, (25, 50, 75), axis=1)
                axes.fill_between(values, low, high, color=colour, alpha=0.2, linewidth=0)
                axes.plot(values, middle, color=colour, label=network)
        column[2].plot(values, values, color=GREY, linestyle=":", label="exact")
        column[2].set(xlabel=label)
    for row, title in zip(grid, _ROW_TITLES, strict=True):
        row[0].set_title(title)
        for axes in row:
            axes.grid(visible=True)
    for row in grid[:2]:  # equal limits, because all columns have the same unit
        top = max(axes.get_ylim()[1] for axes in row)
        for axes in row:
            axes.set_ylim(0, top)
    figure.legend(*grid[2, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    settle_ticks(figure)
    return figure
