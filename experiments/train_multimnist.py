"""Train a capsule network, or a CNN baseline, on MultiMNIST: pairs of overlapping digits."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from capsjax.models import CapsNet
from experiments import cli, files
from experiments.cli import flag
from experiments.data import datasets, multimnist
from experiments.figures import classifier
from experiments.figures.classifier import draw_tiles
from experiments.figures.style import BLUE, ORANGE, RED, STYLE
from experiments.training import (
    loop,
    networks,
    objectives,
    parallel,
    processes,
    records,
    runs,
)
from experiments.training.transforms import scaled

# Shape letters: N examples; H, W, C height, width and channels of an image.
TEST_SEED = 2017  # fixed, so that runs with different --seed have the same test set
SHOWN_EXAMPLES = 8


@dataclasses.dataclass(frozen=True)
class Config(networks.Settings, runs.Settings):
    """The settings; the defaults are the paper's network and training."""

    workdir: str = flag("runs/multimnist", "Folder of all output files.", affects_result=False)
    train_size: int = flag(
        60_000_000,
        "Training pairs; pair i overlays digit i modulo the number of digits with a random one.",
        minimum=1,
        maximum=200_000_000,  # their permutation takes 12 bytes per pair
    )
    num_epochs: int = flag(1, "Passes over the training pairs.", minimum=1, maximum=10**9)
    test_size: int = flag(10_000, "Test pairs.", minimum=1, maximum=200_000_000)
    reconstruction_weight: float = flag(
        5e-4, "Weight of reconstruction; 0: no decoder.", minimum=0, maximum=1e6
    )


def main(config: Config) -> int:
    """Train from the workdir's newest checkpoint, log both test errors, and write the figures."""
    dataset = runs.prepare(config)
    trainer = parallel.spread(build(config, dataset), config, batch_size=config.batch_size)
    train_pairs, test_pairs = examples(config, dataset)
    status, params = runs.train(config, trainer, train_pairs, test_pairs, dataset=dataset)
    if status:
        return status
    figures = {}
    if isinstance(trainer.network, CapsNet) and config.reconstruction_weight:
        layers, labels = test_pairs.take(np.arange(min(SHOWN_EXAMPLES, test_pairs.size)))
        # In every process, since each may hold a shard of the weights.
        figures["overlaps"] = overlap_figure(trainer, params, layers, labels)
    if not processes.is_lead():
        return 0
    rows = records.read_metrics(config.workdir)
    last = rows[-1]
    logging.info(
        "test error: %.2f %% of %d images (any digit wrong), %.2f %% of digits",
        *(last["test_error"], test_pairs.size, last["test_error_per_digit"]),
    )
    figures["learning_curves"] = classifier.learning_curves(rows)
    for name, figure in figures.items():
        files.save_figure(figure, pathlib.Path(config.workdir) / "figures" / f"{name}.png")
    return 0


def build(config: Config, dataset: datasets.Dataset) -> loop.Trainer:
    """Build the trainer of a network for pairs of a data set's digits.

    Raises:
      InputError: The images are too small for the network, or --batch_size exceeds --train_size.
    """
    pairs, _ = examples(config, dataset)
    num_steps = runs.num_steps(config, pairs)
    side, _, channels = dataset.train.images.shape[1:]
    side += 2 * multimnist.SHIFT
    shape = side, side, channels
    objective: objectives.Objective = (
        objectives.OverlaidCapsules(dataset.num_classes, config.reconstruction_weight)
        if config.network == "capsnet"
        else objectives.OverlaidSigmoids(dataset.num_classes)
    )
    optimizer = loop.adam(
        config.learning_rate, final_learning_rate=config.final_learning_rate, num_steps=num_steps
    )
    return loop.Trainer(
        lambda: networks.build(config, shape, dataset.num_classes, seed=config.seed),
        objective,
        optimizer,
    )


def examples(
    config: Config, dataset: datasets.Dataset
) -> tuple[multimnist.OverlaidDigits, multimnist.OverlaidDigits]:
    """Return the training and the test pairs."""
    return (
        multimnist.OverlaidDigits(dataset.train, config.train_size, config.seed),
        multimnist.OverlaidDigits(dataset.test, config.test_size, TEST_SEED),
    )


def overlap_figure(
    trainer: loop.Trainer, params: loop.Params, layers: np.ndarray, labels: np.ndarray
) -> Figure:
    """Draw pairs, uint8 `[N, 2, H, W, C]`, and reconstructions from the two longest capsules."""

    @trainer.jit
    def forward(params: loop.Params, layers: jax.Array) -> tuple[jax.Array, ...]:
        model, layers = trainer.model(params), scaled(layers)
        capsules = model(objectives.overlay(layers))
        lengths, predicted = jax.lax.top_k(jnp.linalg.norm(capsules, axis=-1), 2)
        repeated = jnp.broadcast_to(capsules[:, None], (*predicted.shape, *capsules.shape[1:]))
        return layers, model.reconstruct(repeated, predicted), predicted, lengths

    images, reconstructions, predicted, lengths = map(np.asarray, forward(params, layers))
    return draw_overlaps(
        images, reconstructions, labels=labels, predicted=predicted, lengths=lengths
    )


@STYLE
def draw_overlaps(
    layers: np.ndarray,
    reconstructions: np.ndarray,
    *,
    labels: np.ndarray,
    predicted: np.ndarray,
    lengths: np.ndarray,
) -> Figure:
    """Draw pairs of digits above their reconstructions, one example per column.

    The first digit is orange, the second blue. A reconstruction has the colour of the digit of its
    class; if neither digit is of that class, it is grey and the column is framed.

    Args:
      layers: The digits of each pair, `[N, 2, H, W, C]` in [0, 1], C = 1.
      reconstructions: Reconstructions from the two longest capsules, `[N, 2, H, W, C]`.
      labels: Classes of the digits, `[N, 2]`.
      predicted: Classes of the two longest capsules, longest first, `[N, 2]`.
      lengths: Lengths of the two longest capsules, `[N, 2]`.
    """
    colours = [to_rgb(ORANGE), to_rgb(BLUE)]
    grey = (0.6, 0.6, 0.6)
    originals = colourise(layers, [colours] * len(layers))
    class_colours, captions, wrong = [], [], []
    for column, (true, guess, long) in enumerate(zip(labels, predicted, lengths, strict=True)):
        class_colours.append([colours[list(true).index(k)] if k in true else grey for k in guess])
        lines = [f"{k}  {length:.2f}" for k, length in zip(guess, long, strict=True)]
        captions.append("\n".join([f"{true[0]} + {true[1]}", *lines]))
        if set(true) != set(guess):
            wrong.append(column)
    coloured = colourise(reconstructions, class_colours)
    count, height, width, _ = originals.shape
    tile = 0.75
    figure = Figure((max(3, count * tile + 1.1), 2 * tile * height / width + 0.85))
    axes = figure.subplots()
    draw_tiles(axes, np.stack([originals, coloured]))
    axes.set_yticks([0, 1], ["two digits", "reconstructions"])
    axes.set_xticks(range(count), captions)
    beside = axes.annotate(
        "true classes\nlongest capsule\nsecond longest",
        (0, 0),
        (-3.5, -3.5),
        xycoords="axes fraction",
        textcoords="offset points",
    )
    beside.set(ha="right", va="top")
    for column in wrong:
        axes.get_xticklabels()[column].set_color(RED)
        frame = Rectangle((column - 0.5, -0.5), 1, 2, fill=False, edgecolor=RED, clip_on=False)
        axes.add_patch(frame)
    if wrong:
        axes.set_title("Framed: wrong predictions")
    return figure


def colourise(
    layers: np.ndarray, colours: Sequence[Sequence[tuple[float, float, float]]]
) -> np.ndarray:
    """Overlay grey layers `[N, 2, H, W, 1]` in their RGB colours `[N, 2, 3]`: `[N, H, W, 3]`."""
    return np.minimum(np.einsum("nlhwk,nlc->nhwc", layers, np.array(colours)), 1)


if __name__ == "__main__":
    cli.run(Config, main)
