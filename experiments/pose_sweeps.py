"""The sweeps of `evaluate_poses`: all images moved alike, by one value after the other."""

import math
from collections.abc import Callable
from typing import NamedTuple

from experiments.affine import Pose
from experiments.errors import InputError


class Sweep(NamedTuple):
    """One transformation: the flag with its values, how one moves N images, and their range."""

    flag: str
    move: Callable[[int, float], Pose]
    low: float = -math.inf
    high: float = math.inf


SWEEPS = {  # by the axis' label
    "rotation (degrees)": Sweep("rotations", lambda size, x: Pose.of(size, rotation=x)),
    "shift (pixels)": Sweep("shifts", lambda size, x: Pose.of(size, shift=(x, 0))),
    "scale": Sweep("scales", lambda size, x: Pose.of(size, scale=(x, x)), low=0),
    "shear (degrees)": Sweep("shears", lambda size, x: Pose.of(size, shear=x), low=-90, high=90),
}


def numbers(sweep: Sweep, words: str) -> list[float]:
    """The values of a sweep, from its flag.

    Raises:
      InputError: `words` are not numbers, separated by commas, within the sweep's range.
    """
    try:
        values = [float(word) for word in words.split(",")]
    except ValueError:
        values = []
    if not values or not all(sweep.low < value < sweep.high for value in values):
        raise InputError(
            f"--{sweep.flag} must be numbers between {sweep.low:g} and {sweep.high:g}, "
            f"separated by commas, got {words!r}"
        )
    return values
