"""Writes `mnist_small`, the data set that comes with the programs, from the files of MNIST."""

import dataclasses
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments import cli, files
from experiments.cli import flag
from experiments.data import datasets, idx
from experiments.errors import InputError

# Of the plain idx files, so that the gzip they came in does not matter.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Where MNIST is."""

    data_dir: str = flag("data/MNIST/raw", "Folder of MNIST's four idx or idx.gz files.")


def build(
    data_dir: Path,
    output: Path,
    *,
    sha256: Mapping[str, str] = MNIST_SHA256,
    num_train: int = 6_000,
    num_test: int = 1_000,
) -> None:
    """Writes the first images and labels of each half of a data set to one compressed npz file.

    The same input gives the same bytes: NumPy stamps the members of an npz with a fixed date.

    Args:
      data_dir: the folder with the four idx or idx.gz files.
      output: the file to write.
      sha256: hex digest of every plain idx file.
      num_train: how many training images to keep.
      num_test: how many test images to keep.

    Raises:
      InputError: A file is missing, damaged or not the one with the given digest.
    """
    paths = idx.locate(data_dir)
    if not paths:
        raise InputError(f"{data_dir}: the folder has none of the idx files {', '.join(sha256)}.")
    arrays = {}
    for split, num_examples in (("train", num_train), ("test", num_test)):
        images_stem, labels_stem = idx.STEMS[split]
        images = idx.read_images(paths[images_stem])
        labels = idx.read_labels(paths[labels_stem])
        for stem, array in ((images_stem, images[..., 0]), (labels_stem, labels)):
            digest = hashlib.sha256(idx.header(array) + array.tobytes()).hexdigest()
            if digest != sha256[stem]:
                raise InputError(
                    f"{paths[stem]}: sha256 of the plain file must be {sha256[stem]}, got {digest}."
                )
        arrays[f"{split}_images"] = images[:num_examples, ..., 0]
        arrays[f"{split}_labels"] = labels[:num_examples]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    files.write_bytes(output, buffer.getvalue())


def main(config: Config) -> int:
    """Writes the file to its place in the repository and prints its digest."""
    build(Path(config.data_dir), datasets.MNIST_SMALL)
    content = datasets.MNIST_SMALL.read_bytes()
    print(f"{hashlib.sha256(content).hexdigest()}  {datasets.MNIST_SMALL}")
    return 0


if __name__ == "__main__":
    cli.run(Config, main)
