"""The learning curves of a report: a chart a measure, with all runs in it."""

import collections
from collections.abc import Iterator, Sequence

from experiments.report_page import chart
from experiments.report_page.chart import Curve
from experiments.report_page.markup import Markup, element, joined
from experiments.report_page.tables import heading
from experiments.report_page.workdirs import Run, measures

_UNDRAWN = {"step", "epoch", "images_per_second"}


def curves(runs: Sequence[Run], styles: dict[str, int]) -> Markup:
    """A chart a measure, with a curve for each run that has it."""
    across = "epoch" if all("epoch" in row for run in runs for row in run.rows) else "step"
    drawn = [measure for measure in measures(runs) if measure not in _UNDRAWN]
    parts = ("test_", "train_")
    drawn.sort(key=lambda key: (*(not key.startswith(part) for part in parts), "loss" in key))
    charts = []
    longest = 0
    for measure in drawn:
        points = [
            [(row[across], row[measure]) for row in run.rows if measure in row] for run in runs
        ]
        longest = max(longest, *map(len, points))
        lines = [
            Curve(run.label, styles[run.group], own)
            for run, own in zip(runs, points, strict=True)
            if own
        ]
        charts.append(
            element(
                "figure",
                element("figcaption", heading(measure)),
                chart.chart(lines, across=across, measure=heading(measure)),
            )
        )
    if not charts:
        return Markup()
    notes = ["Scales that span more than a factor of 10 are logarithmic."]
    if longest > chart.DRAWN:
        notes.append(f"Of a curve of more than {chart.DRAWN} points some are left out.")
    return joined(
        element("p", " ".join(notes)),
        element("ul", *_legend(runs, styles), class_="legend"),
        element("div", *charts, class_="charts many" if len(runs) > 6 else "charts"),
    )


def _legend(runs: Sequence[Run], styles: dict[str, int]) -> Iterator[Markup]:
    sizes = collections.Counter(run.group for run in runs)
    for group, style in styles.items():
        text = f"{group} ({sizes[group]} seeds)" if sizes[group] > 1 else group
        yield element("li", chart.swatch(style), text)
