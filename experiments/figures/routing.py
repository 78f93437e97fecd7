"""Figure of the routing diagnostics of a training run."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.figures.style import BLUE, GREEN, ORANGE, PINK, RED, STYLE, settle_ticks

_PARTS = {"convolution": BLUE, "primary": RED, "capsules": GREEN, "decoder": ORANGE}


def with_diagnostics(rows: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return the rows of `metrics.jsonl` that have diagnostics."""
    return [row for row in rows if "gradient_norm" in row]


@STYLE
def diagnostics(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the routing diagnostics of `analysis.diagnostics` over epochs.

    Panels: coupling entropy, input capsules with a coupling above 0.5, dead capsules, and fractions
    of the squared gradient norm by module.

    Args:
      rows: The rows of `metrics.jsonl`; rows without diagnostics are ignored.

    Raises:
      ValueError: No row has diagnostics.
    """
    rows = with_diagnostics(rows)
    if not rows:
        raise ValueError("diagnostics: rows must include one with diagnostics, got none")
    iterations = sum(key.startswith("coupling_entropy_") for key in rows[0])
    shades = matplotlib.colormaps["viridis"]
    numbered = {
        str(t): shades(0.9 * (t - 1) / max(1, iterations - 1)) for t in range(1, iterations + 1)
    }
    figure = Figure((7.2, 4.4))
    panels: tuple[tuple[str, str, Mapping[str, Any], str], ...] = (
        ("Mean coupling entropy (nats)", "coupling_entropy", numbered, "iteration"),
        ("Input capsules with a coupling > 0.5 (%)", "clear_parents", numbered, "iteration"),
        (
            "Dead capsules, length ≤ 0.1 (%)",
            "dead",
            {"primary_capsules": BLUE, "class_capsules": PINK},
            "",
        ),
        ("Fraction of squared gradient norm (%)", "gradient_share", _PARTS, ""),
    )
    for axes, (title, prefix, colours, heading) in zip(
        figure.subplots(2, 2, sharex=True).flat, panels, strict=True
    ):
        percent = 1 if prefix == "coupling_entropy" else 100
        for name, colour in colours.items():
            shown = [row for row in rows if f"{prefix}_{name}" in row]
            values = [percent * row[f"{prefix}_{name}"] for row in shown]
            (line,) = axes.plot([row["epoch"] for row in shown], values, color=colour, zorder=3)
            line.set(label=name.replace("_", " "), clip_on=False)
            line.set_marker("o" if len(values) <= 40 else "")
        axes.set_title(title)
        if percent == 1:
            axes.ticklabel_format(useOffset=False)  # all values may be close to log(J)
        else:
            axes.set_ylim(0, max(1, 1.05 * axes.dataLim.y1))
        axes.grid(visible=True)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title=heading)
    for axes in figure.axes[2:]:
        axes.set(xlabel="epoch", xlim=(0, max(row["epoch"] for row in rows)))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    settle_ticks(figure)
    return figure
