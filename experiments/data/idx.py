"""Reads idx files, the format in which MNIST and its relatives are published.

Source: "The MNIST database of handwritten digits", section "File formats for the MNIST
database", http://yann.lecun.com/exdb/mnist/. Nothing in a file is believed before it is checked:
no allocation is larger than what the file really holds, plus one block.
"""

import gzip
import math
import os
import struct
import zlib
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from experiments.errors import InputError

STEMS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_MAX_BYTES = 2**32
_BLOCK = 2**20


def locate(folder: Path) -> dict[str, Path]:
    """Finds the four files of a data set, plain before gzipped.

    Args:
      folder: where to look; its subfolders are not searched.

    Returns:
      The path of every name in `STEMS`, or nothing if the folder has none of them.

    Raises:
      InputError: The folder has some of the files and lacks others.
    """
    stems = [stem for pair in STEMS.values() for stem in pair]
    paths = {}
    for stem in stems:
        for path in (folder / stem, folder / f"{stem}.gz"):
            if os.path.isfile(path):
                paths[stem] = path
                break
    missing = [stem for stem in stems if stem not in paths]
    if paths and missing:
        raise InputError(f"{folder}: {', '.join(missing)} (or the same with .gz) is missing.")
    return paths


def read_images(path: Path) -> np.ndarray:
    """Reads square grey images, uint8 [N, S, S, 1], from an idx3 file or an idx3.gz file."""
    images = _read(path, rank=3)
    if images.shape[1] != images.shape[2]:
        raise InputError(
            f"{path}: images must be square, got {images.shape[1]} x {images.shape[2]} pixels."
        )
    return images[..., None]


def read_labels(path: Path) -> np.ndarray:
    """Reads labels, uint8 [N], from an idx1 file or an idx1.gz file."""
    return _read(path, rank=1)


def header(array: np.ndarray) -> bytes:
    """The bytes that stand before an array's own in an idx file."""
    return struct.pack(f">{1 + array.ndim}I", _magic(array.ndim), *array.shape)


def _magic(rank: int) -> int:
    return 0x08 << 8 | rank  # the third byte says unsigned bytes, the fourth how many dimensions


def _read(path: Path, *, rank: int) -> np.ndarray:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            return _parse(stream, path, rank=rank)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: the file cannot be read: {error}.") from error


def _parse(stream: BufferedIOBase, path: Path, *, rank: int) -> np.ndarray:
    header = _read_at_most(stream, 4 + 4 * rank)
    if len(header) < 4 + 4 * rank:
        raise InputError(
            f"{path}: an idx{rank} file starts with {4 + 4 * rank} bytes of header, "
            f"got {len(header)} bytes in all."
        )
    magic, *shape = struct.unpack(f">{1 + rank}I", header)
    if magic != _magic(rank):
        raise InputError(
            f"{path}: the magic number of an idx{rank} file of bytes is 0x{_magic(rank):08x}, "
            f"got 0x{magic:08x}."
        )
    sizes = " x ".join(map(str, shape))
    num_bytes = math.prod(shape)
    if not 1 <= num_bytes <= _MAX_BYTES:
        raise InputError(
            f"{path}: the sizes in the header must give 1 to {_MAX_BYTES} bytes of data, "
            f"got {sizes} = {num_bytes}."
        )
    data = _read_at_most(stream, num_bytes + 1)
    if len(data) != num_bytes:
        found = "more than that" if len(data) > num_bytes else f"{len(data)}"
        raise InputError(
            f"{path}: the sizes in the header, {sizes}, need {num_bytes} bytes of data, "
            f"got {found}."
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_at_most(stream: BufferedIOBase, limit: int) -> bytearray:
    data = bytearray()
    # In blocks: one read of `limit` bytes would allocate them all, whatever the file holds.
    while block := stream.read(min(_BLOCK, limit - len(data))):
        data += block
    return data
