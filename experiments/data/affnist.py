"""affNIST, from its author's files, and a set made here that is like it and is not it.

Source: Tijmen Tieleman, "affNIST", https://www.cs.toronto.edu/~tijmen/affNIST/: MNIST's digits,
turned, sheared, scaled and placed at random on 40 x 40 pixels.
"""

import os
from pathlib import Path

import numpy as np
from absl import logging

from experiments.data import matlab
from experiments.data.affine import Pose, uniform, warped
from experiments.data.datasets import Dataset, Split, centred
from experiments.errors import InputError

SIDE = 40  # pixels
_NUM_CLASSES = 10
_MNIST = ("mnist", "mnist_small", "tfds:mnist")  # data sets of the digits that affNIST is made from
# Of the transformed version: all 32 x 10,000 test cases in one file, or the first 10,000. Never a
# bare test.mat: the author's just_centered/test.mat has the same fields, and nothing is moved.
_FILES = ("transformed/test.mat", "transformed/test_batches/1.mat")


def cases(dataset: Dataset, side: int, *, folder: str, data_dir: str = "") -> dict[str, Split]:
    """The test cases for networks of that image size, by what they must be called.

    Args:
      dataset: What the networks were trained on; `affnist_like` is made from its test images.
      side: Pixels a side of the networks' images; nothing but 40 has test cases.
      folder: With affNIST's files, for networks trained on MNIST's digits; empty: `data_dir`.
      data_dir: May have them; if it does not, or is empty, or the digits are not MNIST's:
        `affnist_like` instead.

    Raises:
      InputError: There is a folder but the size or the data set is another, or it has no such file;
        or a file cannot be read.
    """
    shape = dataset.test.images.shape[1:]
    is_mnist = shape[2] == 1 and dataset.name.split("/")[0] in _MNIST
    own = f"{dataset.name} with images of {'x'.join(map(str, shape))}"
    if folder and side != SIDE:
        raise InputError(
            f"--affnist_dir needs runs with --canvas={SIDE}, got images of {side}x{side} pixels"
        )
    if folder and not is_mnist:
        raise InputError(
            f"--affnist_dir needs runs on MNIST's digits ({', '.join(_MNIST)}; 1 channel), "
            f"got {own}"
        )
    if side != SIDE:
        return {}
    path = find(folder or data_dir) if is_mnist else None
    if path:
        return {"affnist": read(path)}
    if folder:
        raise InputError(
            f"--affnist_dir={folder} has none of {', '.join(_FILES)}; they are in the archives of "
            "https://www.cs.toronto.edu/~tijmen/affNIST/"
        )
    reason = "neither --affnist_dir nor --data_dir names a folder with its files"
    if not is_mnist:
        reason = f"it is of MNIST's digits (1 channel), and the runs are on {own}"
    elif data_dir:
        reason = f"--data_dir={data_dir} has none of {', '.join(_FILES)}"
    logging.info("affnist_like is made from the test images in place of affNIST: %s", reason)
    return {"affnist_like": affnist_like(dataset.test)}


def find(folder: str) -> Path | None:
    """The file with the transformed test set in a folder, or else with its first part, if any."""
    # Unlike Path's own methods, these take names that are too long, or of users that do not exist.
    paths = (Path(os.path.expanduser(folder), name) for name in _FILES)
    return next(filter(os.path.isfile, paths), None) if folder else None


def read(path: Path) -> Split:
    """Reads the test cases from one of the author's files.

    Raises:
      InputError: It does not hold images and labels of affNIST's shape.
    """
    try:
        struct = matlab.read_struct(path, "affNISTdata", ("image", "label_int"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a MATLAB file with a struct affNISTdata that has image and label_int: "
            f"{error}"
        ) from error
    split = _checked(struct["image"], struct["label_int"], path)
    logging.info("%s: %d test cases", path, split.size)
    return split


def _checked(images: np.ndarray, labels: np.ndarray, path: Path) -> Split:
    """A column is an image, row after row."""
    if images.dtype != np.uint8 or images.shape[0] != SIDE**2 or images.ndim != 2:
        raise InputError(
            f"{path}: image must be uint8 of shape ({SIDE**2}, N), got {images.dtype} of "
            f"{images.shape}"
        )
    size = images.shape[1]
    if not size or labels.shape not in ((1, size), (size, 1)):
        raise InputError(
            f"{path}: label_int must have shape (1, N) with the N = {size} of image, one at least, "
            f"got {labels.shape}"
        )
    labels = labels.reshape(size)
    if not np.isin(labels, np.arange(_NUM_CLASSES)).all():
        raise InputError(f"{path}: label_int must be whole numbers from 0 to {_NUM_CLASSES - 1}")
    return Split(
        np.ascontiguousarray(images.T).reshape(size, SIDE, SIDE, 1), labels.astype(np.int32)
    )


def affnist_like(split: Split) -> Split:
    """Makes a set like affNIST from images; the same in every call, and never to be called affNIST.

    Each image is turned by up to 20 degrees either way, sheared by up to 0.2 (the tangent), width
    and height are scaled by 0.8 to 1.2, each uniformly and on its own: affNIST's published ranges.
    Then its box of ink is placed where it fits into 40 x 40 pixels, every place being as likely.
    Ours are the interpolation (linear), the direction of the shear (along the rows) and what
    counts as ink (any pixel that is not 0 of 255).

    Args:
      split: Images uint8 `[N, S, S, C]` of at most 40 pixels a side.
    """
    size = split.size
    images = centred(split.images, SIDE) / np.float32(255)
    angle, lean, width, height, row, column = uniform(6, size, key=[SIDE, size])
    pose = Pose.of(
        size,
        rotation=20 * (2 * angle - 1),
        shear=np.degrees(np.arctan(0.2 * (2 * lean - 1))),
        scale=0.8 + 0.4 * np.stack([width, height], -1),
    )
    moved = np.rint(255 * warped(images, pose)).astype(np.uint8)
    placed = np.zeros_like(moved)
    for image, target, places in zip(moved, placed, zip(row, column, strict=True), strict=True):
        ink = image.any(-1)
        if ink.any():
            box = [_extent(ink.any(axis)) for axis in (1, 0)]
            corner = [
                int(place * (SIDE - (stop - start) + 1))
                for place, (start, stop) in zip(places, box, strict=True)
            ]
            (top, bottom), (left, right) = box
            rows = slice(corner[0], corner[0] + bottom - top)
            columns = slice(corner[1], corner[1] + right - left)
            target[rows, columns] = image[top:bottom, left:right]
    return Split(placed, split.labels)


def _extent(ink: np.ndarray) -> tuple[int, int]:
    """Where ink starts, and where it has stopped."""
    found = np.flatnonzero(ink)
    return int(found[0]), int(found[-1]) + 1
