"""What `evaluate_poses` measured: files, and a table beside the published numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import pose_figures, records
from experiments.evaluate import table

MATCHED = 0.1  # points of clean accuracy: networks no further apart are called matched
# https://cezannec.github.io/Capsule_Networks/ and its notebook; Sabour, Frosst and Hinton, "Dynamic
# Routing Between Capsules", section 5.2, https://arxiv.org/abs/1710.09829.
PUBLISHED = (
    {"run": "the article's capsule network", "affine": 82.91},
    {"run": "the article's CNN", "affine": 85.0},
    {"run": "the paper's capsule network", "clean": 99.23, "affnist": 79.0},
    {"run": "the paper's CNN", "clean": 99.22, "affnist": 66.0},
)
TITLES = ["run", "network", "clean", "affine", "affine_deviation", "affnist", "affnist_like"]


def write(
    rows: list[dict[str, Any]],
    curves: dict[str, dict[str, list[float]]],
    sweeps: dict[str, list[float]],
    examples: int,
    output: Path,
) -> None:
    """Writes results.json, published numbers below, and the sweeps as rows and as a figure.

    Accuracies on images as they are have the number of these beside them (`affnist_cases`); each
    point of a sweep has its own, `examples`.
    """
    records.write_json(output / "results.json", [*rows, *PUBLISHED])
    points = [
        {"run": name, "transformation": label, "value": x, "accuracy": y, "examples": examples}
        for name, own in curves.items()
        for label, values in sweeps.items()
        for x, y in zip(values, own[label], strict=True)
    ]
    records.write_json(output / "sweeps.json", points)
    records.save_figure(pose_figures.accuracy_sweeps(curves, sweeps), output / "sweeps.png")


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Accuracies in percent, published ones below, and whether the networks are matched."""
    cells = [[row.get(title, "") for title in TITLES] for row in (*rows, *PUBLISHED)]
    yield "accuracy (%)"
    yield from table(
        [TITLES, *([x if isinstance(x, str) else f"{x:.2f}" for x in c] for c in cells)]
    )
    clean = [row["clean"] for row in rows]
    apart = round(max(clean) - min(clean), 6)
    if len(rows) > 1:
        yield f"{'not ' * (apart > MATCHED)}matched: clean accuracies are {apart:.2f} points apart"
    if apart > MATCHED:
        yield "so differences in the other columns are not those of the architectures alone"
