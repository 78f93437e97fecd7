"""Measures what networks of train_mnist make of a digit as it turns, shifts and thickens.

The length of its capsule should stay, and the capsule's direction should move smoothly; beside it,
the last hidden units of a convolutional network, taken as one vector.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax import Array
from scipy import ndimage

from capsjax.models import CapsNet
from experiments import cli, files
from experiments.analysis import equivariance
from experiments.cli import flag
from experiments.data import datasets
from experiments.data.affine import Pose, warped
from experiments.errors import InputError
from experiments.figures import poses
from experiments.training import trained


@dataclasses.dataclass(frozen=True)
class Config:
    """Which networks to look at, and how far digits go."""

    workdir: str = flag("runs/mnist_paper", "Run of a capsule network.")
    cnn_workdir: str = flag("runs/pooling_cnn", "Run of a CNN; empty: none.")
    output: str = flag("runs/equivariance", "Folder of results.json and equivariance.png.")
    data_dir: str = flag("", "Folder of the data set's files; empty: where the runs had them.")
    batch_size: int = flag(128, "Images that pass through a network at a time.", minimum=1)
    examples_per_class: int = flag(40, "Test images of each class, the first ones.", minimum=4)
    steps: int = flag(13, "Of each sweep, evenly spaced.", minimum=3)
    rotation: float = flag(60.0, "Largest angle either way, degrees.", above=0, maximum=180)
    shift: float = flag(5.0, "Largest shift along the rows either way, pixels.", above=0)
    thinning: float = flag(1.0, "Largest loss of a stroke's width, pixels.", minimum=0)
    thickening: float = flag(2.0, "Largest gain of a stroke's width, pixels.", above=0)
    seed: int = flag(0, "Of the control's random order.", minimum=0, maximum=2**32 - 1)


def main(config: Config) -> int:
    """Measures the networks on the same digits; writes and prints what came out."""
    workdirs = [config.workdir, *([config.cnn_workdir] if config.cnn_workdir else [])]
    runs = list(trained.load_all(workdirs, data_dir=config.data_dir).values())
    for run, name, wanted in zip(runs, ("workdir", "cnn_workdir"), (True, False), strict=False):
        if isinstance(run.model, CapsNet) != wanted:
            raise InputError(
                f"--{name} must be a run of {'a capsule network' if wanted else 'a CNN'}, got one "
                f"of {run.config.network}"
            )
    side = runs[0].test.images.shape[1]
    digits = first_of_each_class(runs[0].dataset.test, config.examples_per_class)
    digits = digits._replace(images=datasets.centred(digits.images, side))
    rows: list[dict[str, Any]] = []
    curves: dict[str, dict[str, poses.Curve]] = {run.config.network: {} for run in runs}
    readers = [reader(run, digits.labels, batch_size=config.batch_size) for run in runs]
    sweeps = values_of(config)
    for label, values in sweeps.items():
        images = moved(digits.images / np.float32(255), label, values)
        for run, read in zip(runs, readers, strict=True):
            name = run.config.network
            logging.info("%s: %s after %d steps", label, name, run.step)
            found = read(images)
            numbers, curves[name][label] = equivariance.measured(
                found[0],
                found[1:],
                values,
                digits.labels,
                dimensions=runs[0].config.capsule_length,
                seed=config.seed,
            )
            rows.append({"network": name, "transformation": label} | numbers)
    output = Path(config.output)
    files.write_json(output / "results.json", rows)
    files.save_figure(poses.equivariance_curves(curves, sweeps), output / "equivariance.png")
    cells = [[x if isinstance(x, str) else f"{x:.3g}" for x in row.values()] for row in rows]
    for line in cli.table([list(rows[0]), *cells]):
        print(line)
    return 0


def first_of_each_class(split: datasets.Split, count: int) -> datasets.Split:
    """So many images of each class.

    Raises:
      InputError: A class has fewer.
    """
    places = [np.flatnonzero(split.labels == label) for label in np.unique(split.labels)]
    fewest = min(map(len, places))
    if count > fewest:
        raise InputError(f"--examples_per_class must be at most {fewest}, got {count}")
    return datasets.Split(*split.take(np.concatenate([place[:count] for place in places])))


def values_of(config: Config) -> dict[str, np.ndarray]:
    """The values of each sweep, by the axis."""
    return {
        label: np.linspace(low, high, config.steps)
        for label, low, high in (
            ("rotation (degrees)", -config.rotation, config.rotation),
            ("shift (pixels)", -config.shift, config.shift),
            ("stroke width (pixels)", -config.thinning, config.thickening),
        )
    }


def moved(images: np.ndarray, label: str, values: np.ndarray) -> np.ndarray:
    """The images `[N, H, W, C]` unmoved and at each value of a sweep: `[1 + S, N, H, W, C]`."""
    amounts = [0.0, *values]
    if label.startswith("stroke"):
        return thickened(images, amounts)
    poses = [
        Pose.of(len(images), rotation=x)
        if label.startswith("rotation")
        else Pose.of(len(images), shift=(x, 0))
        for x in amounts
    ]
    return np.stack([warped(images, pose) for pose in poses])


def reader(
    run: trained.Trained, labels: np.ndarray, *, batch_size: int
) -> Callable[[np.ndarray], np.ndarray]:
    """A function from images `[1 + S, N, H, W, C]` to vectors `[1 + S, N, D]`, compiled once.

    They are the capsules of the true classes `[N]`, or a CNN's last hidden units.
    """

    @jax.jit
    def vectors(params: Any, images: Array) -> Array:
        model = run.trainer.model(params)
        return model(images) if isinstance(model, CapsNet) else model.features(images)[:, None]

    def read(images: np.ndarray) -> np.ndarray:
        flat = images.reshape(-1, *images.shape[2:])
        batches = [flat[start : start + batch_size] for start in range(0, len(flat), batch_size)]
        found = np.concatenate([np.asarray(vectors(run.params, batch)) for batch in batches])
        own = np.tile(labels, len(images)) if found.shape[1] > 1 else 0
        return found[np.arange(len(found)), own].reshape(*images.shape[:2], -1).astype(float)

    return read


_FINER = 4  # times as many pixels a side while distances are measured


def thickened(images: np.ndarray, changes: Sequence[float]) -> np.ndarray:
    """Dilates or erodes strokes by discs of any radius.

    As Castro et al., "Morpho-MNIST", section 3.1, https://arxiv.org/abs/1809.10780, on a finer
    grid: there, what is brighter than half of the image's brightest pixel is ink. Dilation or
    erosion of it by a disc is a threshold of the distance to its edge, so radii need not be whole.
    A change of 0 redraws the image from its edges too, so that all have the same look.

    Args:
      images: `[N, H, W, C]` in 0 … 1.
      changes: S changes of the width of a stroke in pixels: two radii of the disc, negative for
        thinner strokes.

    Returns:
      float32 `[S, N, H, W, C]` in 0 … 1.
    """
    N, H, W, C = images.shape
    widths = np.asarray(changes, np.float32)
    result = np.zeros((len(widths), N, H, W, C), np.float32)
    for n in range(N):
        for c in range(C):
            plane = images[n, ..., c]
            peak = plane.max()
            fine = ndimage.zoom(plane, _FINER, order=1, mode="grid-constant", grid_mode=True)
            ink = fine > peak / 2
            if not ink.any():  # a blank image has no edge
                continue
            # An edge runs between pixels: half a pixel from the centres on its two sides.
            framed = np.pad(ink, 1)
            outside, inside = (
                ndimage.distance_transform_edt(part)[1:-1, 1:-1] for part in (~framed, framed)
            )
            distance = np.where(ink, 0.5 - inside, outside - 0.5).astype(np.float32)
            covered = np.clip(_FINER / 2 * widths[:, None, None] - distance + 0.5, 0, 1)
            blocks = covered.reshape(len(widths), H, _FINER, W, _FINER)
            result[:, n, ..., c] = peak * blocks.mean((2, 4))
    return result


if __name__ == "__main__":
    cli.run(Config, main)
