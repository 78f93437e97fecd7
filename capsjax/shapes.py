"""Shape letters of the docstrings, and argument checks that the public functions share.

- B: batch; `...` in a shape is any number of batch axes
- I: input capsules (children)
- J: output capsules (parents)
- P: length of an input pose; of a matrix pose, its columns
- D: length of an output pose, D = R·E
- R: rows of a matrix pose; 1 for vectors
- E: columns of an output matrix pose; D for vectors
- T: routing iterations
- H, W, C: height, width and channels of an image; H, W also of a map of capsules
- K, L: height and width of a window of capsules
- O: output channels of a convolution
- N: hidden units of an attention
"""

import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType


def as_array(function: str, name: str, value: object) -> Array:
    """Convert a number, nested list or array to an array; raise TypeError for anything else."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        kind = type(value).__name__
        raise TypeError(
            f"{function}: {name} must be an array, or nested lists of numbers of equal lengths, "
            f"got a {kind}"
        ) from None


def check_floating(function: str, **arrays: Array) -> None:
    """Raise TypeError unless all arrays have the same floating-point dtype, of 16 bits or more."""
    first, *_ = arrays
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{function}: {name} must be floating, got {array.dtype}")
        if array.dtype.itemsize < 2:  # JAX promotes no such dtype to that of sums
            raise TypeError(
                f"{function}: {name} must be floating of at least 16 bits, got {array.dtype}"
            )
        if array.dtype != arrays[first].dtype:
            raise TypeError(
                f"{function}: {name} must have the dtype of {first}, {arrays[first].dtype}, "
                f"got {array.dtype}"
            )


def check_shape(
    function: str, name: str, array: Array, letters: str, shape: Sequence[int | None]
) -> None:
    """Raise ValueError unless the array has the shape, in which None is any positive size."""
    fits = len(array.shape) == len(shape) and all(
        size == wanted or (wanted is None and size > 0)
        for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits:
        known = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{function}: {name} must have shape {letters} = [{known}], got {tuple(array.shape)}"
        )


def check_positive(function: str, name: str, value: int) -> int:
    """Return the value as an int; raise ValueError unless it is an integer of at least 1."""
    try:
        number = 0 if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{function}: {name} must be an integer of at least 1, got {value!r}")
    return number


def check_number_dtype(function: str, name: str, array: Array) -> None:
    """Raise TypeError if an array of numbers has booleans."""
    if array.dtype == jnp.bool_:
        raise TypeError(f"{function}: {name} must be a number, got {array.dtype}")


def check_positive_number(function: str, name: str, value: float, *, above: float = 0) -> float:
    """Return the value as a float; raise ValueError unless it is a finite number above a bound."""
    try:
        number = math.nan if np.asarray(value).dtype == np.bool_ else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not above < number < math.inf:
        raise ValueError(f"{function}: {name} must be a number above {above:g}, got {value!r}")
    return number


def check_choice(
    function: str, name: str, value: object, choices: Sequence[str], *, optional: bool = False
) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        rule = "None or one of" if optional else "one of"
        raise ValueError(f"{function}: {name} must be {rule} {', '.join(choices)}, got {value!r}")


def check_axis_name(function: str, axis_name: object) -> None:
    """Raise ValueError unless `axis_name` is None or names axes of the enclosing shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    manual = {name for name, kind in axes if kind == AxisType.Manual}
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    known = all(isinstance(name, str) and name in manual for name in names)
    if axis_name is not None and not (names and known):
        raise ValueError(
            f"{function}: axis_name must name an axis of the enclosing jax.shard_map, or be a "
            f"tuple of such names, got {axis_name!r} where they are {sorted(manual)}"
        )
