"""Compares networks of train_mnist on images that are turned, shifted, scaled and sheared."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from experiments import cli, files
from experiments.analysis.partial_results import Kept, sha256
from experiments.cli import flag
from experiments.data import affnist, datasets
from experiments.data.affine import ORDERS, Pose, random_affine, warped
from experiments.errors import InputError
from experiments.figures import poses
from experiments.training import trained

SLICE = 10_000  # images: after so many, a count is kept for a program that is killed


@dataclasses.dataclass(frozen=True)
class Config:
    """Which networks to compare, and on which moves; the random ones are the article's."""

    workdirs: str = flag("runs/mnist_paper,runs/pooling_cnn", "Runs, separated by commas.")
    output: str = flag(
        "runs/affine",
        "Folder of results.json, sweeps.json and sweeps.png; before these, of progress.json, from "
        "which the same command goes on if it was killed.",
    )
    data_dir: str = flag(
        "", "Folder of the data set's files, and of affNIST's; empty: where the runs had them."
    )
    affnist_dir: str = flag(
        "", "Folder of affNIST's .mat files; empty: --data_dir, or if it has none, a set like it."
    )
    batch_size: int = flag(128, "Images that pass through a network at a time.", minimum=1)
    draws: int = flag(5, "Times that the whole test set is moved at random.", minimum=2)
    seed: int = flag(0, "Of the random moves.", minimum=0, maximum=2**32 - 1)
    rotation: float = flag(30.0, "Largest random angle, degrees.", minimum=0, maximum=180)
    shift: float = flag(0.1, "Largest random shift, share of the side.", minimum=0, maximum=1)
    interpolation: str = flag("bilinear", "Of moved images.", choices=tuple(ORDERS))
    rotations: str = flag("-60,-45,-30,-15,0,15,30,45,60", "Of a sweep, degrees clockwise.")
    shifts: str = flag("-8,-6,-4,-2,0,2,4,6,8", "Of a sweep, pixels to the right.")
    scales: str = flag("0.5,0.6,0.7,0.8,0.9,1,1.1,1.2,1.3,1.4", "Of a sweep, factors.")
    shears: str = flag("-45,-30,-15,0,15,30,45", "Of a sweep, degrees of lean to the right.")
    sweep_examples: int = flag(
        1000, "Test images in a sweep, at most, the first ones; 0: all.", minimum=0
    )


def main(config: Config) -> int:
    """Measures all runs on the same images; writes and prints what came out."""
    sweeps = {label: numbers(x, getattr(config, x.flag)) for label, x in SWEEPS.items()}
    runs = trained.load_all(config.workdirs.split(","), data_dir=config.data_dir)
    first = next(iter(runs.values()))
    side = first.test.images.shape[1]
    cases = affnist.cases(first.dataset, side, folder=config.affnist_dir, data_dir=config.data_dir)
    # On a canvas, training places images anywhere; here they move from its middle.
    test = first.dataset.test
    test = test._replace(images=datasets.centred(test.images, side))
    swept = datasets.Split(*(part[: config.sweep_examples or None] for part in test))
    draws = [
        random_affine(test.size, side, config.rotation, config.shift, key=[config.seed, draw])
        for draw in range(config.draws)
    ]
    kept = Kept(Path(config.output) / "progress.json", facts(config, runs, cases))
    rows, curves = [], {}
    for name, run in runs.items():
        logging.info("%s: %s after %d steps", name, run.config.network, run.step)
        row: dict[str, Any] = {"run": name, "network": run.config.network}
        for title, split in ({"clean": run.test} | cases).items():
            row[title] = accuracy(kept, f"{name}: {title}", run, split, None, config)
            row[f"{title}_cases"] = split.size
        affine = [
            accuracy(kept, f"{name}: draw {draw}", run, test, pose, config)
            for draw, pose in enumerate(draws)
        ]
        row |= {"affine": float(np.mean(affine)), "affine_deviation": float(np.std(affine, ddof=1))}
        rows.append(row)
        curves[name] = {
            label: [
                accuracy(
                    kept, f"{name}: {label} {x}", run, swept, sweep.move(swept.size, x), config
                )
                for x in sweeps[label]
            ]
            for label, sweep in SWEEPS.items()
        }
    write(rows, curves, sweeps, swept.size, Path(config.output))
    for line in summary(rows):
        print(line)
    kept.remove()
    return 0


def facts(
    config: Config, runs: dict[str, trained.Trained], cases: dict[str, datasets.Split]
) -> dict[str, Any]:
    """All that the measurements depend on: the settings, the networks and the images."""
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
        "cases": {title: {"size": x.size, "sha256": sha256(x)} for title, x in cases.items()},
    }


def accuracy(
    kept: Kept,
    name: str,
    run: trained.Trained,
    split: datasets.Split,
    pose: Pose | None,
    config: Config,
) -> float:
    """The share of images that a network classifies right, in percent, from counts by slices."""
    counts = []
    for start in range(0, split.size, SLICE):
        rows = slice(start, start + SLICE)
        images = datasets.Split(*(part[rows] for part in split))
        moves = None if pose is None else Pose(*(part[rows] for part in pose))
        counts.append(kept(f"{name} from {start}", right, run, images, moves, config))
    return 100 * sum(counts) / split.size


def right(run: trained.Trained, split: datasets.Split, pose: Pose | None, config: Config) -> int:
    """How many images a network classifies right, as they are or moved."""
    if pose is None:
        scores = run.trainer.evaluate(run.params, split, batch_size=config.batch_size).scores
    else:
        images = split.images / np.float32(255)
        moved = warped(images, pose, order=ORDERS[config.interpolation])
        scores = run.trainer.scores(run.params, moved, batch_size=config.batch_size)
    return int(np.sum(scores.argmax(1) == split.labels))


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
    files.write_json(output / "results.json", [*rows, *PUBLISHED])
    points = [
        {"run": name, "transformation": label, "value": x, "accuracy": y, "examples": examples}
        for name, own in curves.items()
        for label, values in sweeps.items()
        for x, y in zip(values, own[label], strict=True)
    ]
    files.write_json(output / "sweeps.json", points)
    files.save_figure(poses.accuracy_sweeps(curves, sweeps), output / "sweeps.png")


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Accuracies in percent, published ones below, and whether the networks are matched."""
    cells = [[row.get(title, "") for title in TITLES] for row in (*rows, *PUBLISHED)]
    yield "accuracy (%)"
    yield from cli.table(
        [TITLES, *([x if isinstance(x, str) else f"{x:.2f}" for x in c] for c in cells)]
    )
    clean = [row["clean"] for row in rows]
    apart = round(max(clean) - min(clean), 6)
    if len(rows) > 1:
        yield f"{'not ' * (apart > MATCHED)}matched: clean accuracies are {apart:.2f} points apart"
    if apart > MATCHED:
        yield "so differences in the other columns are not those of the architectures alone"


class Sweep(NamedTuple):
    """One transformation: the flag with its values, how one moves N images, and their range."""

    flag: str
    move: Callable[[int, float], Pose]
    low: float = -math.inf
    high: float = math.inf


SWEEPS = {  # by the axis' label
    "rotation (degrees)": Sweep("rotations", lambda size, x: Pose.of(size, rotation=x)),
    "shift (pixels)": Sweep("shifts", lambda size, x: Pose.of(size, shift=(x, 0))),
    "scale": Sweep("scales", lambda size, x: Pose.of(size, scale=(x, x)), low=0),
    "shear (degrees)": Sweep("shears", lambda size, x: Pose.of(size, shear=x), low=-90, high=90),
}


def numbers(sweep: Sweep, words: str) -> list[float]:
    """The values of a sweep, from its flag.

    Raises:
      InputError: `words` are not numbers, separated by commas, within the sweep's range.
    """
    try:
        values = [float(word) for word in words.split(",")]
    except ValueError:
        values = []
    if not values or not all(sweep.low < value < sweep.high for value in values):
        raise InputError(
            f"--{sweep.flag} must be numbers between {sweep.low:g} and {sweep.high:g}, "
            f"separated by commas, got {words!r}"
        )
    return values


if __name__ == "__main__":
    cli.run(Config, main)
