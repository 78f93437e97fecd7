"""The affNIST test set: MNIST digits under random affine transformations, on 40 x 40 pixels.

Source: Tijmen Tieleman, "affNIST", https://www.cs.toronto.edu/~tijmen/affNIST/. Where its files are
not available, `make_affnist_like` generates a similar set, which is always reported under the name
`affnist_like`.
"""

import os
from pathlib import Path

import numpy as np
from absl import logging

from experiments.data import matlab
from experiments.data.affine import Pose, uniform, warp
from experiments.data.datasets import Dataset, Split, centred
from experiments.errors import InputError

SIDE = 40  # pixels
_NUM_CLASSES = 10
_MNIST_NAMES = ("mnist", "mnist_small", "tfds:mnist")  # data sets of MNIST digits
# All 32 x 10,000 transformed test cases in one file, or the first 10,000. A bare test.mat is not
# accepted, because the author's just_centered/test.mat has the same fields without transformations.
_FILES = ("transformed/test.mat", "transformed/test_batches/1.mat")


def load_test_sets(
    dataset: Dataset, side: int, *, folder: str, data_dir: str = ""
) -> dict[str, Split]:
    """Load the affNIST test set, or generate an `affnist_like` one, for a given image size.

    Args:
      dataset: The training data of the networks; `affnist_like` is made from its test images.
      side: Height and width of the networks' images in pixels.
      folder: Folder of affNIST's files; empty: search `data_dir`.
      data_dir: Folder to search if `folder` is empty. Without affNIST's files in it, or if
        `dataset` is not MNIST, the result is `affnist_like`.

    Returns:
      The test set under its name, `affnist` or `affnist_like`; nothing if `side` is not 40.

    Raises:
      InputError: `folder` is given, but `side` is not 40, `dataset` is not MNIST, or the folder has
        no affNIST file; or a file cannot be read.
    """
    shape = dataset.test.images.shape[1:]
    is_mnist = shape[2] == 1 and dataset.name.split("/")[0] in _MNIST_NAMES
    description = f"{dataset.name} with images of {'x'.join(map(str, shape))}"
    if folder and side != SIDE:
        raise InputError(
            f"--affnist_dir needs runs with --canvas={SIDE}, got images of {side}x{side} pixels"
        )
    if folder and not is_mnist:
        raise InputError(
            f"--affnist_dir needs runs on MNIST digits ({', '.join(_MNIST_NAMES)}; 1 channel), "
            f"got {description}"
        )
    if side != SIDE:
        return {}
    path = find(folder or data_dir) if is_mnist else None
    if path:
        return {"affnist": read(path)}
    if folder:
        raise InputError(
            f"--affnist_dir={folder} has none of {', '.join(_FILES)}; download them from "
            "https://www.cs.toronto.edu/~tijmen/affNIST/"
        )
    reason = "neither --affnist_dir nor --data_dir names a folder with its files"
    if not is_mnist:
        reason = f"affNIST is made of MNIST digits (1 channel), but the runs are on {description}"
    elif data_dir:
        reason = f"--data_dir={data_dir} has none of {', '.join(_FILES)}"
    logging.info("using affnist_like, made from the test images, instead of affNIST: %s", reason)
    return {"affnist_like": make_affnist_like(dataset.test)}


def find(folder: str) -> Path | None:
    """Return the path of the transformed test set in a folder, or of its first part, or None."""
    # os.path, because Path's methods raise for names that are too long or of unknown users.
    paths = (Path(os.path.expanduser(folder), name) for name in _FILES)
    return next(filter(os.path.isfile, paths), None) if folder else None


def read(path: Path) -> Split:
    """Read a test set from one of affNIST's .mat files.

    Raises:
      InputError: The file does not hold images and labels of affNIST's shapes.
    """
    try:
        struct = matlab.read_struct(path, "affNISTdata", ("image", "label_int"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a MATLAB file with a struct affNISTdata that has image and label_int: "
            f"{error}"
        ) from error
    split = _to_split(struct["image"], struct["label_int"], path)
    logging.info("%s: %d test cases", path, split.size)
    return split


def _to_split(images: np.ndarray, labels: np.ndarray, path: Path) -> Split:
    """Check and reshape affNIST's arrays: each column of `images` is one image in row-major order.

    Raises:
      InputError: A shape, a type or a label is wrong; `path` is named in the message.
    """
    if images.dtype != np.uint8 or images.shape[0] != SIDE**2 or images.ndim != 2:
        raise InputError(
            f"{path}: image must be uint8 of shape ({SIDE**2}, N), got {images.dtype} of "
            f"{images.shape}"
        )
    size = images.shape[1]
    if not size or labels.shape not in ((1, size), (size, 1)):
        raise InputError(
            f"{path}: label_int must have shape (1, N), N = {size} as in image and at least 1, "
            f"got {labels.shape}"
        )
    labels = labels.reshape(size)
    if not np.isin(labels, np.arange(_NUM_CLASSES)).all():
        raise InputError(f"{path}: label_int must be whole numbers from 0 to {_NUM_CLASSES - 1}")
    return Split(
        np.ascontiguousarray(images.T).reshape(size, SIDE, SIDE, 1), labels.astype(np.int32)
    )


def make_affnist_like(split: Split) -> Split:
    """Generate a test set similar to affNIST from images, deterministically.

    Angle (±20°), shear (±0.2, a tangent), width and height (0.8 to 1.2) are independent and uniform
    in affNIST's published ranges. The bounding box of the transformed image's non-zero pixels is
    then placed uniformly at random inside 40 x 40 pixels. affNIST's page does not specify the
    interpolation (here bilinear) or the direction of the shear (here along the rows).

    Args:
      split: Images uint8 `[N, S, S, C]`, S at most 40, with their labels.

    Returns:
      Images uint8 `[N, 40, 40, C]`, with the same labels.
    """
    size = split.size
    images = centred(split.images, SIDE) / np.float32(255)
    angle, shear, width, height, row, column = uniform(6, size, key=[SIDE, size])
    pose = Pose.broadcast(
        size,
        rotation=20 * (2 * angle - 1),
        shear=np.degrees(np.arctan(0.2 * (2 * shear - 1))),
        scale=0.8 + 0.4 * np.stack([width, height], -1),
    )
    transformed = np.rint(255 * warp(images, pose)).astype(np.uint8)
    placed = np.zeros_like(transformed)
    for image, target, fractions in zip(
        transformed, placed, zip(row, column, strict=True), strict=True
    ):
        ink = image.any(-1)
        if ink.any():
            box = [_extent(ink.any(axis)) for axis in (1, 0)]
            corner = [
                int(fraction * (SIDE - (stop - start) + 1))
                for fraction, (start, stop) in zip(fractions, box, strict=True)
            ]
            (top, bottom), (left, right) = box
            rows = slice(corner[0], corner[0] + bottom - top)
            columns = slice(corner[1], corner[1] + right - left)
            target[rows, columns] = image[top:bottom, left:right]
    return Split(placed, split.labels)


def _extent(ink: np.ndarray) -> tuple[int, int]:
    """Return the half-open range from the first to the last true element of a vector."""
    indices = np.flatnonzero(ink)
    return int(indices[0]), int(indices[-1]) + 1
