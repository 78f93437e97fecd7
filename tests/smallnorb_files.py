"""Small files in the format of smallNORB, for tests."""

import gzip
import struct

import numpy as np

from experiments.data import smallnorb

MAGIC = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}


def content(array):
    """The bytes of a file: type, rank, at least three sizes, little-endian data."""
    sizes = (*array.shape, 1, 1)[: max(3, array.ndim)]
    header = struct.pack(f"<Ii{len(sizes)}i", MAGIC[array.dtype.name], array.ndim, *sizes)
    return header + array.astype(array.dtype.newbyteorder("<")).tobytes()


def arrays(*, num_train=36, num_test=54, seed=0):
    """Images, labels and viewpoints of both parts, by the keys of `smallnorb.FILES`.

    Labels run through the classes, azimuths and elevations through all of theirs; each class has
    stripes of its own width.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for split, size in (("train", num_train), ("test", num_test)):
        labels = np.arange(size, dtype=np.int32) % 5
        images = rng.integers(0, 60, (size, 2, 96, 96))
        for image, label in zip(images, labels, strict=True):
            image[:, np.arange(96) // (2 + 2 * label) % 2 == 1] += 180
        found[f"{split} dat"] = images.astype(np.uint8)
        found[f"{split} cat"] = labels
        columns = (4 + labels, np.arange(size) % 9, 2 * (np.arange(size) % 18), labels)
        found[f"{split} info"] = np.stack(columns, 1).astype(np.int32)
    return found


def write(folder, found=None, *, suffix="", pack=bytes):
    """Write the six files; the folder's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, array in (found or arrays()).items():
        data = array if isinstance(array, bytes) else content(array)
        (folder / (smallnorb.FILES[key] + suffix)).write_bytes(pack(data))
    return str(folder)


def write_packed(folder, found=None):
    """Write the six files as they are published."""
    return write(folder, found, suffix=".gz", pack=lambda data: gzip.compress(data, 1))
