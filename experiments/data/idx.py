"""Reader of idx files, the format of MNIST and Fashion-MNIST.

Source: "The MNIST database of handwritten digits", section "File formats for the MNIST database",
http://yann.lecun.com/exdb/mnist/. Files are not trusted: memory is allocated for the bytes that a
file has, not for the sizes that its header claims.
"""

import contextlib
import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
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
    """Find the four idx files of a data set, by the names in `STEMS`, as `find` does.

    Args:
      folder: The folder to search.
      prefix: What precedes the names in `STEMS`: `emnist-letters-`, say.
      test: What the names of test files start with, after the prefix.
    """
    stems = [stem for pair in STEMS.values() for stem in pair]
    return find(folder, {stem: prefix + stem.replace("t10k", test) for stem in stems})


def find(folder: Path, wanted: Mapping[str, str]) -> dict[str, Path]:
    """Find the files of a data set in a folder, preferring plain files to gzipped ones.

    Upper and lower case are one, `.` may stand for `-`, and a file may lie in a folder of its name.

    Args:
      folder: The folder to search.
      wanted: The published names of the files, by the keys of the result.

    Returns:
      The paths; an empty dict if the folder has none of the files.

    Raises:
      InputError: Some of the files are missing, but not all.
    """
    plain_names = set(map(_plain, wanted.values()))
    candidates: dict[str, list[Path]] = {}
    present = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for name in present:
        path = folder / name
        if os.path.isdir(path) and _plain(name) in plain_names:
            inner = [
                path / file for file in sorted(os.listdir(path)) if _plain(file) == _plain(name)
            ]
        else:
            inner = [path]
        for file in filter(os.path.isfile, inner):
            candidates.setdefault(_plain(file.name), []).append(file)
    paths = {}
    for key, name in wanted.items():
        if found := candidates.get(_plain(name)):
            # The published name first, and a plain file before a packed one.
            paths[key] = min(found, key=lambda path: (path.name != name, path.suffix == ".gz"))
    missing = [name for key, name in wanted.items() if key not in paths]
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


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BufferedIOBase]:
    """Open a file for reading, unpacking it if it is gzipped.

    Raises:
      InputError: It cannot be read; also where a read in the body fails.
    """
    try:
        with path.open("rb") as file:
            # By content, because unpackers and browsers keep or drop .gz wrongly.
            is_packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not is_packed:
                yield file
            else:
                with gzip.open(file) as stream:
                    yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: the file cannot be read: {error}.") from error


def _read(path: Path, *, rank: int) -> np.ndarray:
    with opened(path) as stream:
        header = read_at_most(stream, 4 + 4 * rank)
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
        return read_array(stream, path, shape, types[magic >> 8])


def read_array(stream: BufferedIOBase, path: Path, shape: Sequence[int], kind: str) -> np.ndarray:
    """Read the rest of a file as an array, in this machine's byte order.

    Args:
      stream: From `opened`, after the header.
      path: For messages.
      shape: The sizes in the header, which may be wrong.
      kind: NumPy's name of the type of the numbers.

    Raises:
      InputError: The file has not as many bytes as the sizes need.
    """
    dtype = np.dtype(kind)
    sizes = " x ".join(map(str, shape))
    num_bytes = math.prod(shape) * dtype.itemsize
    if not 1 <= num_bytes <= _MAX_BYTES:
        raise InputError(
            f"{path}: the sizes in the header must amount to 1 to {_MAX_BYTES} bytes of data, "
            f"got {sizes} = {num_bytes}."
        )
    data = read_at_most(stream, num_bytes + 1)
    if len(data) != num_bytes:
        found = "more" if len(data) > num_bytes else f"{len(data)}"
        raise InputError(
            f"{path}: the sizes in the header, {sizes}, need {num_bytes} bytes of data, "
            f"got {found}."
        )
    values = np.frombuffer(data, dtype).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)


def read_at_most(stream: BufferedIOBase, limit: int) -> bytearray:
    """Read up to `limit` bytes, without allocating more than the stream has."""
    data = bytearray()
    # In blocks, because read(limit) would allocate `limit` bytes for a file of any size.
    while block := stream.read(min(_BLOCK_BYTES, limit - len(data))):
        data += block
    return data
