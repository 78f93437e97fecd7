"""Capsule lengths and coupling entropy."""

import jax.numpy as jnp
from jax import Array

from capsjax import shapes
from capsjax.kernels.dtypes import accumulation_dtype


def lengths(capsules: Array, *, axis: int = -1) -> Array:
    """Compute the Euclidean length of each capsule, used as class score.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 2,
    https://arxiv.org/abs/1710.09829.

    Args:
      capsules: `[..., D]`, floating; squares are summed in float32 at least.
      axis: The axis of a capsule's components.

    Returns:
      `[...]`, in the dtype of `capsules`; the gradient at a zero vector is 0.

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
    """Compute the entropy, in nats, of each input capsule's couplings.

    Args:
      couplings: `[..., J]`, floating, with sum 1 over the output capsules, or all 0 for a masked
        input capsule.

    Returns:
      `[...]`, from 0 (one output capsule) to log(J) (all equally), in the dtype of `couplings`.

    Raises:
      TypeError: `couplings` are not floating.

    Example:
      >>> coupling_entropy(jnp.array([[0.5, 0.5], [1.0, 0.0]]))
      Array([0.6931472, 0.       ], dtype=float32)
    """
    shapes.check_floating("coupling_entropy", couplings=couplings)
    logarithms = jnp.log(jnp.where(couplings > 0, couplings, 1))
    return 0 - jnp.sum(couplings * logarithms, axis=-1)
