"""Settings and trainer of classifiers for MNIST and data sets of its format."""

import dataclasses

from experiments.cli import flag
from experiments.data import datasets
from experiments.errors import InputError
from experiments.training import loop, networks, objectives, runs, transforms

MARGIN_EPOCHS = 10  # in which the margin of the spread loss grows; the paper does not say


@dataclasses.dataclass(frozen=True)
class Config(networks.Settings, runs.Settings):
    """Settings of train_mnist; the defaults are the paper's network, recipe and data."""

    network: str = flag(
        "capsnet",
        "capsnet; cnn: the paper's baseline for MNIST; pooling_cnn: a small CNN with max-pooling; "
        "or another capsule network with its paper's sizes, whose routing and channels no flag "
        "changes (matrix_capsnet: the small one).",
        choices=(*networks.NETWORKS, *networks.PUBLISHED),
    )
    ema_decay: float = flag(
        0.0,
        "Evaluate an exponential moving average of parameters and statistics with this decay a "
        "step, lower in the first steps; 0: the parameters themselves.",
        minimum=0,
        below=1,
        added=True,
    )
    reconstruction_weight: float = flag(
        5e-4,
        "Weight of the reconstruction loss, a sum of squares; 0: no decoder.",
        minimum=0,
        maximum=1e6,
    )
    shift: int = flag(
        2, "Largest random shift of training images, in pixels.", minimum=0, maximum=1000
    )
    rotation: float = flag(
        0.0,
        "Largest random rotation of training images, in degrees.",
        minimum=0,
        maximum=180,
        added=True,
    )
    scale: float = flag(
        0.0,
        "Largest random change of the size of what training images show: 0.1 is up to 10 % "
        "smaller or larger.",
        minimum=0,
        below=1,
        added=True,
    )
    canvas: int = flag(
        0,
        "Side of a black canvas to place images on at random, in pixels; 0: none.",
        minimum=0,
        maximum=1000,
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
    augmentation = transforms.Augmentation(
        shift=config.shift, rotation=config.rotation, scale=config.scale, canvas=config.canvas
    )
    task = dataset.num_classes, augmentation
    optimizer = loop.adam(
        config.learning_rate,
        final_learning_rate=config.final_learning_rate,
        num_steps=num_steps,
    )
    epoch_steps = dataset.train.size // config.batch_size
    objective: objectives.Objective
    match config.network:
        case "capsnet" | "efficient_capsnet" as name:
            objective = objectives.CapsuleClassification(
                *task, config.reconstruction_weight, name == "efficient_capsnet"
            )
        case "matrix_capsnet":
            objective = objectives.SpreadClassification(*task, MARGIN_EPOCHS * epoch_steps)
        case "sr_capsnet" | "inverted_attention_capsnet" as name:
            objective = objectives.NormalisedClassification(*task, name == "sr_capsnet")
        case _:
            objective = objectives.SoftmaxClassification(*task)
    return loop.Trainer(
        lambda: networks.build(config, shape, dataset.num_classes, seed=config.seed),
        objective,
        optimizer,
        average_decay=config.ema_decay,
    )


def test_split(config: Config, dataset: datasets.Dataset) -> datasets.Split:
    """Return the test images as the network sees them: on the canvas, if there is one."""
    return datasets.placed(dataset.test, config.canvas) if config.canvas else dataset.test
