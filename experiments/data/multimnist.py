"""MultiMNIST: two overlapping digits an image, made when asked for.

Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 6,
https://arxiv.org/abs/1710.09829. A digit lies on another of another class from the same half of
MNIST; each is shifted by up to 4 pixels in each direction, which makes 36 x 36 of 28 x 28 pixels.
The paper says that their bounding boxes, of 20 x 20 pixels, overlap by 80 % on average; with these
shifts it is 73 % of the area, and 85 % of the width.
"""

import dataclasses
import functools

import numpy as np

from experiments.data import datasets

SHIFT = 4  # pixels


@dataclasses.dataclass(frozen=True, eq=False)
class OverlaidDigits:
    """Any number of examples: the i-th depends on the digits, the seed and i alone.

    An example is its two digits apart, layers of one image; `objectives` lays them over each
    other. The first digits are those of the split, in order, over and over.
    """

    split: datasets.Split
    size: int
    seed: int

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The layers, uint8 `[B, 2, S + 8, S + 8, C]`, and their classes, int32 `[B, 2]`."""
        first, second, shifts = self._choices(indices)
        digits = np.stack([self.split.images[first], self.split.images[second]], 1)
        batch, layers, side, _, channels = digits.shape
        wide = side + 2 * SHIFT
        images = np.zeros((batch, layers, wide, wide, channels), np.uint8)
        for image, digit, (row, column) in zip(
            images.reshape(-1, wide, wide, channels),
            digits.reshape(-1, side, side, channels),
            shifts.reshape(-1, 2),
            strict=True,
        ):
            image[row : row + side, column : column + side] = digit
        return images, np.stack([self.split.labels[first], self.split.labels[second]], 1)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The classes of all examples, int32 `[N, 2]`."""
        first, second, _ = self._choices(np.arange(self.size))
        return np.stack([self.split.labels[first], self.split.labels[second]], 1)

    def _choices(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which digits, and where: `[B]`, `[B]` and `[B, 2, 2]`."""
        first = indices % self.split.size
        bits = _bits(self.seed, indices, 5)
        # Of the digits in the order of their classes, all but those of the first one's class.
        order, starts, counts = self._by_class
        start, count = starts[self.split.labels[first]], counts[self.split.labels[first]]
        other = (bits[:, 0] % (self.split.size - count).astype(np.uint64)).astype(np.int64)
        second = order[np.where(other < start, other, other + count)]
        shifts = (bits[:, 1:] % np.uint64(2 * SHIFT + 1)).astype(np.int64)
        return first, second, shifts.reshape(-1, 2, 2)

    @functools.cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts = np.bincount(self.split.labels)
        return np.argsort(self.split.labels, kind="stable"), np.cumsum(counts) - counts, counts


def _bits(seed: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Random bits for each index, uint64 `[B, count]`.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", figure 17
    (SplitMix64), https://doi.org/10.1145/2660193.2660195: unlike NumPy's generators it jumps to
    any place of its stream, for many at once.
    """
    place = np.uint64(count) * indices.astype(np.uint64)[:, None] + np.arange(
        count, dtype=np.uint64
    )
    golden = np.uint64(0x9E3779B97F4A7C15)
    x = _mixed(np.array([seed], np.uint64) + golden) + (place + np.uint64(1)) * golden
    return _mixed(x)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
