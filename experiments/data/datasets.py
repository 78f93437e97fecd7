"""Data sets by name, the order of training batches, and a user's own images."""

import hashlib
import itertools
import os
import re
import struct
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps

from experiments.data import idx
from experiments.errors import InputError

MNIST_SMALL = Path(__file__).parent / "mnist_small" / "mnist_small.npz"
_MNIST_SMALL_NPZ = "18c9b695305efafd33c7c538f6438582dada91986c65f4e078b8868bce0d18bb"
# As Keras itself checks it: keras.datasets.mnist.load_data, argument file_hash.
_KERAS_NPZ = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
# `Dataset.sha256` of the published files.
_MNIST = "b0b75c7f5724eba07d4667d9b28ea5fdf9f225df12c75ea697d8f200525cc2b2"
_NUM_CLASSES = 10  # of MNIST and Fashion-MNIST
# torchvision's folder of each set, below the root given to it.
_TORCHVISION = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}
# Where other programs leave the idx files; "data" is the root in torchvision's own examples.
_CACHES = {
    "mnist": ("data/MNIST/raw",),
    "fashion_mnist": (
        "data/FashionMNIST/raw",
        "~/.keras/datasets/fashion-mnist",
        "/usr/share/datasets/fashion-mnist",
    ),
}
_BLANK = 0.1  # of white: an image with less contrast shows nothing
# Of the contrast: what differs less from the background is background. Clean digits are recognised
# equally well with 0.1 to 0.3, but below 0.3 the noise of a camera passes for ink.
_INK = 0.3
_WORKING_SIZE = 1024  # pixels a side: larger images are scaled down before anything else
_IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")


class Examples(Protocol):
    """What training takes batches from: examples in memory, or made when asked for."""

    @property
    def size(self) -> int:
        """N, how many there are."""

    @property
    def labels(self) -> np.ndarray:
        """The labels of all, int32 `[N, ...]`."""

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images, uint8, and the labels of these examples."""


class Split(NamedTuple):
    """The training or the test half of a data set."""

    images: np.ndarray  # uint8 [N, S, S, C]
    labels: np.ndarray  # int32 [N]

    @property
    def size(self) -> int:
        """N."""
        return len(self.labels)

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels at these indices."""
        return self.images[indices], self.labels[indices]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in memory, and a digest that says which they are."""

    name: str
    num_classes: int
    train: Split
    test: Split
    sha256: str  # over the decoded arrays and their shapes: idx, idx.gz and npz give the same


def load(name: str, *, data_dir: str = "", download: bool = False) -> Dataset:
    """Loads a data set by its name, and never another in its place.

    Args:
      name: `mnist_small` (comes with the programs), `mnist`, `fashion_mnist` or `tfds:<name>`.
      data_dir: the only folder to search: for idx or idx.gz files, there or in the subfolder that
        torchvision makes, and for a data set prepared by TFDS. If empty, the places where
        torchvision, Keras, Debian and TFDS leave their files.
      download: whether TFDS may fetch what was not found.

    Raises:
      InputError: The name is unknown, or the data are missing, damaged or of another kind.
    """
    if name == "mnist_small":
        if data_dir:
            raise InputError(
                "mnist_small comes with the programs and takes no --data_dir; "
                f"name the data set in {data_dir} with --dataset=mnist."
            )
        return _from_npz(name, MNIST_SMALL, sha256=_MNIST_SMALL_NPZ, keys="{}_images {}_labels")
    if not re.fullmatch(r"mnist|fashion_mnist|tfds:\w+(/[\w.-]+)*", name):
        raise InputError(
            f"--dataset must be mnist_small, mnist, fashion_mnist or tfds:<name>, got {name!r}."
        )
    root = Path(os.path.expanduser(data_dir)) if data_dir else None
    # Unlike Path's own methods, these take names that are too long.
    if root and not (os.path.isdir(root) and os.access(root, os.R_OK | os.X_OK)):
        raise InputError(f"--data_dir must be a folder that can be read, got {data_dir}.")

    if name.startswith("tfds:"):
        _import_tfds(name)  # without it, nothing below can succeed

    looked_for = []
    for folder in _idx_folders(name, root):
        if paths := idx.locate(folder):
            return _from_idx(name, paths)
        looked_for.append(f"the four idx or idx.gz files in {folder}")
    if name == "mnist" and not root:
        path = Path("~/.keras/datasets/mnist.npz").expanduser()
        if os.path.isfile(path):
            return _from_npz(name, path, sha256=_KERAS_NPZ, keys="x_{} y_{}")
        looked_for.append(str(path))
    tfds_name = name.removeprefix("tfds:")
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    tfds_root = root or Path(default).expanduser()
    if prepared := _prepared(tfds_name, tfds_root):
        return _from_tfds(name, prepared)
    looked_for.append(f"a data set prepared by TFDS in {tfds_root / tfds_name}")
    if download:
        return _from_tfds(name, _download(tfds_name, tfds_root))
    raise InputError(
        f"{name} was not found. Looked for {'; '.join(looked_for)}. Give its folder with "
        "--data_dir=DIR, or let TFDS fetch it with --download, or train on the images that come "
        "with the programs with --dataset=mnist_small."
    )


def placed(split: Split, canvas: int) -> Split:
    """The images, each somewhere on a black canvas; where is the same in every call.

    As the expanded MNIST test set of Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules",
    section 5.2, https://arxiv.org/abs/1710.09829, with 40 pixels.
    """
    size, side = split.size, split.images.shape[1]
    # As in `_batches`: bits whose meaning does not change between versions of NumPy.
    bits = np.random.Philox(key=np.array([canvas, size], np.uint64)).random_raw(2 * size)
    corners = (bits % np.uint64(canvas - side + 1)).astype(int).reshape(size, 2)
    images = np.zeros((size, canvas, canvas, split.images.shape[3]), np.uint8)
    for image, original, (row, column) in zip(images, split.images, corners, strict=True):
        image[row : row + side, column : column + side] = original
    return Split(images, split.labels)


def centred(images: np.ndarray, canvas: int) -> np.ndarray:
    """Images `[N, S, S, C]` in the middle of a black canvas, which is no smaller than they are."""
    free = canvas - images.shape[1]
    edges = (free // 2, free - free // 2)
    return np.pad(images, ((0, 0), edges, edges, (0, 0)))


def batches(
    num_examples: int, *, batch_size: int, seed: int, first_step: int = 0
) -> Iterator[np.ndarray]:
    """Yields the indices of one training batch after another, int32 [batch_size], for ever.

    An epoch is `num_examples // batch_size` steps through a permutation of its own. The remainder
    of the permutation, fewer than `batch_size` examples and others in every epoch, is left out.
    The stream depends on the arguments alone: starting at `first_step` gives what an unbroken
    stream gives from there on.

    Args:
      num_examples: size of the training split.
      batch_size: indices per batch.
      seed: of all permutations, 0 to 2**64 - 1.
      first_step: how many batches to skip.

    Raises:
      InputError: The batch is empty or larger than the data, or the seed is out of range.
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"--seed must be 0 to 2**64 - 1, got {seed}.")
    if not 1 <= batch_size <= num_examples:
        raise InputError(
            f"--batch_size must be 1 to {num_examples}, the number of training images, "
            f"got {batch_size}."
        )
    return _batches(num_examples, batch_size, seed, first_step)


def _batches(
    num_examples: int, batch_size: int, seed: int, first_step: int
) -> Iterator[np.ndarray]:
    first_epoch, skipped = divmod(first_step, num_examples // batch_size)
    for epoch in itertools.count(first_epoch):
        # Not Generator.permutation: NumPy keeps the bits of Philox from version to version, but
        # not what its Generator makes of them.
        bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_examples)
        order = np.argsort(bits, kind="stable").astype(np.int32)
        del bits  # else 8 bytes an example are held all epoch
        for start in range(skipped * batch_size, num_examples - batch_size + 1, batch_size):
            yield order[start : start + batch_size]
        skipped = 0


def read_images(paths: Sequence[str], *, image_size: int, channels: int) -> np.ndarray:
    """Reads a user's own images into the form of a data set's.

    For 1 channel, as MNIST was made from its scans: what differs from the background (the median
    of the border) by at least 0.3 of the contrast is ink; its bounding box is scaled so that the
    longer side is 20 / 28 of the image, and placed with its centre of mass in the middle. Dark ink
    on light ground is inverted. For 3 channels: scaled, with what exceeds a square cut off evenly
    on both sides. Transparent parts count as white.

    Args:
      paths: BMP, GIF, JPEG, PNG or WebP files of any size.
      image_size: S, width and height of the result in pixels.
      channels: C, 1 or 3.

    Returns:
      Images in 0 to 1, float32 [N, S, S, C]; ink is light on dark.

    Raises:
      InputError: A file is missing, unreadable, too large to be safe, or blank.
    """
    return np.stack([_read_image(path, image_size, channels) for path in paths])


def _idx_folders(name: str, root: Path | None) -> list[Path]:
    if name.startswith("tfds:"):
        return []
    if root:
        return [root, root / _TORCHVISION[name]]
    return [Path(folder).expanduser() for folder in _CACHES[name]]


def _from_idx(name: str, paths: dict[str, Path]) -> Dataset:
    splits = {}
    for split, (images_stem, labels_stem) in idx.STEMS.items():
        images, labels = idx.read_images(paths[images_stem]), idx.read_labels(paths[labels_stem])
        where = f"{paths[images_stem]} and {paths[labels_stem].name}"
        splits[split] = _split(images, labels, _NUM_CLASSES, where)
    dataset = _dataset(name, _NUM_CLASSES, **splits)
    if name == "fashion_mnist" and dataset.sha256 == _MNIST:
        folder = paths["train-images-idx3-ubyte"].parent
        raise InputError(f"{folder}: the files are MNIST's, not Fashion-MNIST's; --dataset=mnist.")
    return dataset


def _from_npz(name: str, path: Path, *, sha256: str, keys: str) -> Dataset:
    try:
        with path.open("rb") as stream:
            # Before NumPy looks at it: the sizes in an npz can only be trusted if all of it can.
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest == sha256:
                stream.seek(0)
                with np.load(stream, allow_pickle=False) as archive:
                    arrays = dict(archive)
    except OSError as error:
        raise InputError(f"{path}: the file cannot be read: {error}.") from error
    if digest != sha256:
        raise InputError(
            f"{path}: the file is damaged or another: its sha256 must be {sha256}, got {digest}."
        )
    splits = {}
    for split in idx.STEMS:
        images_key, labels_key = keys.replace("{}", split).split()
        images, labels = arrays[images_key][..., None], arrays[labels_key]
        splits[split] = _split(images, labels, _NUM_CLASSES, str(path))
    return _dataset(name, _NUM_CLASSES, **splits)


def _prepared(name: str, root: Path) -> Path | None:
    """The folder of the newest version prepared; `tfds.builder` might ask the network instead."""
    folders = [path.parent for path in (root / name).glob("*.*.*/dataset_info.json")]
    folders = [folder for folder in folders if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)]
    if (root / name / "dataset_info.json").is_file():
        return root / name
    return max(folders, key=lambda path: tuple(map(int, path.name.split("."))), default=None)


def _import_tfds(name: str) -> ModuleType:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise InputError(
            f"{name} needs the package tensorflow_datasets, which cannot be imported ({error}): "
            "pip install 'capsjax[tfds]'."
        ) from error
    return tensorflow_datasets


def _download(name: str, root: Path) -> Path:
    tfds = _import_tfds(name)
    try:
        # Not TFDS's default, tfrecord: reading that needs TensorFlow.
        builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
        builder.download_and_prepare()
    except (ImportError, OSError, RuntimeError, ValueError, tfds.download.DownloadError) as error:
        raise InputError(f"{name}: TFDS cannot fetch or prepare it: {_one_line(error)}") from error
    return Path(builder.data_path)


def _from_tfds(name: str, folder: Path) -> Dataset:
    tfds = _import_tfds(name)
    from google.protobuf import json_format

    # What TFDS and the libraries below it raise for files that are damaged or of another format.
    unusable = (KeyError, OSError, RuntimeError, ValueError, json_format.Error)
    try:
        builder = tfds.builder_from_directory(folder)
        features, sources = dict(builder.info.features), builder.as_data_source()
    except unusable as error:
        raise InputError(f"{folder}: TFDS cannot read it: {_one_line(error)}") from error
    image, label = features.get("image"), features.get("label")
    if not (
        isinstance(image, tfds.features.Image)
        and isinstance(label, tfds.features.ClassLabel)
        and label.num_classes
        and {"train", "test"} <= set(sources)
    ):
        raise InputError(
            f"{folder}: a data set must have an image, a label that is a class, and the splits "
            f"train and test, got {', '.join(features)} and {', '.join(sources)}."
        )
    splits = {}
    for split in idx.STEMS:
        images: list[np.ndarray] = []
        labels: list[int] = []
        try:
            source = sources[split]
            for index in range(len(source)):
                example = source[index]
                images.append(example["image"])
                labels.append(example["label"])
        except unusable as error:
            raise InputError(f"{folder}: TFDS cannot read {split}: {_one_line(error)}") from error
        kinds = sorted({(image.shape, image.dtype.name) for image in images})
        if len(kinds) > 1:
            raise InputError(
                f"{folder}: the images of {split} must all have one shape, got {kinds[:4]}."
            )
        splits[split] = _split(np.array(images), np.array(labels), label.num_classes, str(folder))
    return _dataset(name, label.num_classes, **splits)


def _one_line(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def _split(images: np.ndarray, labels: np.ndarray, num_classes: int, where: str) -> Split:
    if len(images) != len(labels) or not len(images):
        raise InputError(
            f"{where}: there must be one label for every image and at least one image, "
            f"got {len(images)} images and {len(labels)} labels."
        )
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] not in (1, 3):
        raise InputError(
            f"{where}: images must be square and have 1 or 3 channels, "
            f"got height, width, channels = {images.shape[1:]}."
        )
    if images.dtype != np.uint8:
        raise InputError(f"{where}: images must be uint8, got {images.dtype}.")
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        raise InputError(
            f"{where}: labels must be 0 to {num_classes - 1}, "
            f"got {labels[outside[0]]} at index {outside[0]}."
        )
    return Split(images, labels.astype(np.int32))


def _dataset(name: str, num_classes: int, train: Split, test: Split) -> Dataset:
    if train.images.shape[1:] != test.images.shape[1:]:
        raise InputError(
            f"{name}: training and test images must have one shape, "
            f"got {train.images.shape[1:]} and {test.images.shape[1:]}."
        )
    digest = hashlib.sha256()
    for array in (*train, *test):
        digest.update(repr((array.shape, array.dtype.name)).encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return Dataset(name, num_classes, train, test, digest.hexdigest())


def _read_image(path: str, image_size: int, channels: int) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_IMAGE_FORMATS) as opened:
                image = ImageOps.exif_transpose(opened)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: the image is too large: {error}") from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise InputError(f"{path}: the image cannot be read: {_one_line(error)}") from error
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"{path}: an image must have 8 bits per channel, got Pillow's mode {image.mode}."
        )
    image = image.convert("RGBA")
    image.thumbnail((_WORKING_SIZE, _WORKING_SIZE))
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(image, np.float32) / 255
    if np.ptp(pixels, axis=(0, 1)).max() < _BLANK:
        raise InputError(f"{path}: the image is blank: nothing in it stands out by {_BLANK:.0%}.")
    if channels == 1:
        return _fit_digit(pixels, image_size)[..., None]
    return np.asarray(ImageOps.fit(image, (image_size, image_size)), np.float32) / 255


def _fit_digit(pixels: np.ndarray, image_size: int) -> np.ndarray:
    background = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]))
    dark_ink = background > (pixels.min() + pixels.max()) / 2
    ink = background - pixels if dark_ink else pixels - background
    ink = np.where(ink < _INK * ink.max(), 0, ink / ink.max())
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    scale = image_size * 20 / 28 / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    resized = Image.fromarray(ink).resize((width, height), Image.Resampling.BOX)
    digit = np.asarray(resized)
    middle = [
        np.average(np.arange(side), weights=digit.sum(axis=1 - axis))
        for axis, side in enumerate(digit.shape)
    ]
    top, left = (
        min(max(0, round(image_size / 2 - centre)), image_size - side)
        for centre, side in zip(middle, digit.shape, strict=True)
    )
    result = np.zeros((image_size, image_size), np.float32)
    result[top : top + height, left : left + width] = digit
    return result
