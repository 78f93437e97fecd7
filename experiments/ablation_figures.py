"""The figure of the ablation: a function of its table that returns a Matplotlib figure."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.figure_style import BLUE, GREY, RED, STYLE, settle_ticks


@STYLE
def errors_by_variant(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws each variant's test errors in percent: a dot a seed, and the mean as a line.

    A diamond is the mean of the same networks when they are tested without routing.

    Args:
      table: The rows of `ablation_results.row`.
    """
    figure = Figure((4.6, 1.1 + 0.3 * len(table)))
    axes = figure.subplots()
    for y, row in enumerate(table):
        errors = row["test_errors"]
        axes.plot(errors, [y] * len(errors), "o", color=BLUE, alpha=0.6, label="a seed")
        mean = [row["test_error"]] * 2
        axes.plot(mean, [y - 0.3, y + 0.3], color=BLUE, label="mean of the seeds")
        if (uniform := row.get("test_error_if_couplings_are_uniform")) is not None:
            axes.plot(
                uniform,
                y,
                "D",
                color=RED,
                fillstyle="none",
                label="the same, tested without routing",
            )
    names = [row["variant"].replace("_", " ") for row in table]
    axes.set_yticks(range(len(table)), names)
    axes.set(ylim=(len(table) - 0.5, -0.5), xlabel="Test error (%)")
    axes.set_xlim(0, 1.05 * axes.dataLim.x1 or 1)  # from 0, with room for the last dot
    axes.grid(visible=True, axis="x", color=GREY, alpha=0.3)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each once
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    settle_ticks(figure)
    return figure
