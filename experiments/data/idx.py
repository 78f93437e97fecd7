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
_LABEL_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4"}  # by the third byte
_MAX_BYTES = 2**32
_BLOCK_BYTES = 2**20


def locate(folder: Path, *, prefix: str = "", test: str = "t10k") -> dict[str, Path]:
    """Find the four idx files of a data set, preferring plain files to gzipped ones.

    Upper and lower case are one, `.` may stand for `-`, and a file may lie in a folder of its name.

    Args:
      folder: The folder to search.
      prefix: What precedes the names in `STEMS`: `emnist-letters-`, say.
      test: What the names of test files start with, after the prefix.

    Returns:
      The path of each name in `STEMS`; an empty dict if the folder has none of the files.

    Raises:
      InputError: Some of the files are missing, but not all.
    """
    wanted = {stem: prefix + stem.replace("t10k", test) for pair in STEMS.values() for stem in pair}
    candidates: dict[str, list[Path]] = {}
    present = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for name in present:
        path = folder / name
        if os.path.isdir(path) and _plain(name) in wanted.values():
            inner = [
                path / file for file in sorted(os.listdir(path)) if _plain(file) == _plain(name)
            ]
        else:
            inner = [path]
        for file in filter(os.path.isfile, inner):
            candidates.setdefault(_plain(file.name), []).append(file)
    paths = {}
    for stem, name in wanted.items():
        if found := candidates.get(name):
            # The published name first, and a plain file before a packed one.
            paths[stem] = min(found, key=lambda path: (path.name != name, path.suffix == ".gz"))
    missing = [name for stem, name in wanted.items() if stem not in paths]
    if paths and missing:
        raise InputError(
            f"{folder}: {', '.join(missing)} (plain or .gz) is missing. The folder has "
            f"{', '.join(present[:12])}{' and more' * (len(present) > 12)}."
        )
    return paths


def read_images(path: Path) -> np.ndarray:
    """Read grey images, uint8 `[N, H, W, 1]`, from an idx3 file, gzipped or not."""
    return _read(path, rank=3)[..., None]


def read_labels(path: Path) -> np.ndarray:
    """Read labels, integers `[N]` of the file's type, from an idx1 file, gzipped or not."""
    return _read(path, rank=1)


def _plain(name: str) -> str:
    """Return a file's name as the published files are spelled."""
    return name.lower().removesuffix(".gz").replace(".", "-")


def header(array: np.ndarray) -> bytes:
    """Return the idx header of an array, the bytes that precede its data in a file."""
    return struct.pack(f">{1 + array.ndim}I", _magic(array.ndim), *array.shape)


def _magic(rank: int) -> int:
    return 0x08 << 8 | rank  # third byte: type (8, unsigned byte); fourth: number of dimensions


def _read(path: Path, *, rank: int) -> np.ndarray:
    try:
        with path.open("rb") as file:
            # By content, because unpackers and browsers keep or drop .gz wrongly.
            is_packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not is_packed:
                return _parse(file, path, rank=rank)
            with gzip.open(file) as stream:
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
    types = _LABEL_TYPES if rank == 1 else {0x08: "u1"}
    if magic & 0xFF != rank or magic >> 8 not in types:
        raise InputError(
            f"{path}: the magic number of an idx{rank} file of bytes is 0x{_magic(rank):08x}, "
            f"got 0x{magic:08x}."
        )
    dtype = np.dtype(types[magic >> 8])
    sizes = " x ".join(map(str, shape))
    num_bytes = math.prod(shape) * dtype.itemsize
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
    values = np.frombuffer(data, dtype).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)


def _read_at_most(stream: BufferedIOBase, limit: int) -> bytearray:
    data = bytearray()
    # In blocks, because read(limit) would allocate `limit` bytes for a file of any size.
    while block := stream.read(min(_BLOCK_BYTES, limit - len(data))):
        data += block
    return data
