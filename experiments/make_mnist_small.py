"""Make `mnist_small`, the included data set, from the first examples of MNIST."""

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

# Digests of the uncompressed idx files, which do not depend on the gzip compressor.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The folder of MNIST."""

    data_dir: str = flag("data/MNIST/raw", "Folder of MNIST's four idx or idx.gz files.")


def main(config: Config) -> int:
    """Write the file that `datasets.load` reads, and print its digest."""
    build(Path(config.data_dir), datasets.MNIST_SMALL)
    content = datasets.MNIST_SMALL.read_bytes()
    print(f"{hashlib.sha256(content).hexdigest()}  {datasets.MNIST_SMALL}")
    return 0


def build(
    data_dir: Path,
    output: Path,
    *,
    sha256: Mapping[str, str] = MNIST_SHA256,
    num_train: int = 6_000,
    num_test: int = 1_000,
) -> None:
    """Write the first training and test examples to a compressed npz file, reproducibly.

    Args:
      data_dir: Folder with the four idx or idx.gz files.
      output: The npz file to write. Equal inputs give equal bytes.
      sha256: Hex digest of each uncompressed idx file.
      num_train: Number of training examples.
      num_test: Number of test examples.

    Raises:
      InputError: A file is missing or damaged, or has another digest.
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
                    f"{paths[stem]}: uncompressed sha256 must be {sha256[stem]}, got {digest}."
                )
        arrays[f"{split}_images"] = images[:num_examples, ..., 0]
        arrays[f"{split}_labels"] = labels[:num_examples]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    files.write_bytes(output, buffer.getvalue())


if __name__ == "__main__":
    cli.run(Config, main)
