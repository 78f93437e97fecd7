"""The squashing nonlinearity of capsules."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from capsjax.kernels.dtypes import accumulation_dtype


def squash(x: Array, *, axis: int = -1) -> Array:
    """Shrink vectors to a length in [0, 1) and keep their direction: `|x|²/(1 + |x|²) · x/|x|`.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 2, equation 1,
    https://arxiv.org/abs/1710.09829.

    Values and derivatives are finite for every input but NaN. Vectors are divided by their largest
    component before their length is computed, so it neither overflows nor underflows; the
    derivative at 0 is its limit, 0; an infinite component counts as the dtype's largest number.
    The result's length is below 1 by at least a rounding error, so `log(1 - length)` is finite.

    Args:
      x: `[..., D]`, floating; computed in float32 at least, and rounded once.
      axis: The axis of a vector's components.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      TypeError: `x` is not floating.

    Example:
      >>> [round(float(x), 4) for x in squash(jnp.array([3.0, 4.0]))]  # length 25/26
      [0.5769, 0.7692]
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"squash: x must be floating, got {x.dtype}")
    if x.dtype.itemsize < 2:
        raise TypeError(f"squash: x must be floating of at least 16 bits, got {x.dtype}")
    return _squash(x, axis)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _squash(x: Array, axis: int) -> Array:
    unit, length = unit_and_length(x, axis)
    factor, _ = _factor_and_slope(length)
    eps = jnp.finfo(length.dtype).eps
    # Beyond 1 / eps the length rounds to 1; the factor of even longer vectors is subnormal.
    shrunk = jnp.where(length < 1 / eps, length * factor, 1)
    below_one = 1 - max(4 * float(eps), float(jnp.finfo(x.dtype).eps))
    return (unit * jnp.minimum(shrunk, below_one)).astype(x.dtype)


@_squash.defjvp
def _squash_jvp(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    unit, length = unit_and_length(x, axis)
    dx = dx.astype(unit.dtype)
    # v = f(n) x with n = |x| and e = x/n, so dv = f dx + n f'(n) e (e·dx).
    factor, slope = _factor_and_slope(length)
    radial = jnp.sum(unit * dx, axis, keepdims=True)
    return _squash(x, axis), (factor * dx + slope * unit * radial).astype(x.dtype)


def _factor_and_slope(n: Array) -> tuple[Array, Array]:
    """Compute `f = n/(1 + n²)` and `n f' = f (1 - n²)/(1 + n²)` without overflow of n²."""
    short = n < 1
    small, large = jnp.where(short, n, 0), jnp.where(short, 1, n)
    square, inverse = small * small, 1 / large
    factor = jnp.where(short, small / (1 + square), 1 / (inverse + large))
    ratio = jnp.where(short, (1 - square) / (1 + square), (inverse - large) / (inverse + large))
    return factor, factor * ratio


def unit_and_length(x: Array, axis: int) -> tuple[Array, Array]:
    """Compute direction (0 for a zero vector) and length of `x`, in the accumulation dtype."""
    largest = jnp.finfo(x.dtype).max
    x = jnp.clip(x, -largest, largest).astype(accumulation_dtype(x.dtype))
    largest = jnp.finfo(x.dtype).max
    # Direction and length do not depend on the scale, so its derivative is not needed.
    scale = lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=True))
    # XLA may divide by multiplying with 1 / scale, which is subnormal for the longest vectors: a
    # quarter of numerator and denominator keeps it normal.
    shrink = jnp.where(scale > 1, jnp.asarray(0.25, x.dtype), 1)
    scaled = (shrink * x) / jnp.maximum(shrink * scale, jnp.finfo(x.dtype).tiny)
    squares = jnp.sum(scaled * scaled, axis, keepdims=True)
    nonzero = squares > 0
    relative = jnp.sqrt(jnp.where(nonzero, squares, 1))
    length = jnp.where(nonzero, jnp.minimum(scale * relative, largest), 0)
    return scaled / relative, length
