"""The strided convolution in front of capsules."""

import jax.numpy as jnp
from jax import Array

from capsjax import shapes
from capsjax.kernels import strided_conv as op
from capsjax.kernels.dispatch import dispatch


def strided_conv(
    images: Array, kernel: Array, *, stride: int = 1, implementation: str | None = None
) -> Array:
    """Convolves without padding (in truth correlates, as every neural network does).

    Args:
      images: `[..., H, W, C]`, floating.
      kernel: `[h, w, C, O]`, in the dtype of `images`.
      stride: Pixels from one window to the next, along both axes.
      implementation: None chooses when the program is lowered: XLA's own convolution (`"xla"`),
        but on a CPU, where XLA's gradients of a strided one are tens of times slower than its
        values, `"spectral"` (matrix products in Fourier space; no forward-mode derivative) or
        `"patches"` (one matrix product).

    Returns:
      `[..., (H - h) // stride + 1, (W - w) // stride + 1, O]`, in the dtype of `images`.

    Raises:
      ValueError: A shape or setting is wrong.
      TypeError: A dtype is wrong.
      Unsupported: `"spectral"` was asked for where it would cost more than the direct sum.

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
    if 0 in leading:  # no example: nothing to sum
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
