"""The sweeps of `evaluate_poses`: all images moved alike, by one value after the other."""

import math
from collections.abc import Callable

from experiments.affine import Pose
from experiments.errors import InputError

# The sweeps by their axis: the flag with the values, and how one value moves N images.
SWEEPS: dict[str, tuple[str, Callable[[int, float], Pose]]] = {
    "rotation (degrees)": ("rotations", lambda size, x: Pose.of(size, rotation=x)),
    "shift (pixels)": ("shifts", lambda size, x: Pose.of(size, shift=(x, 0))),
    "scale": ("scales", lambda size, x: Pose.of(size, scale=(x, x))),
    "shear (degrees)": ("shears", lambda size, x: Pose.of(size, shear=x)),
}


def numbers(name: str, words: str) -> list[float]:
    """The values of a sweep, from its flag.

    Raises:
      InputError: `words` are not numbers, separated by commas, within the sweep's range.
    """
    low, high = {"scales": (0, math.inf), "shears": (-90, 90)}.get(name, (-math.inf, math.inf))
    try:
        values = [float(word) for word in words.split(",")]
    except ValueError:
        values = []
    if not values or not all(low < value < high for value in values):
        raise InputError(
            f"--{name} must be numbers between {low:g} and {high:g}, separated by commas, "
            f"got {words!r}"
        )
    return values
