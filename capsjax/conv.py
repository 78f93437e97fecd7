"""Strided convolution, with gradients that are fast on a CPU too."""

import jax.numpy as jnp
from jax import Array

from capsjax import shapes
from capsjax.kernels import strided_conv as op
from capsjax.kernels.dispatch import dispatch


def strided_conv(
    images: Array, kernel: Array, *, stride: int = 1, implementation: str | None = None
) -> Array:
    """Convolve images without padding (a cross-correlation, as in other neural-network libraries).

    `"xla"` is XLA's convolution. On a CPU the gradients of a strided one take tens of times as long
    as its values, so None selects there `"spectral"` (matrix products in Fourier space, without
    forward-mode derivative), or `"patches"` (one matrix product) if its cost estimate is lower.

    Args:
      images: `[..., H, W, C]`, floating.
      kernel: `[h, w, C, O]` for windows of h x w pixels, in the dtype of `images`.
      stride: Pixels from one window to the next, along both axes.
      implementation: `"xla"`, `"spectral"` or `"patches"`; None selects by platform, when the
        program is lowered.

    Returns:
      `[..., (H - h) // stride + 1, (W - w) // stride + 1, O]`, in the dtype of `images`.

    Raises:
      ValueError: A shape or setting is wrong.
      TypeError: A dtype is wrong.
      Unsupported: `"spectral"` is named, and the batch size is symbolic or the cost estimate of
        `"patches"` is lower.

    Example:
      >>> strided_conv(jnp.ones((2, 20, 20, 3)), jnp.ones((9, 9, 3, 4)), stride=2).shape
      (2, 6, 6, 4)
    """
    name = "strided_conv"
    stride = shapes.check_positive(name, "stride", stride)
    images, kernel = jnp.asarray(images), jnp.asarray(kernel)
    shapes.check_floating(name, images=images, kernel=kernel)
    leading = images.shape[:-3]
    shapes.check_shape(name, "images", images, "[..., H, W, C]", (*leading, None, None, None))
    height, width, channels = images.shape[-3:]
    shapes.check_shape(name, "kernel", kernel, "[h, w, C, O]", (None, None, channels, None))
    if kernel.shape[0] > height or kernel.shape[1] > width:
        raise ValueError(
            f"{name}: kernel must fit into the images, {height} x {width}, "
            f"got {kernel.shape[0]} x {kernel.shape[1]}"
        )
    if 0 in leading:  # empty batch: return early
        rows, columns = (height - kernel.shape[0]) // stride, (width - kernel.shape[1]) // stride
        return jnp.zeros((*leading, rows + 1, columns + 1, kernel.shape[3]), images.dtype)
    convolved = dispatch(
        name,
        op.IMPLEMENTATIONS,
        op.PREFERENCE,
        implementation,
        images.reshape(-1, height, width, channels),
        kernel,
        stride=(stride, stride),
    )
    return convolved.reshape(*leading, *convolved.shape[1:])
