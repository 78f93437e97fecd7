"""Measure equivariance of class capsules to rotation, shift and stroke width of digits.

Under a transformation of the image, the length of the true class's capsule should be constant and
its direction should change smoothly. The baseline is a CNN's vector of last hidden units.
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
from experiments.data.affine import Pose, warp
from experiments.errors import InputError
from experiments.figures import poses
from experiments.training import trained

# Shape letters: N images; S steps of a sweep; D dimensions of a capsule or CNN vector; H, W, C
# height, width and channels of an image.
UPSAMPLING = 4  # factor of the grid on which distances to edges are measured


@dataclasses.dataclass(frozen=True)
class Config:
    """Networks to compare, and ranges of the transformations."""

    workdir: str = flag("runs/mnist_paper", "Folder of a train_mnist run with a capsule network.")
    cnn_workdir: str = flag("runs/pooling_cnn", "Folder of a run with a CNN; empty: none.")
    output: str = flag("runs/equivariance", "Folder of results.json and equivariance.png.")
    data_dir: str = flag("", "Folder of the data set's files; empty: the runs' --data_dir.")
    batch_size: int = flag(128, "Images per forward pass.", minimum=1, maximum=2**20)
    examples_per_class: int = flag(
        40, "Number of test images of each class, the first ones.", minimum=4, maximum=2**31 - 1
    )
    steps: int = flag(13, "Number of evenly spaced values in each sweep.", minimum=3, maximum=1001)
    rotation: float = flag(
        60.0, "Largest angle in either direction, degrees.", above=0, maximum=180
    )
    shift: float = flag(
        5.0, "Largest horizontal shift in either direction, pixels.", above=0, maximum=1000
    )
    thinning: float = flag(1.0, "Largest decrease in stroke width, pixels.", minimum=0, maximum=100)
    thickening: float = flag(2.0, "Largest increase in stroke width, pixels.", above=0, maximum=100)
    seed: int = flag(0, "Seed of the controls with shuffled steps.", minimum=0, maximum=2**32 - 1)


def main(config: Config) -> int:
    """Measure the networks on the same digits, and write and print the results."""
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
    pixels = digits.images / np.float32(255)
    rows: list[dict[str, Any]] = []
    curves: dict[str, dict[str, poses.SweepCurves]] = {run.config.network: {} for run in runs}
    encoders = [make_encoder(run, digits.labels, batch_size=config.batch_size) for run in runs]
    sweeps = sweep_values(config)
    for label, values in sweeps.items():
        images = transform(pixels, label, values)
        for run, encode in zip(runs, encoders, strict=True):
            name = run.config.network
            logging.info("%s: %s after %d steps", label, name, run.step)
            vectors = encode(images)
            measures, curves[name][label] = equivariance.measure_sweep(
                vectors[0],
                vectors[1:],
                values,
                digits.labels,
                dimensions=runs[0].config.capsule_length,
                seed=config.seed,
            )
            rows.append({"network": name, "transformation": label} | measures)
    output = Path(config.output)
    files.write_json(output / "results.json", rows)
    files.save_figure(poses.equivariance_curves(curves, sweeps), output / "equivariance.png")
    cells = [[x if isinstance(x, str) else f"{x:.3g}" for x in row.values()] for row in rows]
    for line in cli.table([list(rows[0]), *cells]):
        print(line)
    return 0


def first_of_each_class(split: datasets.Split, count: int) -> datasets.Split:
    """Return the first `count` examples of each class, sorted by class.

    Raises:
      InputError: A class has fewer examples.
    """
    indices = [np.flatnonzero(split.labels == label) for label in np.unique(split.labels)]
    fewest = min(map(len, indices))
    if count > fewest:
        raise InputError(f"--examples_per_class must be at most {fewest}, got {count}")
    return datasets.Split(*split.take(np.concatenate([members[:count] for members in indices])))


def sweep_values(config: Config) -> dict[str, np.ndarray]:
    """Return the parameter values `[S]` of each sweep, by the label of the figure's axis."""
    return {
        label: np.linspace(low, high, config.steps)
        for label, low, high in (
            ("rotation (degrees)", -config.rotation, config.rotation),
            ("shift (pixels)", -config.shift, config.shift),
            ("stroke width (pixels)", -config.thinning, config.thickening),
        )
    }


def transform(images: np.ndarray, label: str, values: np.ndarray) -> np.ndarray:
    """Transform images `[N, H, W, C]` with parameter 0 and with each of S values.

    `label` is a key of `sweep_values`. The result has shape `[1 + S, N, H, W, C]`.
    """
    parameters = [0.0, *values]
    if label.startswith("stroke"):
        return change_stroke_width(images, parameters)
    poses = [
        Pose.broadcast(len(images), rotation=x)
        if label.startswith("rotation")
        else Pose.broadcast(len(images), shift=(x, 0))
        for x in parameters
    ]
    return np.stack([warp(images, pose) for pose in poses])


def change_stroke_width(images: np.ndarray, changes: Sequence[float]) -> np.ndarray:
    """Dilate or erode strokes by discs of arbitrary radius.

    As in Castro et al., "Morpho-MNIST", section 3.1, https://arxiv.org/abs/1809.10780, images are
    upsampled and binarised at half their maximum. Dilation and erosion by a disc threshold the
    distance to the edges, so the radius is continuous. A change of 0 also redraws the image from
    its edges, so that all results are rendered alike.

    Args:
      images: `[N, H, W, C]` in [0, 1].
      changes: Changes of the stroke width in pixels, twice the radius, negative to erode; `[S]`.

    Returns:
      float32 `[S, N, H, W, C]` in [0, 1].
    """
    N, H, W, C = images.shape
    widths = np.asarray(changes, np.float32)
    result = np.zeros((len(widths), N, H, W, C), np.float32)
    for n in range(N):
        for c in range(C):
            plane = images[n, ..., c]
            peak = plane.max()
            fine = ndimage.zoom(plane, UPSAMPLING, order=1, mode="grid-constant", grid_mode=True)
            ink = fine > peak / 2
            if not ink.any():  # a blank image has no edges
                continue
            # Signed distance to the edge, which is half a pixel from the adjacent centres.
            padded = np.pad(ink, 1)
            outside, inside = (
                ndimage.distance_transform_edt(part)[1:-1, 1:-1] for part in (~padded, padded)
            )
            distance = np.where(ink, 0.5 - inside, outside - 0.5).astype(np.float32)
            covered = np.clip(UPSAMPLING / 2 * widths[:, None, None] - distance + 0.5, 0, 1)
            blocks = covered.reshape(len(widths), H, UPSAMPLING, W, UPSAMPLING)
            result[:, n, ..., c] = peak * blocks.mean((2, 4))
    return result


def make_encoder(
    run: trained.Trained, labels: np.ndarray, *, batch_size: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Build a compiled function from images to the network's vectors.

    Args:
      run: The network.
      labels: True classes of the images, `[N]`.
      batch_size: Images per forward pass.

    Returns:
      A function from images `[1 + S, N, H, W, C]` to float64 vectors `[1 + S, N, D]`: the capsules
      of the true classes, or a CNN's last hidden units.
    """

    @jax.jit
    def encode_batch(params: Any, images: Array) -> Array:
        model, images = run.trainer.model(params), run.trainer.objective.inputs(images)
        return model(images) if isinstance(model, CapsNet) else model.features(images)[:, None]

    def encode(images: np.ndarray) -> np.ndarray:
        flat = images.reshape(-1, *images.shape[2:])
        batches = [flat[start : start + batch_size] for start in range(0, len(flat), batch_size)]
        vectors = np.concatenate([np.asarray(encode_batch(run.params, x)) for x in batches])
        index = np.tile(labels, len(images)) if vectors.shape[1] > 1 else 0
        return vectors[np.arange(len(vectors)), index].reshape(*images.shape[:2], -1).astype(float)

    return encode


if __name__ == "__main__":
    cli.run(Config, main)
