"""Trains a capsule network, or a control, on pairs of overlapping MNIST digits."""

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

TEST_SEED = 2017  # the test set is the same in every run, whatever --seed
SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Config(networks.Settings, runs.Settings):
    """All settings; the defaults are the paper's network and recipe."""

    workdir: str = flag("runs/multimnist", "Folder of all that is written.", affects_result=False)
    train_size: int = flag(
        60_000_000,
        "Training pairs: the i-th digit, over and over, with others.",
        minimum=1,
        maximum=200_000_000,  # their order is held in memory, by 12 bytes each
    )
    num_epochs: int = flag(1, "Passes over the training pairs.", minimum=1)
    test_size: int = flag(10_000, "Test pairs.", minimum=1)
    reconstruction_weight: float = flag(5e-4, "Of squared errors; 0: no decoder.", minimum=0)


def examples(
    config: Config, dataset: datasets.Dataset
) -> tuple[multimnist.OverlaidDigits, multimnist.OverlaidDigits]:
    """The pairs to train on and to test on."""
    return (
        multimnist.OverlaidDigits(dataset.train, config.train_size, config.seed),
        multimnist.OverlaidDigits(dataset.test, config.test_size, TEST_SEED),
    )


def build(config: Config, dataset: datasets.Dataset) -> loop.Trainer:
    """The network of a Config for pairs of a data set's digits, ready to train.

    Raises:
      InputError: The images are too small for the network, or the batch is larger than the data.
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


def main(config: Config) -> int:
    """Trains from the workdir's newest checkpoint to the end, says both errors, and draws."""
    dataset = runs.prepare(config)
    trainer = parallel.spread(build(config, dataset), config, batch_size=config.batch_size)
    train_pairs, test_pairs = examples(config, dataset)
    status, params = runs.train(
        config, trainer, train_pairs, test_pairs, data_sha256=dataset.sha256
    )
    if status:
        return status
    drawn = {}
    if isinstance(trainer.network, CapsNet) and config.reconstruction_weight:
        layers, labels = test_pairs.take(np.arange(min(SHOWN, test_pairs.size)))
        # By all processes, each of which may hold a part of the weights.
        drawn["overlaps"] = overlaps(trainer, params, layers, labels)
    if not processes.is_lead():
        return 0
    rows = records.read_metrics(config.workdir)
    last = rows[-1]
    logging.info(
        "test error: %.2f %% of %d images (both digits right), %.2f %% of digits",
        *(last["test_error"], test_pairs.size, last["test_error_per_digit"]),
    )
    drawn["learning_curves"] = classifier.learning_curves(rows)
    for name, figure in drawn.items():
        files.save_figure(figure, pathlib.Path(config.workdir) / "figures" / f"{name}.png")
    return 0


def overlaps(
    trainer: loop.Trainer, params: loop.Params, layers: np.ndarray, labels: np.ndarray
) -> Figure:
    """Draws pairs, uint8 `[N, 2, H, W, C]`, and the reconstructions of the two longest capsules."""

    @trainer.jit
    def forward(params: loop.Params, layers: jax.Array) -> tuple[jax.Array, ...]:
        model, layers = trainer.model(params), scaled(layers)
        capsules = model(objectives.overlay(layers))
        lengths, predicted = jax.lax.top_k(jnp.linalg.norm(capsules, axis=-1), 2)
        both = jnp.broadcast_to(capsules[:, None], (*predicted.shape, *capsules.shape[1:]))
        return layers, model.reconstruct(both, predicted), predicted, lengths

    shown, drawn, predicted, lengths = map(np.asarray, forward(params, layers))
    return draw_overlaps(shown, drawn, labels=labels, predicted=predicted, lengths=lengths)


@STYLE
def draw_overlaps(
    layers: np.ndarray,
    reconstructions: np.ndarray,
    *,
    labels: np.ndarray,
    predicted: np.ndarray,
    lengths: np.ndarray,
) -> Figure:
    """Draws pairs of digits over what two capsules make of them, a column an example.

    The first digit is orange and the second blue. The reconstruction of a capsule has the colour of
    the digit that it names; where it names neither, it is drawn in grey and the column is framed.

    Args:
      layers: The digits apart, `[N, 2, H, W, 1]` in 0 … 1.
      reconstructions: Of the two longest capsules, `[N, 2, H, W, 1]`.
      labels: The classes of the digits, `[N, 2]`.
      predicted: The classes of the capsules, `[N, 2]`, the longest first.
      lengths: The lengths of the capsules, `[N, 2]`.
    """
    colours = [to_rgb(ORANGE), to_rgb(BLUE)]
    grey = (0.6, 0.6, 0.6)
    originals = _in_colours(layers, [colours] * len(layers))
    chosen, captions, wrong = [], [], []
    for column, (true, named, long) in enumerate(zip(labels, predicted, lengths, strict=True)):
        chosen.append([colours[list(true).index(k)] if k in true else grey for k in named])
        lines = [f"{k}  {length:.2f}" for k, length in zip(named, long, strict=True)]
        captions.append("\n".join([f"{true[0]} + {true[1]}", *lines]))
        if set(true) != set(named):
            wrong.append(column)
    drawn = _in_colours(reconstructions, chosen)
    count, height, width, _ = originals.shape
    tile = 0.75
    figure = Figure((max(3, count * tile + 1.1), 2 * tile * height / width + 0.85))
    axes = figure.subplots()
    draw_tiles(axes, np.stack([originals, drawn]))
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
        axes.set_title("Framed: not both digits right")
    return figure


def _in_colours(
    layers: np.ndarray, colours: Sequence[Sequence[tuple[float, float, float]]]
) -> np.ndarray:
    """The layers `[N, 2, H, W, 1]` laid over each other in their colours, `[N, H, W, 3]`."""
    return np.minimum(np.einsum("nlhwk,nlc->nhwc", layers, np.array(colours)), 1)


if __name__ == "__main__":
    cli.run(Config, main)
