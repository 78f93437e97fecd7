"""Selection of the network and the images that a visualisation program works on."""

import dataclasses
import pathlib

import numpy as np

from capsjax.models import CapsNet
from experiments.cli import flag
from experiments.errors import InputError
from experiments.training.trained import Trained, read_images


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings shared by the programs that visualise capsules."""

    workdir: str = flag(
        "runs/mnist",
        "Folder of a train_mnist run, or, for --images, a safetensors file of a CapsNet; it is "
        "only read.",
    )
    data_dir: str = flag("", "Folder of the data set's files; empty: the run's --data_dir.")
    images: str = flag("", "Image files, separated by commas; empty: use --index.")
    index: int = flag(
        0, "Index of a test image, used if --images is empty.", minimum=0, maximum=2**31 - 1
    )


def capsnet_of(run: Trained, workdir: str) -> CapsNet:
    """Return the capsule network of a run.

    Raises:
      InputError: The run's network has no capsules.
    """
    model = run.model
    if not isinstance(model, CapsNet):
        raise InputError(f"workdir {workdir} holds a {run.config.network}, which has no capsules")
    return model


def select_images(run: Trained, *, images: str, index: int) -> dict[str, np.ndarray]:
    """Load the user's image files or one test image.

    Args:
      run: The run whose network will see the images.
      images: Image files, separated by commas; empty: use `index`.
      index: Index of a test image.

    Returns:
      Images `[H, W, C]` in [0, 1], by the file name's stem or `test_INDEX`.

    Raises:
      InputError: A file cannot be read, two files have one name, or the index is out of range.
    """
    if not images:
        return {f"test_{index}": load_test_image(run, index)}
    paths = images.split(",")
    names = [pathlib.Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        raise InputError(f"--images must have different file names, got {', '.join(names)}")
    return dict(zip(names, read_images(run, paths), strict=True))


def load_test_image(run: Trained, index: int) -> np.ndarray:
    """Return a test image `[H, W, C]` in [0, 1].

    Raises:
      InputError: The index is out of range.
    """
    if not 0 <= index < run.test.size:
        raise InputError(
            f"test image {index} does not exist: {run.dataset.name} has 0 to {run.test.size - 1}"
        )
    return run.test.images[index] / np.float32(255)
