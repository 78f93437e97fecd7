"""A data set of one's own: image files, one folder a class."""

import os
from pathlib import Path

import numpy as np
from absl import logging

from experiments.data import image_files
from experiments.errors import InputError

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_SPLITS = ("train", "test")
_TEST_SHARE = 6  # every sixth image of a class is a test image where there is no folder `test`
_MAX_SIDE = 256  # pixels; larger images are photographs
_MNIST_SHAPE = (28, 28, 1)

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


def read(folder: Path) -> tuple[Arrays, tuple[str, ...]]:
    """Read the images of a folder with one folder a class, in the order of their names.

    Images that all have one size of at most 256 x 256 pixels are read as they are, in grey if all
    are grey. Others are photographs of handwriting: the drawing on each is found and made 28 x 28
    pixels, as MNIST's digits are.

    Args:
      folder: It holds a folder a class, or `train` and `test`, which do. Without those two, every
        sixth image of each class is a test image.

    Returns:
      Images uint8 `[N, H, W, C]` and labels int64 `[N]` of `train` and `test`, and the names of the
      classes.

    Raises:
      InputError: The folder is missing or of another layout, or an image cannot be read.
    """
    if not os.path.isdir(folder):
        raise InputError(f"--dataset=folder:{folder}: there is no such folder.")
    roots = {split: folder / split for split in _SPLITS}
    has_splits = all(map(os.path.isdir, roots.values()))
    names = _classes(roots["train"] if has_splits else folder)
    paths: dict[str, list[tuple[str, int]]] = {split: [] for split in _SPLITS}
    if has_splits and (unknown := sorted(set(_classes(roots["test"])) - set(names))):
        raise InputError(f"{roots['test']}: {', '.join(unknown)} is no class of {roots['train']}.")
    for label, name in enumerate(names):
        if has_splits:
            for split, root in roots.items():
                paths[split] += [(path, label) for path in _images(root / name)]
        else:
            for index, path in enumerate(_images(folder / name)):
                is_test = index % _TEST_SHARE == _TEST_SHARE - 1
                paths["test" if is_test else "train"].append((path, label))
    for split, found in paths.items():
        if not found:
            raise InputError(
                f"{folder}: there are no {split} images: a class needs {_TEST_SHARE} images, or "
                "there must be the folders train and test."
            )
    shape = _shape([path for found in paths.values() for path, _ in found])
    arrays = {
        split: (
            np.stack([_pixels(path, shape) for path, _ in found]),
            np.array([label for _, label in found]),
        )
        for split, found in paths.items()
    }
    return arrays, names


def _classes(folder: Path) -> tuple[str, ...]:
    names = [name for name in sorted(os.listdir(folder)) if os.path.isdir(folder / name)]
    names = [name for name in names if not name.startswith(".")]
    if len(names) < 2:
        raise InputError(
            f"{folder}: there must be one folder of images for each of at least 2 classes, "
            f"got {', '.join(names) or 'none'}."
        )
    # Folders 2 and 10 in the order of their numbers.
    return tuple(sorted(names, key=int) if all(map(str.isdecimal, names)) else names)


def _images(folder: Path) -> list[str]:
    if not os.path.isdir(folder):
        return []
    files = [name for name in sorted(os.listdir(folder)) if name.lower().endswith(_SUFFIXES)]
    return [str(folder / name) for name in files]


def _shape(paths: list[str]) -> tuple[int, int, int] | None:
    """Return the shape H, W, C of all images, or None where they are photographs."""
    first, is_grey = image_files.open_image(paths[0]).size, True
    for path in paths:
        image = image_files.open_image(path)
        if image.size != first or max(first) > _MAX_SIDE:
            logging.warning(
                "%s is of %d x %d pixels, and images that are not all of one size of at most "
                "%d x %d are read as photographs: what is drawn on each is made 28 x 28 pixels",
                path, image.height, image.width, _MAX_SIDE, _MAX_SIDE,
            )  # fmt: skip
            return None
        red, green, blue, _ = np.moveaxis(np.asarray(image), -1, 0)
        is_grey = is_grey and bool((red == green).all() and (green == blue).all())
    return first[1], first[0], 1 if is_grey else 3


def _pixels(path: str, shape: tuple[int, int, int] | None) -> np.ndarray:
    if shape is None:
        return np.rint(255 * image_files.read_images([path], shape=_MNIST_SHAPE)[0]).astype(
            np.uint8
        )
    image = image_files.open_image(path)
    return np.asarray(image)[..., : shape[2]]
