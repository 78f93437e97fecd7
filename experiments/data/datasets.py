"""Image classification data sets, and the order of training batches.

Shape letters: N examples; H, W height and width of an image; C channels: 1, 3, or 2 of
stereo pairs.
"""

import hashlib
import itertools
import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import logging

from experiments.data import folders, idx, smallnorb
from experiments.errors import InputError

MNIST_SMALL = Path(__file__).parent / "mnist_small" / "mnist_small.npz"
_MNIST_SMALL_SHA256 = "18c9b695305efafd33c7c538f6438582dada91986c65f4e078b8868bce0d18bb"
# The file_hash that keras.datasets.mnist.load_data checks.
_KERAS_NPZ_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
# `Dataset.sha256` of the published MNIST files.
_MNIST_SHA256 = "b0b75c7f5724eba07d4667d9b28ea5fdf9f225df12c75ea697d8f200525cc2b2"
_NUM_CLASSES = 10  # of MNIST and Fashion-MNIST
# Subfolder that torchvision makes for each data set.
_TORCHVISION_FOLDERS = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}
_TFDS = r"tfds:\w+(/[\w.-]+)*"
_EMNIST = ("balanced", "byclass", "bymerge", "digits", "letters", "mnist")
# Default folders of idx files: torchvision with root "data" (as in its examples), Keras, Debian.
_CACHE_FOLDERS = {
    "mnist": ("data/MNIST/raw",),
    "fashion_mnist": (
        "data/FashionMNIST/raw",
        "~/.keras/datasets/fashion-mnist",
        "/usr/share/datasets/fashion-mnist",
    ),
}


class Examples(Protocol):
    """A source of labelled images for training, in memory or generated on demand."""

    @property
    def size(self) -> int:
        """Return the number of examples, N."""

    @property
    def labels(self) -> np.ndarray:
        """Return the labels of all examples, int32 `[N, ...]`."""

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the images (uint8) and the labels (int32) at the given indices."""


class Split(NamedTuple):
    """The training or the test part of a data set."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]

    @property
    def size(self) -> int:
        """Return the number of examples, N."""
        return len(self.labels)

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the images and labels at the given indices."""
        return self.images[indices], self.labels[indices]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory, with a digest of its content."""

    name: str
    num_classes: int
    train: Split
    test: Split
    sha256: str  # of the decoded arrays and their shapes, so independent of the file format
    class_names: tuple[str, ...] = ()  # empty: the numbers from 0
    # Viewpoints of smallNORB by split, as in `smallnorb.Part`; empty for other data sets.
    info: dict[str, np.ndarray] = field(default_factory=dict)
    familiar: Split | None = None  # test images from the viewpoints of training, if separate

    @property
    def facts(self) -> dict[str, Any]:
        """What a run notes, so that it can be looked into without its data; as JSON has it."""
        return {
            "image_shape": list(self.train.images.shape[1:]),
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
        }


def load(name: str, *, data_dir: str = "", download: bool = False) -> Dataset:
    """Load a data set by its name.

    Args:
      name: `mnist_small` (included with the programs), `mnist`, `fashion_mnist`, `emnist_letters`
        and the other parts of EMNIST, `smallnorb`, `folder:DIR` (one folder of images a class,
        below `train` and `test` or not), or `tfds:<name>`.
      data_dir: Folder to search for the data set's files, gzipped or not, directly or in
        torchvision's subfolder, and for a data set prepared by TFDS. Empty: the
        default folders of torchvision, Keras, Debian and TFDS.
      download: Whether to download a missing data set with TFDS.

    Raises:
      InputError: The name is unknown, or the data are missing, damaged or not image classification.
    """
    if name == "mnist_small":
        if data_dir:
            raise InputError(
                "mnist_small comes with the programs and takes no --data_dir; "
                f"name the data set in {data_dir} with --dataset=mnist."
            )
        return _from_npz(name, MNIST_SMALL, sha256=_MNIST_SMALL_SHA256, keys="{}_images {}_labels")
    if name.startswith("folder:"):
        if data_dir:
            raise InputError(f"--dataset={name} names its folder itself and takes no --data_dir.")
        return _from_folder(name, Path(os.path.expanduser(name.removeprefix("folder:"))))
    if not re.fullmatch(
        rf"mnist|fashion_mnist|emnist_({'|'.join(_EMNIST)})|smallnorb|{_TFDS}", name
    ):
        raise InputError(
            "--dataset must be mnist_small, mnist, fashion_mnist, emnist_<part> "
            f"({', '.join(_EMNIST)}), smallnorb, folder:<DIR> or tfds:<name>, got {name!r}."
        )
    root = Path(os.path.expanduser(data_dir)) if data_dir else None
    # os.path, because Path's methods raise for names that are too long.
    if root and not (os.path.isdir(root) and os.access(root, os.R_OK | os.X_OK)):
        raise InputError(f"--data_dir must be a folder that can be read, got {data_dir}.")

    if name.startswith("tfds:"):
        _import_tfds(name)  # fail early if the package is missing

    searched = []
    if name == "smallnorb":
        if root and (paths := idx.find(root, smallnorb.FILES)):
            return _from_smallnorb(name, smallnorb.read(paths), str(root))
        where = f"{root}{_listing(root)}" if root else "--data_dir, which is not given"
        searched.append(f"{', '.join(smallnorb.FILES.values())} (plain or .gz) in {where}")
    for folder in _idx_folders(name, root):
        if paths := idx.locate(folder, **_idx_names(name)):
            return _from_idx(name, paths)
        searched.append(f"the four idx or idx.gz files in {folder}{_listing(folder)}")
    if name == "mnist" and not root:
        path = Path(os.path.expanduser("~/.keras/datasets/mnist.npz"))
        if os.path.isfile(path):
            return _from_npz(name, path, sha256=_KERAS_NPZ_SHA256, keys="x_{} y_{}")
        searched.append(str(path))
    tfds_name = name.removeprefix("tfds:")
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    tfds_root = root or Path(os.path.expanduser(default))
    if prepared := _find_prepared(tfds_name, tfds_root):
        return _from_tfds(name, prepared)
    searched.append(f"a data set prepared by TFDS in {tfds_root / tfds_name}")
    if download:
        return _from_tfds(name, _download(tfds_name, tfds_root))
    raise InputError(
        f"{name} was not found. Looked for {'; '.join(searched)}. Name its folder with "
        "--data_dir=DIR, download it through TFDS with --download, or use the included digits with "
        "--dataset=mnist_small."
    )


def placed(split: Split, canvas: int) -> Split:
    """Place each image at a fixed pseudo-random position on a black canvas.

    With 40 pixels this is the expanded MNIST test set of Sabour, Frosst and Hinton, "Dynamic
    Routing Between Capsules", section 5.2, https://arxiv.org/abs/1710.09829. Positions depend only
    on N and `canvas`.

    Args:
      split: Images `[N, H, W, C]`.
      canvas: Height and width of the result in pixels, at least H and W.
    """
    size, height, width, channels = split.images.shape
    # Raw bits of Philox are stable between versions of NumPy; `Generator`'s numbers are not.
    bits = np.random.Philox(key=np.array([canvas, size], np.uint64)).random_raw(2 * size)
    free = np.array([canvas - height + 1, canvas - width + 1], np.uint64)
    corners = (bits.reshape(size, 2) % free).astype(int)
    images = np.zeros((size, canvas, canvas, channels), np.uint8)
    for image, original, (row, column) in zip(images, split.images, corners, strict=True):
        image[row : row + height, column : column + width] = original
    return Split(images, split.labels)


def centred(images: np.ndarray, side: int) -> np.ndarray:
    """Pad images `[N, H, W, C]` to `[N, side, side, C]` with black, or cut out their centres."""
    top, left = (max(0, pixels - side) // 2 for pixels in images.shape[1:3])
    images = images[:, top : top + side, left : left + side]
    frees = [side - pixels for pixels in images.shape[1:3]]
    edges = [(free // 2, free - free // 2) for free in frees]
    return np.pad(images, ((0, 0), *edges, (0, 0)))


def batches(
    num_examples: int, *, batch_size: int, seed: int, first_step: int = 0
) -> Iterator[np.ndarray]:
    """Yield the example indices of training batches, int32 `[batch_size]`, without end.

    Each epoch is a new permutation of the examples, cut into `num_examples // batch_size` batches;
    the remaining examples of the permutation are skipped in that epoch. The stream is a function of
    the arguments, so a stream that starts at `first_step` continues an interrupted one.

    Args:
      num_examples: Number of training examples.
      batch_size: Indices per batch, 1 to `num_examples`.
      seed: Seed of the permutations, 0 to 2**64 - 1.
      first_step: Number of batches to skip.

    Raises:
      InputError: `batch_size` or `seed` is out of range.
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
        # Not Generator.permutation, which may change between versions of NumPy; Philox's raw bits
        # do not.
        bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_examples)
        order = np.argsort(bits, kind="stable").astype(np.int32)
        del bits  # frees 8 bytes per example during the epoch
        for start in range(skipped * batch_size, num_examples - batch_size + 1, batch_size):
            yield order[start : start + batch_size]
        skipped = 0


def _idx_folders(name: str, root: Path | None) -> list[Path]:
    if name.startswith("tfds:") or name == "smallnorb":
        return []
    if root:
        return [root, root / _TORCHVISION_FOLDERS.get(name, "EMNIST/raw")]
    caches = _CACHE_FOLDERS.get(name, ("data/EMNIST/raw",))
    return [Path(os.path.expanduser(folder)) for folder in caches]


def _idx_names(name: str) -> dict[str, str]:
    if not name.startswith("emnist_"):
        return {}
    return {"prefix": f"emnist-{name.removeprefix('emnist_')}-", "test": "test"}


def _listing(folder: Path) -> str:
    """Return what a folder has, as an addition to a message."""
    if not os.path.isdir(folder):
        return " (no such folder)"
    names = sorted(os.listdir(folder))
    return f" (it has {', '.join(names[:8]) or 'nothing'}{' and more' * (len(names) > 8)})"


def _from_idx(name: str, paths: dict[str, Path]) -> Dataset:
    arrays = {
        split: (idx.read_images(paths[images]), idx.read_labels(paths[labels]))
        for split, (images, labels) in idx.STEMS.items()
    }
    classes = _classes(np.concatenate([labels for _, labels in arrays.values()]))
    splits = {}
    for split, (images, labels) in arrays.items():
        images_stem, labels_stem = idx.STEMS[split]
        where = f"{paths[images_stem]} and {paths[labels_stem].name}"
        outside = np.flatnonzero(~np.isin(labels, classes))
        if outside.size:
            raise InputError(
                f"{where}: labels must not be negative, got {labels[outside[0]]} at index "
                f"{outside[0]}."
            )
        if name.startswith("emnist_"):  # which is published with rows and columns exchanged
            images = np.ascontiguousarray(images.swapaxes(1, 2))
        splits[split] = _check_split(images, np.searchsorted(classes, labels), len(classes), where)
    dataset = _build_dataset(name, len(classes), splits, class_names=_names(name, classes))
    folder = paths["train-images-idx3-ubyte"].parent
    if name == "fashion_mnist" and dataset.sha256 == _MNIST_SHA256:
        raise InputError(f"{folder}: the files are MNIST, not Fashion-MNIST: use --dataset=mnist.")
    if name == "mnist" and dataset.sha256 != _MNIST_SHA256:
        logging.warning(
            "%s: the files are not the published MNIST: %d training and %d test images of %d "
            "classes; they are used as they are",
            folder,
            dataset.train.size,
            dataset.test.size,
            dataset.num_classes,
        )
    return dataset


def _from_smallnorb(name: str, parts: dict[str, smallnorb.Part], where: str) -> Dataset:
    names = smallnorb.CLASS_NAMES
    splits = {
        split: _check_split(part.images, part.labels, len(names), where)
        for split, part in parts.items()
    }
    info = {split: part.info for split, part in parts.items()}
    return _build_dataset(name, len(names), splits, class_names=names, info=info)


def _from_folder(name: str, folder: Path) -> Dataset:
    arrays, names = folders.read(folder)
    splits = {
        split: _check_split(images, labels, len(names), str(folder))
        for split, (images, labels) in arrays.items()
    }
    return _build_dataset(name, len(names), splits, class_names=names)


def _classes(labels: np.ndarray) -> np.ndarray:
    """Return the labels that are classes: 0 to 9, or from 0 or 1 to the highest if it is above 9.

    If most of those do not occur, the classes are the labels that do.
    """
    if labels.max() < _NUM_CLASSES:
        return np.arange(_NUM_CLASSES)
    found = np.unique(labels[labels >= 0])
    if found[0] <= 1 and found[-1] < 2 * len(found):
        return np.arange(found[0], found[-1] + 1)
    return found


def _names(name: str, classes: np.ndarray) -> tuple[str, ...]:
    if name == "emnist_letters":
        return tuple(chr(ord("A") + int(label) - 1) for label in classes)
    return () if np.array_equal(classes, np.arange(len(classes))) else tuple(map(str, classes))


def _from_npz(name: str, path: Path, *, sha256: str, keys: str) -> Dataset:
    try:
        with path.open("rb") as stream:
            # Checked before np.load, which allocates as many bytes as the file's headers claim.
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest == sha256:
                stream.seek(0)
                with np.load(stream, allow_pickle=False) as archive:
                    arrays = dict(archive)
    except OSError as error:
        raise InputError(f"{path}: the file cannot be read: {error}.") from error
    if digest != sha256:
        raise InputError(
            f"{path}: damaged or not the published file: sha256 must be {sha256}, got {digest}."
        )
    splits = {}
    for split in idx.STEMS:
        images_key, labels_key = keys.replace("{}", split).split()
        images, labels = arrays[images_key][..., None], arrays[labels_key]
        splits[split] = _check_split(images, labels, _NUM_CLASSES, str(path))
    return _build_dataset(name, _NUM_CLASSES, splits)


def _find_prepared(name: str, root: Path) -> Path | None:
    """Return the folder of the newest prepared version, without the network access of TFDS."""
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
        # array_record, because reading TFDS's default format, tfrecord, needs TensorFlow.
        builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
        builder.download_and_prepare()
    except (ImportError, OSError, RuntimeError, ValueError, tfds.download.DownloadError) as error:
        raise InputError(f"{name}: TFDS cannot prepare it: {_one_line(error)}") from error
    return Path(builder.data_path)


def _from_tfds(name: str, folder: Path) -> Dataset:
    tfds = _import_tfds(name)
    from google.protobuf import json_format

    # Exceptions of TFDS and its dependencies for damaged files and other formats.
    read_errors = (KeyError, OSError, RuntimeError, ValueError, json_format.Error)
    try:
        builder = tfds.builder_from_directory(folder)
        features, sources = dict(builder.info.features), builder.as_data_source()
    except read_errors as error:
        raise InputError(f"{folder}: TFDS cannot read it: {_one_line(error)}") from error
    is_stereo = name.removeprefix("tfds:").split("/")[0] == "smallnorb"
    image_names, label_names = smallnorb.FEATURES if is_stereo else (("image",), ("label",))
    if not (
        all(isinstance(features.get(key), tfds.features.Image) for key in image_names)
        and all(isinstance(features.get(key), tfds.features.ClassLabel) for key in label_names)
        and (num_classes := features[label_names[0]].num_classes)
        and {"train", "test"} <= set(sources)
    ):
        raise InputError(
            f"{folder}: a data set must have the features {', '.join(image_names)} and "
            f"{', '.join(label_names)} (classes) and the splits train and test, "
            f"got {', '.join(sorted(features))} and {', '.join(sorted(sources))}."
        )
    splits, info = {}, {}
    for split in idx.STEMS:
        images: list[np.ndarray] = []
        labels: list[list[int]] = []  # of each of `label_names`
        try:
            source = sources[split]
            for index in range(len(source)):
                example = source[index]
                pictures = [example[key] for key in image_names]
                images.append(
                    smallnorb.halved([picture[..., 0] for picture in pictures])
                    if is_stereo
                    else pictures[0]
                )
                labels.append([example[key] for key in label_names])
        except read_errors as error:
            raise InputError(f"{folder}: TFDS cannot read {split}: {_one_line(error)}") from error
        kinds = sorted({(image.shape, image.dtype.name) for image in images})
        if len(kinds) > 1:
            raise InputError(
                f"{folder}: the images of {split} must all have one shape, got {kinds[:4]}."
            )
        columns = np.array(labels).reshape(-1, len(label_names))
        splits[split] = _check_split(np.array(images), columns[:, 0], num_classes, str(folder))
        if is_stereo:
            info[split] = smallnorb.checked(columns[:, 1:] * (1, 1, 2, 1), str(folder))
    names = smallnorb.CLASS_NAMES if is_stereo else ()
    return _build_dataset(name, num_classes, splits, class_names=names, info=info)


def _one_line(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def _check_split(images: np.ndarray, labels: np.ndarray, num_classes: int, where: str) -> Split:
    if len(images) != len(labels) or not len(images):
        raise InputError(
            f"{where}: there must be one label per image and at least one image, "
            f"got {len(images)} images and {len(labels)} labels."
        )
    if images.ndim != 4 or images.shape[3] not in (1, 2, 3):
        raise InputError(
            f"{where}: images must have 1, 2 or 3 channels, "
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


def _build_dataset(
    name: str,
    num_classes: int,
    splits: dict[str, Split],
    *,
    class_names: tuple[str, ...] = (),
    info: dict[str, np.ndarray] | None = None,
) -> Dataset:
    train, test = splits["train"], splits["test"]
    if train.images.shape[1:] != test.images.shape[1:]:
        raise InputError(
            f"{name}: training and test images must have one shape, "
            f"got {train.images.shape[1:]} and {test.images.shape[1:]}."
        )
    digest = hashlib.sha256()
    for array in (*train, *test, *(info or {}).values()):
        digest.update(repr((array.shape, array.dtype.name)).encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return Dataset(name, num_classes, train, test, digest.hexdigest(), class_names, info or {})
