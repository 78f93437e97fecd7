"""The chart of a benchmark's rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

NAMES = {
    "capsjax": "capsjax",
    "torch": "PyTorch",
    "torch_notebook": "PyTorch, notebook form",
    "plain_jax": "plain JAX",
}
_BLUE, _GREY = "#0072B2", "#999999"


@style.context(["default", {"font.size": 8, "axes.spines.right": False, "axes.spines.top": False}])
def throughput(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws images a second of training and of inference, a bar a program, from least to most.

    Args:
      rows: The lines of `benchmark_training`; those of other rows are left out.
    """
    figure = Figure((7.2, 1.7), layout="constrained")
    for axes, row in zip(figure.subplots(1, 2), ("training", "inference"), strict=True):
        shown = sorted(
            (line for line in rows if line["row"] == row), key=lambda x: x["images_per_second"]
        )
        speeds = [line["images_per_second"] for line in shown]
        bars = axes.barh(
            [NAMES[line["program"]] for line in shown],
            speeds,
            color=[_BLUE if line["program"] == "capsjax" else _GREY for line in shown],
        )
        axes.bar_label(bars, [f"{speed:.3g}" for speed in speeds], padding=3)
        axes.set(title=f"{row}, images/s", xlim=(0, 1.2 * max(speeds)))
        axes.tick_params(axis="y", length=0)
    return figure
