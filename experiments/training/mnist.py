"""Settings and trainer of classifiers for MNIST and data sets of its format."""

import dataclasses

import numpy as np

from experiments.cli import flag
from experiments.data import datasets, smallnorb
from experiments.errors import InputError
from experiments.training import loop, networks, objectives, runs, transforms

MARGIN_EPOCHS = 10  # in which the margin of the spread loss grows; the paper does not say


@dataclasses.dataclass(frozen=True)
class Config(networks.Settings, runs.Settings):
    """Settings of train_mnist; the defaults are the paper's network, recipe and data."""

    network: str = flag(
        "capsnet",
        "capsnet; cnn: the paper's baseline for MNIST; pooling_cnn: a small CNN with max-pooling; "
        "pooling_cnn_160k and pooling_cnn_8m: as many parameters as efficient_capsnet and capsnet; "
        "or another capsule network with its paper's sizes, whose routing and channels no flag "
        "changes (matrix_capsnet: the small one; efficient_capsnet: the one for MNIST).",
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
    crop: int = flag(
        0,
        "Side of the part of each image that the network sees, in pixels: a random one in "
        "training, the central one after; 0: all.",
        minimum=0,
        maximum=1000,
        added=True,
    )
    standardize: bool = flag(
        False,
        "Give each image, after --crop, mean 0 and variance 1, in training and after.",
        added=True,
    )
    brightness: float = flag(
        0.0,
        "Largest random value added to all pixels of a training image, of which white has 1, or, "
        "with --standardize, the variance is 1.",
        minimum=0,
        maximum=100,
        added=True,
    )
    contrast: float = flag(
        0.0,
        "Largest random change of the contrast of training images: 0.1 is up to 10 % weaker or "
        "stronger.",
        minimum=0,
        maximum=1,
        added=True,
    )
    viewpoints: str = flag(
        "all",
        "Viewpoints of smallNORB to train on; azimuth and elevation: only a third, and tests are "
        "on the others.",
        choices=smallnorb.VIEWPOINTS,
        added=True,
    )
    diagnostics: bool = flag(
        False, "Measure and draw the routing after each epoch.", affects_result=False
    )

    @property
    def side(self) -> int:
        """Height and width of the images that the network sees; 0: those of the data set's."""
        return self.canvas or self.crop


def select_viewpoints(config: Config, dataset: datasets.Dataset) -> datasets.Dataset:
    """Keep the training images of the viewpoints to train on, and the test images of the others.

    The test images of the viewpoints of training become `Dataset.familiar`. With
    `--viewpoints=all` the data set is returned as it is.

    Raises:
      InputError: The data set has no viewpoints, or no image of some of them.
    """
    if config.viewpoints == "all":
        return dataset
    if not dataset.info:
        raise InputError(
            f"--viewpoints={config.viewpoints} needs --dataset=smallnorb or tfds:smallnorb, got "
            f"--dataset={config.dataset}"
        )
    is_familiar = {
        split: smallnorb.is_familiar(info, config.viewpoints)
        for split, info in dataset.info.items()
    }
    train, familiar, test = (
        datasets.Split(*split.take(np.flatnonzero(chosen)))
        for split, chosen in (
            (dataset.train, is_familiar["train"]),
            (dataset.test, is_familiar["test"]),
            (dataset.test, ~is_familiar["test"]),
        )
    )
    if not (train.size and familiar.size and test.size):
        raise InputError(
            f"--viewpoints={config.viewpoints} needs images of all viewpoints, got {train.size} to "
            f"train on, {familiar.size} to test from the same viewpoints and {test.size} from "
            "others"
        )
    return dataclasses.replace(dataset, train=train, test=test, familiar=familiar)


def build(config: Config, dataset: datasets.Dataset) -> loop.Trainer:
    """Build the network, objective and optimizer of a Config for a data set.

    Raises:
      InputError: The images are too small for the network, the shift or the crop, or too large for
        the canvas, or the batch is larger than the data.
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
    if config.crop and (config.canvas or config.crop > side):
        raise InputError(
            f"--crop must be 0 or at most the {side} pixels of the images, without --canvas, "
            f"got {config.crop}"
        )
    shape = config.side or height, config.side or width, channels
    names = [field.name for field in dataclasses.fields(transforms.Augmentation)]
    augmentation = transforms.Augmentation(**{name: getattr(config, name) for name in names})
    task = dataset.num_classes, augmentation
    optimizer = loop.adam(
        config.learning_rate,
        final_learning_rate=config.final_learning_rate,
        num_steps=num_steps,
    )
    epoch_steps = dataset.train.size // config.batch_size
    objective: objectives.Objective
    match config.network:
        case "capsnet" | "efficient_capsnet" | "efficient_capsnet_small_norb" as name:
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
    """Return the test images of the size that the network sees: on the canvas, or cropped."""
    if config.canvas:
        return datasets.placed(dataset.test, config.canvas)
    if config.crop:
        images = datasets.centred(dataset.test.images, config.crop)
        return dataset.test._replace(images=images)
    return dataset.test
