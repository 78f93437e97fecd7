"""What capsules and their routing tell."""

import jax.numpy as jnp
from jax import Array

from capsjax import shapes
from capsjax.kernels.dtypes import accumulation_dtype


def lengths(capsules: Array, *, axis: int = -1) -> Array:
    """The length of each capsule's vector: how sure it is that its entity is there.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 2,
    https://arxiv.org/abs/1710.09829.

    Args:
      capsules: `[..., D]`, floating; half precision is summed in float32.
      axis: The axis along which the components of a vector lie.

    Returns:
      `[...]`, in the dtype of `capsules`; the gradient at the zero vector is 0.

    Raises:
      TypeError: `capsules` is not floating.

    Example:
      >>> lengths(jnp.array([[0.3, 0.4], [0.0, 0.0]]))
      Array([0.5, 0. ], dtype=float32)
    """
    capsules = jnp.asarray(capsules)
    shapes.check_floating("lengths", capsules=capsules)
    wide = capsules.astype(accumulation_dtype(capsules.dtype))
    squares = jnp.sum(wide * wide, axis)
    nonzero = squares > 0
    return jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, squares, 1)), 0).astype(capsules.dtype)


def coupling_entropy(couplings: Array) -> Array:
    """The entropy of each child's couplings over its parents, in nats: log(J) when undecided.

    Args:
      couplings: `[..., J]`, summing to 1 over J, or all 0 for a masked child.

    Returns:
      `[...]`, between 0 and log(J).

    Example:
      >>> coupling_entropy(jnp.array([[0.5, 0.5], [1.0, 0.0]]))
      Array([0.6931472, 0.       ], dtype=float32)
    """
    logarithms = jnp.log(jnp.where(couplings > 0, couplings, 1))
    return 0 - jnp.sum(couplings * logarithms, axis=-1)
