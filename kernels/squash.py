"""The squashing nonlinearity, shared by every routing implementation."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from capsjax.kernels.dtypes import accumulation_dtype


def squash(x: Array, *, axis: int = -1) -> Array:
    """Shrinks vectors to a length in [0, 1), keeping their direction: `|x|²/(1 + |x|²) · x/|x|`.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 2, equation 1,
    https://arxiv.org/abs/1710.09829.

    Values and derivatives are finite for every input but NaN: lengths are taken of the vector
    divided by its largest component, so nothing overflows or vanishes, and the derivative at 0
    is 0, its limit. An infinite component counts as the dtype's largest number, as `tanh(inf)`
    is 1. The result's length stays below 1 by at least a rounding error, so `log(1 - length)`
    is finite too.

    Args:
      x: `[..., D]`, floating; half precision is computed in float32 and rounded once.
      axis: The axis along which the components of a vector lie.

    Returns:
      As `x` in shape and dtype.

    Raises:
      TypeError: `x` is not floating.

    Example:
      >>> [round(float(x), 4) for x in squash(jnp.array([3.0, 4.0]))]  # length 25/26
      [0.5769, 0.7692]
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"squash: x must be floating, got {x.dtype}")
    return _squash(x, axis)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _squash(x: Array, axis: int) -> Array:
    unit, length = _unit_and_length(x, axis)
    factor, _ = _factor_and_slope(length)
    eps = jnp.finfo(length.dtype).eps
    # The longest vectors' factor is too small to be normal, and their length is 1 long before.
    shrunk = jnp.where(length < 1 / eps, length * factor, 1)
    below_one = 1 - max(4 * eps, jnp.finfo(x.dtype).eps)
    return (unit * jnp.minimum(shrunk, below_one)).astype(x.dtype)


@_squash.defjvp
def _squash_jvp(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    unit, length = _unit_and_length(x, axis)
    dx = dx.astype(unit.dtype)
    # v = f(n) x with n = |x| and e = x/n, so dv = f dx + n f'(n) e (e·dx).
    factor, slope = _factor_and_slope(length)
    radial = jnp.sum(unit * dx, axis, keepdims=True)
    return _squash(x, axis), (factor * dx + slope * unit * radial).astype(x.dtype)


def _factor_and_slope(n: Array) -> tuple[Array, Array]:
    """`f = n/(1 + n²)` and `n f' = f (1 - n²)/(1 + n²)`, with no n² that could overflow."""
    short = n < 1
    small, large = jnp.where(short, n, 0), jnp.where(short, 1, n)
    square, inverse = small * small, 1 / large
    factor = jnp.where(short, small / (1 + square), 1 / (inverse + large))
    ratio = jnp.where(short, (1 - square) / (1 + square), (inverse - large) / (inverse + large))
    return factor, factor * ratio


def _unit_and_length(x: Array, axis: int) -> tuple[Array, Array]:
    """Direction (0 for the zero vector) and length of `x`, in the accumulation dtype."""
    largest = jnp.finfo(x.dtype).max
    x = jnp.clip(x, -largest, largest).astype(accumulation_dtype(x.dtype))
    largest = jnp.finfo(x.dtype).max
    # The result does not depend on the scale, so neither do its derivatives.
    scale = lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=True))
    # A quarter of long vectors: XLA divides by multiplying with 1 / scale, which must be normal.
    part = jnp.where(scale > 1, jnp.asarray(0.25, x.dtype), 1)
    scaled = (part * x) / jnp.maximum(part * scale, jnp.finfo(x.dtype).tiny)
    squares = jnp.sum(scaled * scaled, axis, keepdims=True)
    nonzero = squares > 0
    relative = jnp.sqrt(jnp.where(nonzero, squares, 1))
    length = jnp.where(nonzero, jnp.minimum(scale * relative, largest), 0)
    return scaled / relative, length
