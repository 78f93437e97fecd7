"""Margin and reconstruction losses of "Dynamic Routing Between Capsules"."""

import jax.numpy as jnp
from jax import Array

from capsjax import shapes


def margin_loss(
    lengths: Array,
    targets: Array,
    *,
    positive_margin: float = 0.9,
    negative_margin: float = 0.1,
    negative_weight: float = 0.5,
) -> Array:
    """Compute the margin loss: a squared hinge on the capsule length of each class.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 3, equation 4,
    https://arxiv.org/abs/1710.09829.

    Args:
      lengths: `[..., J]`, floating, in [0, 1].
      targets: `[..., J]`, 1 or True for each class in the image, of which there may be several.
      positive_margin: Length at which the loss of a present class reaches 0.
      negative_margin: Length below which the loss of an absent class is 0.
      negative_weight: Factor on the loss of absent classes; at 1 they shrink all capsules early in
        training.

    Returns:
      `[...]`, the sum over classes, in the dtype of `lengths`.

    Raises:
      ValueError: The shapes differ.
      TypeError: A dtype is wrong.

    Example:
      >>> loss = margin_loss(jnp.array([0.8, 0.3]), jnp.array([1, 0]))
      >>> round(float(loss), 6)  # 0.1² + 0.5 · 0.2²
      0.03
    """
    letters = "[..., J]"
    shapes.check_floating("margin_loss", lengths=lengths)
    shapes.check_shape("margin_loss", "targets", targets, letters, lengths.shape)
    present = targets.astype(lengths.dtype)
    missing = jnp.maximum(0, positive_margin - lengths) ** 2
    surplus = jnp.maximum(0, lengths - negative_margin) ** 2
    return jnp.sum(present * missing + negative_weight * (1 - present) * surplus, axis=-1)


def reconstruction_loss(reconstructions: Array, images: Array, *, weight: float = 0.0005) -> Array:
    """Compute the reconstruction loss: the sum of squared differences over pixels, scaled down.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 4.1,
    https://arxiv.org/abs/1710.09829. For 28x28 pixels 0.0005 times the sum is 0.392 times the mean.

    Args:
      reconstructions: `[..., H, W, C]`, floating.
      images: `[..., H, W, C]`, in [0, 1].
      weight: Factor on the sum, which keeps it small beside the margin loss.

    Returns:
      `[...]`, in the dtype of the difference: float32 if either is float32.

    Raises:
      ValueError: The shapes differ.
      TypeError: A dtype is wrong.

    Example:
      >>> round(float(reconstruction_loss(jnp.ones((28, 28, 1)), jnp.zeros((28, 28, 1)))), 4)
      0.392
    """
    letters = "[..., H, W, C]"
    shapes.check_floating("reconstruction_loss", reconstructions=reconstructions)
    shapes.check_shape("reconstruction_loss", "images", images, letters, reconstructions.shape)
    return weight * jnp.sum((reconstructions - images) ** 2, axis=(-3, -2, -1))
