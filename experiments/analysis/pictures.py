"""The images at which a program looks closely: the user's own, or one of the test set."""

import dataclasses
import pathlib

import numpy as np

from capsjax.models import CapsNet
from experiments.cli import flag
from experiments.errors import InputError
from experiments.training.trained import Trained, read_images


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of every program that looks into capsules."""

    workdir: str = flag("runs/mnist", "Folder of a run of train_mnist; nothing is written to it.")
    data_dir: str = flag("", "Folder of the data set's files; empty: where the run had them.")
    images: str = flag("", "Image files to look at, separated by commas; empty: see --index.")
    index: int = flag(0, "Test image to look at, if no --images are named.", minimum=0)


def capsnet(run: Trained, workdir: str) -> CapsNet:
    """The run's network.

    Raises:
      InputError: It is one without capsules.
    """
    model = run.model
    if not isinstance(model, CapsNet):
        raise InputError(f"workdir {workdir} holds a {run.config.network}, which has no capsules")
    return model


def chosen(run: Trained, *, images: str, index: int) -> dict[str, np.ndarray]:
    """The pictures `[H, W, C]` in 0 … 1, by the names that their figures get.

    Raises:
      InputError: A file cannot be read, two have one name, or there is no such test image.
    """
    if not images:
        return {f"test_{index}": tested(run, index)}
    paths = images.split(",")
    names = [pathlib.Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        raise InputError(f"--images must have names of their own, got {', '.join(names)}")
    return dict(zip(names, read_images(run, paths), strict=True))


def tested(run: Trained, index: int) -> np.ndarray:
    """A test image `[H, W, C]` in 0 … 1.

    Raises:
      InputError: There are not so many.
    """
    if not 0 <= index < run.test.size:
        raise InputError(
            f"there is no test image {index}: {run.dataset.name} has {run.test.size}, from 0"
        )
    return run.test.images[index] / np.float32(255)
