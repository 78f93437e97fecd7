"""Initial weights of the votes, `[I, P, J, E]`; of a convolution `[K, L, I, P, J, E]`."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.typing import DTypeLike

# Standard deviation of a standard normal distribution that is truncated at -2 and 2.
_TRUNCATED_DEVIATION = 0.87962566

# Longest votes, relative to their poses, that `capsules_init` draws. Of 2, 3, 4, 6 and no bound,
# docs/initialisation.md, 4 trains five layers of 32 capsules best, and 2 does not train five of 16.
_MAX_VOTE_GAIN = 4.0

# The 0.1 of the authors' code, for one capsule layer on 1152 input capsules: votes start much
# shorter than 1. As in TensorFlow, 0.1 is the value before truncation, so weights have 0.088.
votes_init = jax.nn.initializers.truncated_normal(0.1)


def capsules_init(
    key: Array, shape: Sequence[int], dtype: DTypeLike | None = None, out_sharding: Any = None
) -> Array:
    """Draw weights with which stacked layers of squashed sums of votes learn.

    With standard deviation σ, poses of length ℓ and uniform couplings 1/J, the weighted sums of
    votes have length σ · ℓ · sqrt(I·E) / J. With σ = J / sqrt(I·E) that is the length of the
    poses, in every layer; with a fixed σ it falls from layer to layer, until nothing learns. The
    squash still shortens outputs: making up for it too saturates the couplings. For the same
    reason σ is at most 4 / sqrt(E), with which votes are 4 times as long as poses.

    Args:
      key: A JAX random key.
      shape: (I, P, J, E), or (K, L, I, P, J, E), where K·L·I capsules vote for a parent.
      dtype: Of the weights; None for JAX's default.
      out_sharding: As in `jax.nn.initializers`.

    Returns:
      Weights of the shape, from a normal distribution truncated at 2 / 0.88 standard deviations.

    Raises:
      ValueError: The shape has neither four nor six axes.

    Example:
      >>> capsules_init(jax.random.key(0), (72, 8, 16, 8)).shape
      (72, 8, 16, 8)
    """
    children, _, parents, columns = _sizes("capsules_init", shape)
    vote_gain = min(parents / math.sqrt(children), _MAX_VOTE_GAIN)
    return _truncated(vote_gain / math.sqrt(columns), key, shape, dtype, out_sharding)


def averages_init(
    key: Array, shape: Sequence[int], dtype: DTypeLike | None = None, out_sharding: Any = None
) -> Array:
    """Draw weights with standard deviation 1 / sqrt(P), for routings that average the votes.

    Each component of a vote then varies as much as a component of the poses, as the components of
    the clusters do that EM, variational Bayes and self-routing form of them.

    Args:
      key: A JAX random key.
      shape: (I, P, J, E) or (K, L, I, P, J, E).
      dtype: Of the weights; None for JAX's default.
      out_sharding: As in `jax.nn.initializers`.

    Returns:
      Weights of the shape, from a normal distribution truncated at 2 / 0.88 standard deviations.

    Raises:
      ValueError: The shape has neither four nor six axes.

    Example:
      >>> averages_init(jax.random.key(0), (3, 3, 8, 4, 16, 4)).shape
      (3, 3, 8, 4, 16, 4)
    """
    _, length, _, _ = _sizes("averages_init", shape)
    return _truncated(1 / math.sqrt(length), key, shape, dtype, out_sharding)


def attention_init(
    key: Array, shape: Sequence[int], dtype: DTypeLike | None = None, out_sharding: Any = None
) -> Array:
    """Draw weights with standard deviation sqrt(J / (I·P)), of inverted attention's authors.

    Source: Tsai, Srivastava, Goh and Salakhutdinov, "Capsules with Inverted Dot-Product Attention
    Routing", https://arxiv.org/abs/2002.04764, the authors' code. A LayerNorm follows.

    Args:
      key: A JAX random key.
      shape: (I, P, J, E), or (K, L, I, P, J, E), where K·L·I capsules vote for a parent.
      dtype: Of the weights; None for JAX's default.
      out_sharding: As in `jax.nn.initializers`.

    Returns:
      Weights of the shape, from a normal distribution.

    Raises:
      ValueError: The shape has neither four nor six axes.

    Example:
      >>> attention_init(jax.random.key(0), (32, 4, 10, 4)).shape
      (32, 4, 10, 4)
    """
    children, length, parents, _ = _sizes("attention_init", shape)
    draw = jax.nn.initializers.normal(math.sqrt(parents / (children * length)))
    return draw(key, shape, dtype, out_sharding)


def _sizes(function: str, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Return the children of a parent, P, J and E."""
    if len(shape) not in (4, 6):
        raise ValueError(
            f"{function}: shape must be (I, P, J, E) or (K, L, I, P, J, E), got {tuple(shape)}"
        )
    *children, length, parents, columns = shape
    return math.prod(children), length, parents, columns


def _truncated(
    deviation: float, key: Array, shape: Sequence[int], dtype: Any, out_sharding: Any
) -> Array:
    draw = jax.nn.initializers.truncated_normal(deviation / _TRUNCATED_DEVIATION)
    return draw(key, shape, dtype, out_sharding)
