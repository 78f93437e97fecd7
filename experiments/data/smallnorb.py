"""Reader of smallNORB: stereo pairs of 50 toys at 9 elevations, 18 azimuths and 6 lightings.

Source: Fu Jie Huang and Yann LeCun, "The small NORB dataset, V1.0",
https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/, which also defines the file format. Files are not
trusted, as in `idx`.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from experiments.data import idx
from experiments.errors import InputError

CLASS_NAMES = ("animal", "human", "airplane", "truck", "car")
FILES = {
    f"{split} {part}": f"smallnorb-5x{toys}x9x18x6x2x96x96-{split}ing-{part}.mat"
    for split, toys in (("train", "46789"), ("test", "01235"))
    for part in ("dat", "cat", "info")
}
_SIDE = 96  # pixels of the published images
# Magic number of a file, type of its numbers and sizes after the first one, by its part.
_FORMATS: dict[str, tuple[int, str, list[int]]] = {
    "dat": (0x1E3D4C55, "u1", [2, _SIDE, _SIDE]),
    "cat": (0x1E3D4C54, "<i4", []),
    "info": (0x1E3D4C54, "<i4", [4]),
}
# Codes of instance, elevation (0 to 8: 30 to 70 degrees in steps of 5), azimuth (degrees / 10) and
# lighting, the columns of `Part.info`.
_CODES = (range(10), range(9), range(0, 36, 2), range(6))
# Column and codes of the viewpoints that networks are trained on.
_FAMILIAR = {"azimuth": (2, (30, 32, 34, 0, 2, 4)), "elevation": (1, (0, 1, 2))}
VIEWPOINTS = ("all", *_FAMILIAR)
# Features of TFDS: images, and labels of which all but the first are `Part.info`, where azimuths
# are counted from 0 to 17.
FEATURES = (
    ("image", "image2"),
    ("label_category", "instance", "label_elevation", "label_azimuth", "label_lighting"),
)
_BLOCK = 1024  # pairs of images


class Part(NamedTuple):
    """The training or the test part."""

    images: np.ndarray  # uint8 [N, 48, 48, 2]
    labels: np.ndarray  # int32 [N]
    info: np.ndarray  # int32 [N, 4]: instance, elevation, azimuth, lighting


def read(paths: Mapping[str, Path]) -> dict[str, Part]:
    """Read both parts from the six files of `FILES`, gzipped or not.

    Raises:
      InputError: A file is damaged or of another format, or the files do not belong together.
    """
    parts = {}
    for split in idx.STEMS:
        images, labels, info = (_read(paths[f"{split} {part}"], part) for part in _FORMATS)
        path = paths[f"{split} info"]
        if not len(images) == len(labels) == len(info):
            raise InputError(
                f"{path.parent}: dat, cat and info of {split}ing must be of equally many pairs of "
                f"images, got {len(images)}, {len(labels)} and {len(info)}."
            )
        # In blocks, so that the sums take little memory.
        blocks = [halved(images[start : start + _BLOCK]) for start in range(0, len(images), _BLOCK)]
        parts[split] = Part(np.concatenate(blocks), labels, checked(info, str(path)))
    return parts


def halved(images: ArrayLike) -> np.ndarray:
    """Average 2 x 2 pixels of images, uint8 `[..., 2, 96, 96]`: uint8 `[..., 48, 48, 2]`.

    Raises:
      ValueError: The images have another shape or type.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[-3:] != (2, _SIDE, _SIDE):
        raise ValueError(
            f"images must be uint8 of 2 x {_SIDE} x {_SIDE}, got {images.dtype} of {images.shape}"
        )
    half = _SIDE // 2
    sums = images.reshape(*images.shape[:-2], half, 2, half, 2).sum((-3, -1), dtype=np.uint16)
    return np.moveaxis((sums + 2) // 4, -3, -1).astype(np.uint8)


def checked(info: np.ndarray, where: str) -> np.ndarray:
    """Return info as int32 `[N, 4]`; raise InputError if a code is not one of those published."""
    for column, codes in enumerate(_CODES):
        outside = np.flatnonzero(~np.isin(info[:, column], codes))
        if outside.size:
            names = ("instances", "elevations", "azimuths", "lightings")
            raise InputError(
                f"{where}: {names[column]} must be among {', '.join(map(str, codes))}, "
                f"got {info[outside[0], column]} at index {outside[0]}."
            )
    return info.astype(np.int32)


def is_familiar(info: np.ndarray, viewpoints: str) -> np.ndarray:
    """Return whether pairs of images are from the viewpoints to train on, bool `[N]`.

    Source: Hinton, Sabour and Frosst, "Matrix capsules with EM routing", section 5.1,
    https://openreview.net/forum?id=HJWLfGWRb.

    Args:
      info: As in `Part`, `[N, 4]`.
      viewpoints: `"azimuth"`: familiar are 300, 320, 340, 0, 20 and 40 degrees, a third of all;
        `"elevation"`: 30, 35 and 40 degrees, the three lowest.
    """
    column, codes = _FAMILIAR[viewpoints]
    return np.isin(info[:, column], codes)


def _read(path: Path, part: str) -> np.ndarray:
    magic, kind, sizes = _FORMATS[part]
    rank = 1 + len(sizes)
    stored = max(rank, 3)  # at least three sizes are stored, of which the last ones may be unused
    with idx.opened(path) as stream:
        header = idx.read_at_most(stream, 8 + 4 * stored)
        if len(header) < 8 + 4 * stored:
            raise InputError(
                f"{path}: the header must have {8 + 4 * stored} bytes, got a file of "
                f"{len(header)} bytes."
            )
        found, found_rank, *found_sizes = struct.unpack(f"<Ii{stored}i", header)
        if (found, found_rank) != (magic, rank):
            raise InputError(
                f"{path}: the file must start with 0x{magic:08x}, {rank} (little-endian: type and "
                f"number of dimensions), got 0x{found:08x}, {found_rank}."
            )
        shape = found_sizes[:rank]
        if shape[1:] != sizes:
            raise InputError(
                f"{path}: the sizes in the header must be {' x '.join(map(str, ['N', *sizes]))}, "
                f"got {' x '.join(map(str, shape))}."
            )
        return idx.read_array(stream, path, shape, kind)
