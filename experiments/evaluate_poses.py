"""Compare networks trained by train_mnist on rotated, shifted, scaled and sheared test images.

Writes accuracies on random affine transformations, on affNIST (for runs with --canvas=40) and on
sweeps of single transformations.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from experiments import cli, files
from experiments.analysis.partial_results import PartialResults, sha256
from experiments.cli import flag
from experiments.data import affnist, datasets
from experiments.data.affine import SPLINE_ORDERS, Pose, random_affine, warp
from experiments.figures import poses
from experiments.training import trained

SLICE_SIZE = 10_000  # images per partial result, which an interrupted program does not repeat
MATCHED_POINTS = 0.1  # largest difference in clean accuracy between matched networks, % points
# https://cezannec.github.io/Capsule_Networks/ and its notebook; Sabour, Frosst and Hinton, "Dynamic
# Routing Between Capsules", section 5.2, https://arxiv.org/abs/1710.09829.
PUBLISHED = (
    {"run": "the article's capsule network", "affine": 82.91},
    {"run": "the article's CNN", "affine": 85.0},
    {"run": "the paper's capsule network", "clean": 99.23, "affnist": 79.0},
    {"run": "the paper's CNN", "clean": 99.22, "affnist": 66.0},
)
COLUMNS = ["run", "network", "clean", "affine", "affine_deviation", "affnist", "affnist_like"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Networks and transformations to compare; the defaults are those of the article."""

    workdirs: str = flag("runs/mnist_paper,runs/pooling_cnn", "Run folders, separated by commas.")
    output: str = flag(
        "runs/affine",
        "Folder of results.json, sweeps.json and sweeps.png; until these are written, of "
        "progress.json, from which the same command resumes if interrupted.",
    )
    data_dir: str = flag(
        "", "Folder of the data set's and affNIST's files; empty: the runs' --data_dir."
    )
    affnist_dir: str = flag(
        "", "Folder of affNIST's .mat files; empty: --data_dir or, without any there, affnist_like."
    )
    batch_size: int = flag(128, "Images per forward pass.", minimum=1, maximum=2**20)
    draws: int = flag(5, "Random transformations of the test set.", minimum=2, maximum=10_000)
    seed: int = flag(0, "Seed of the random transformations.", minimum=0, maximum=2**32 - 1)
    rotation: float = flag(30.0, "Largest random angle, degrees.", minimum=0, maximum=180)
    shift: float = flag(0.1, "Largest random shift, fraction of the side.", minimum=0, maximum=1)
    interpolation: str = flag("bilinear", "Interpolation method.", choices=tuple(SPLINE_ORDERS))
    rotations: str = flag("-60,-45,-30,-15,0,15,30,45,60", "Rotation sweep, degrees clockwise.")
    shifts: str = flag("-8,-6,-4,-2,0,2,4,6,8", "Shift sweep, pixels to the right.")
    scales: str = flag("0.5,0.6,0.7,0.8,0.9,1,1.1,1.2,1.3,1.4", "Scale sweep, factors.")
    shears: str = flag("-45,-30,-15,0,15,30,45", "Shear sweep, degrees to the right.")
    sweep_examples: int = flag(
        1000,
        "Number of test images in a sweep, the first ones; 0: all.",
        minimum=0,
        maximum=2**31 - 1,
    )


class Sweep(NamedTuple):
    """A transformation with one parameter, whose values are given by a flag."""

    flag: str
    pose: Callable[[int, float], Pose]  # from the number of images and the parameter
    low: float  # the smallest value
    high: float  # the largest value


SWEEPS = {  # by the label of the figure's axis
    "rotation (degrees)": Sweep(
        "rotations", lambda size, x: Pose.broadcast(size, rotation=x), low=-360, high=360
    ),
    "shift (pixels)": Sweep(
        "shifts", lambda size, x: Pose.broadcast(size, shift=(x, 0)), low=-1000, high=1000
    ),
    "scale": Sweep(
        "scales", lambda size, x: Pose.broadcast(size, scale=(x, x)), low=0.01, high=100
    ),
    "shear (degrees)": Sweep(
        "shears", lambda size, x: Pose.broadcast(size, shear=x), low=-89, high=89
    ),
}


def main(config: Config) -> int:
    """Measure the accuracy of all runs on the same images, and write and print the results."""
    sweeps = {
        label: cli.numbers(
            x.flag, getattr(config, x.flag), minimum=x.low, maximum=x.high, kind=float
        )
        for label, x in SWEEPS.items()
    }
    runs = trained.load_all(config.workdirs.split(","), data_dir=config.data_dir)
    first = next(iter(runs.values()))
    side = first.test.images.shape[1]
    affnist_sets = affnist.load_test_sets(
        first.dataset, side, folder=config.affnist_dir, data_dir=config.data_dir
    )
    # Transformations are about the centre, so digits are centred on the canvas; `run.test`, on
    # which clean accuracy is measured, has them at random positions.
    test = first.dataset.test
    test = test._replace(images=datasets.centred(test.images, side))
    swept = datasets.Split(*(part[: config.sweep_examples or None] for part in test))
    draws = [
        random_affine(test.size, side, config.rotation, config.shift, key=[config.seed, draw])
        for draw in range(config.draws)
    ]
    progress = PartialResults(
        Path(config.output) / "progress.json", fingerprint(config, runs, affnist_sets)
    )
    rows, curves = [], {}
    for name, run in runs.items():
        logging.info("%s: %s after %d steps", name, run.config.network, run.step)
        row: dict[str, Any] = {"run": name, "network": run.config.network}
        for title, split in ({"clean": run.test} | affnist_sets).items():
            row[title] = accuracy(progress, f"{name}: {title}", run, split, None, config)
            row[f"{title}_cases"] = split.size
        affine = [
            accuracy(progress, f"{name}: draw {draw}", run, test, pose, config)
            for draw, pose in enumerate(draws)
        ]
        row |= {"affine": float(np.mean(affine)), "affine_deviation": float(np.std(affine, ddof=1))}
        rows.append(row)
        curves[name] = {
            label: [
                accuracy(
                    progress, f"{name}: {label} {x}", run, swept, sweep.pose(swept.size, x), config
                )
                for x in sweeps[label]
            ]
            for label, sweep in SWEEPS.items()
        }
    write_results(rows, curves, sweeps, swept.size, Path(config.output))
    for line in summary_lines(rows):
        print(line)
    progress.remove()
    return 0


def fingerprint(
    config: Config, runs: dict[str, trained.Trained], affnist_sets: dict[str, datasets.Split]
) -> dict[str, Any]:
    """Return everything that determines the counts: settings, parameters and data, as digests."""
    return {
        "settings": dataclasses.asdict(config),
        "runs": {
            name: {
                "settings": dataclasses.asdict(run.config),
                "step": run.step,
                "params_sha256": sha256(jax.tree.leaves(run.params)),
                "data_sha256": run.dataset.sha256,
            }
            for name, run in runs.items()
        },
        "cases": {
            title: {"size": x.size, "sha256": sha256(x)} for title, x in affnist_sets.items()
        },
    }


def accuracy(
    progress: PartialResults,
    name: str,
    run: trained.Trained,
    split: datasets.Split,
    pose: Pose | None,
    config: Config,
) -> float:
    """Return a network's accuracy in percent, from partial results of `SLICE_SIZE` images each.

    The counts are stored in `progress` under `name`. Without a pose, images are not interpolated.
    """
    counts = []
    for start in range(0, split.size, SLICE_SIZE):
        rows = slice(start, start + SLICE_SIZE)
        images = datasets.Split(*(part[rows] for part in split))
        poses = None if pose is None else Pose(*(part[rows] for part in pose))
        counts.append(progress(f"{name} from {start}", count_correct, run, images, poses, config))
    return 100 * sum(counts) / split.size


def count_correct(
    run: trained.Trained, split: datasets.Split, pose: Pose | None, config: Config
) -> int:
    """Count the images that a network classifies correctly, after the transformation if any."""
    if pose is None:
        scores = run.trainer.evaluate(run.params, split, batch_size=config.batch_size).scores
    else:
        images = split.images / np.float32(255)
        transformed = warp(images, pose, order=SPLINE_ORDERS[config.interpolation])
        scores = run.trainer.scores(run.params, transformed, batch_size=config.batch_size)
    return int(np.sum(scores.argmax(1) == split.labels))


def write_results(
    rows: list[dict[str, Any]],
    curves: dict[str, dict[str, list[float]]],
    sweeps: dict[str, list[float]],
    examples: int,
    output: Path,
) -> None:
    """Write results.json (with the published accuracies), sweeps.json and sweeps.png.

    Args:
      rows: Accuracies of the runs.
      curves: Accuracies along the sweeps, by run and by transformation.
      sweeps: Parameter values, by transformation.
      examples: Number of images in each point of a sweep.
      output: Folder of the files.
    """
    files.write_json(output / "results.json", [*rows, *PUBLISHED])
    points = [
        {"run": name, "transformation": label, "value": x, "accuracy": y, "examples": examples}
        for name, run_curves in curves.items()
        for label, values in sweeps.items()
        for x, y in zip(values, run_curves[label], strict=True)
    ]
    files.write_json(output / "sweeps.json", points)
    files.save_figure(poses.accuracy_sweeps(curves, sweeps), output / "sweeps.png")


def summary_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a table of measured and published accuracies, and whether the networks are matched."""
    cells = [[row.get(title, "") for title in COLUMNS] for row in (*rows, *PUBLISHED)]
    yield "accuracy (%)"
    yield from cli.table(
        [COLUMNS, *([x if isinstance(x, str) else f"{x:.2f}" for x in c] for c in cells)]
    )
    clean = [row["clean"] for row in rows]
    difference = round(max(clean) - min(clean), 6)
    matched = difference <= MATCHED_POINTS
    if len(rows) > 1:
        yield f"{'not ' * (not matched)}matched: clean accuracies differ by {difference:.2f} points"
    if not matched:
        yield "differences in the other columns may be due to different clean accuracy"


if __name__ == "__main__":
    cli.run(Config, main)
