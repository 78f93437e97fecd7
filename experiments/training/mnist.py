"""Settings and trainer of classifiers for MNIST and data sets of its format."""

import dataclasses

from experiments.cli import flag
from experiments.data import datasets
from experiments.errors import InputError
from experiments.training import loop, networks, objectives, runs


@dataclasses.dataclass(frozen=True)
class Config(networks.Settings, runs.Settings):
    """Settings of train_mnist; the defaults are the paper's network, recipe and data."""

    reconstruction_weight: float = flag(
        5e-4, "Weight of the reconstruction loss, a sum of squares; 0: no decoder.", minimum=0
    )
    shift: int = flag(2, "Largest random shift of training images, in pixels.", minimum=0)
    canvas: int = flag(
        0, "Side of a black canvas to place images on at random, in pixels; 0: none.", minimum=0
    )
    diagnostics: bool = flag(
        False, "Measure and draw the routing after each epoch.", affects_result=False
    )


def build(config: Config, dataset: datasets.Dataset) -> loop.Trainer:
    """Build the network, objective and optimizer of a Config for a data set.

    Raises:
      InputError: The images are too small for the network or the shift or too large for the canvas,
        or the batch is larger than the data.
    """
    num_steps = runs.num_steps(config, dataset.train)
    height, width, channels = dataset.train.images.shape[1:]
    side = min(height, width)
    if config.shift >= side:
        raise InputError(
            f"--shift must be less than the {side} pixels of the images, got {config.shift}"
        )
    if config.canvas and config.canvas < max(height, width):
        raise InputError(
            f"--canvas must be 0 or at least the {max(height, width)} pixels of the images, "
            f"got {config.canvas}"
        )
    shape = config.canvas or height, config.canvas or width, channels
    moves = (dataset.num_classes, config.shift, config.canvas)
    objective: objectives.Objective = (
        objectives.CapsuleClassification(*moves, config.reconstruction_weight)
        if config.network == "capsnet"
        else objectives.SoftmaxClassification(*moves)
    )
    optimizer = loop.adam(
        config.learning_rate,
        final_learning_rate=config.final_learning_rate,
        num_steps=num_steps,
    )
    return loop.Trainer(
        lambda: networks.build(config, shape, dataset.num_classes, seed=config.seed),
        objective,
        optimizer,
    )


def test_split(config: Config, dataset: datasets.Dataset) -> datasets.Split:
    """Return the test images as the network sees them: on the canvas, if there is one."""
    return datasets.placed(dataset.test, config.canvas) if config.canvas else dataset.test
