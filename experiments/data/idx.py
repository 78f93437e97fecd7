"""Reader of idx files, the format of MNIST and Fashion-MNIST.

Source: "The MNIST database of handwritten digits", section "File formats for the MNIST database",
http://yann.lecun.com/exdb/mnist/. Files are not trusted: memory is allocated for the bytes that a
file has, not for the sizes that its header claims.
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
_BLOCK_BYTES = 2**20


def locate(folder: Path) -> dict[str, Path]:
    """Find the four idx files of a data set, preferring plain files to gzipped ones.

    Args:
      folder: The folder to search, without its subfolders.

    Returns:
      The path of each name in `STEMS`; an empty dict if the folder has none of the files.

    Raises:
      InputError: Some of the files are missing, but not all.
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
        raise InputError(f"{folder}: {', '.join(missing)} (plain or .gz) is missing.")
    return paths


def read_images(path: Path) -> np.ndarray:
    """Read square grey images, uint8 `[N, S, S, 1]`, from an idx3 or idx3.gz file."""
    images = _read(path, rank=3)
    if images.shape[1] != images.shape[2]:
        raise InputError(
            f"{path}: images must be square, got {images.shape[1]} x {images.shape[2]} pixels."
        )
    return images[..., None]


def read_labels(path: Path) -> np.ndarray:
    """Read labels, uint8 `[N]`, from an idx1 or idx1.gz file."""
    return _read(path, rank=1)


def header(array: np.ndarray) -> bytes:
    """Return the idx header of an array, the bytes that precede its data in a file."""
    return struct.pack(f">{1 + array.ndim}I", _magic(array.ndim), *array.shape)


def _magic(rank: int) -> int:
    return 0x08 << 8 | rank  # third byte: type (8, unsigned byte); fourth: number of dimensions


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
            f"got a file of {len(header)} bytes."
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
            f"{path}: the sizes in the header must amount to 1 to {_MAX_BYTES} bytes of data, "
            f"got {sizes} = {num_bytes}."
        )
    data = _read_at_most(stream, num_bytes + 1)
    if len(data) != num_bytes:
        found = "more" if len(data) > num_bytes else f"{len(data)}"
        raise InputError(
            f"{path}: the sizes in the header, {sizes}, need {num_bytes} bytes of data, "
            f"got {found}."
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_at_most(stream: BufferedIOBase, limit: int) -> bytearray:
    data = bytearray()
    # In blocks, because read(limit) would allocate `limit` bytes for a file of any size.
    while block := stream.read(min(_BLOCK_BYTES, limit - len(data))):
        data += block
    return data
