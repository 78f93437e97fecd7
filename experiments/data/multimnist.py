"""MultiMNIST: images of two overlapping digits, generated on demand.

Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 6,
https://arxiv.org/abs/1710.09829. Two digits of different classes, both from the training or both
from the test set, are each shifted by up to 4 pixels along both axes, so that 28 x 28 pixels become
36 x 36. The paper states that the digits' bounding boxes (20 x 20 pixels) overlap by 80 % on
average; these shifts give 73 % of the area and 85 % of the width.

Shape letters: N examples; B examples of a batch; S height and width of a digit; C channels.
"""

import dataclasses
import functools

import numpy as np

from experiments.data import datasets

SHIFT = 4  # pixels


@dataclasses.dataclass(frozen=True, eq=False)
class OverlaidDigits:
    """A virtual data set of `size` pairs of digits; example i is a function of split, seed and i.

    The first digit of example i is digit i modulo N of the split; the second digit and both shifts
    are random. The two digits are separate layers; the training objective overlays them.
    """

    split: datasets.Split
    size: int
    seed: int

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return digit layers, uint8 `[B, 2, S + 8, S + 8, C]`, and classes, int32 `[B, 2]`."""
        first, second, shifts = self._draw(indices)
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
        """Return the classes of both digits of all examples, int32 `[N, 2]`."""
        first, second, _ = self._draw(np.arange(self.size))
        return np.stack([self.split.labels[first], self.split.labels[second]], 1)

    def _draw(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw the digits' indices `[B]` and `[B]`, and their (row, column) corners `[B, 2, 2]`."""
        first = indices % self.split.size
        bits = _random_bits(self.seed, indices, 5)
        # Uniform over the digits sorted by class, skipping the range of the first digit's class.
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


def _random_bits(seed: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Return random bits for each index, uint64 `[B, count]`.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", figure 17
    (SplitMix64), https://doi.org/10.1145/2660193.2660195. Unlike NumPy's generators, it evaluates
    arbitrary positions of its stream in one vectorised expression.
    """
    position = np.uint64(count) * indices.astype(np.uint64)[:, None] + np.arange(
        count, dtype=np.uint64
    )
    golden = np.uint64(0x9E3779B97F4A7C15)
    x = _mix(np.array([seed], np.uint64) + golden) + (position + np.uint64(1)) * golden
    return _mix(x)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
